"""Stop strings and regular expressions in a stream."""

import time

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from opt_megatron.errors import UserError
from opt_megatron.generation.decoding import stop_strings
from opt_megatron.generation.decoding.stop_strings import CONTEXT, StopScanner


def run(
    stops: tuple[str, ...], pieces: list[str], patterns: tuple[str, ...] = (), include_stop: bool = False
) -> tuple[list[str], bool]:
    scanner = StopScanner(stops, patterns, include_stop)
    shown = []
    for piece in pieces:
        text, stopped = scanner.push(piece)
        shown.append(text)
        if stopped:
            return shown, True
    return [*shown, scanner.flush()], False


def test_a_stop_string_across_token_borders_is_cut_off_and_never_shown_in_part():
    assert run(("END",), ["one E", "N", "D two"]) == (["one ", "", ""], True)


def test_what_only_looked_like_one_is_shown():
    assert run(("END",), ["one E", "Nx", "EN"]) == (["one ", "ENx", "", "EN"], False)


def test_the_one_that_is_complete_first_wins_and_of_these_the_one_that_begins_first():
    assert run(("b", "abc"), ["xxabc"]) == run(("b", "abc"), ["xxab"]) == (["xxa"], True)
    assert run(("c", "abc"), ["xxabc"]) == (["xx"], True)
    assert run(("bc",), ["xxabc"], (r"abc",)) == (["xx"], True)


def test_a_stop_string_is_kept_when_asked_for_and_what_is_behind_it_is_not():
    assert run(("END",), ["one E", "ND two"], include_stop=True) == (["one ", "END"], True)
    assert run((), ["a 1", "2;3"], (r"\d+;",), include_stop=True) == (["a ", "12;"], True)


def test_a_regular_expression_is_found_across_token_borders_and_never_shown_in_part():
    assert run((), ["see <", "/na", "me", ">!"], (r"</\w+>",)) == (["see ", "", "", ""], True)
    assert run((), ["see <", "/na", " me"], (r"</\w+>",)) == (["see ", "", "</na me", ""], False)


def test_a_match_is_taken_before_it_has_grown():
    assert run((), ["a12"], (r"\d+",), include_stop=True) == (["a1"], True)
    assert run((), ["food"], (r"foo\b",), include_stop=True) == (["foo"], True)


def test_a_pattern_sees_what_was_shown_before_the_match():
    assert run((), ["x", "ab", ", ", "ab"], (r"(?<!x)ab",)) == (["x", "ab", ", ", ""], True)
    assert run((), ["xab", "\n", "ab"], (r"(?m)^ab",)) == (["xab", "\n", ""], True)
    # Where no more than the context is remembered, its start is not taken for that of the text.
    shown, stopped = run((), ["x" + "ab" * CONTEXT, "ab", "!", "ab"], (r"^ab|\bab",))
    assert "".join(shown) == "x" + "ab" * CONTEXT + "ab!" and stopped


pieces_of_text = st.lists(st.text(alphabet="ab\n", max_size=6), max_size=8)
PATTERNS = [
    r"ab+a",
    r"(?<=b)a\n",
    r"^b",
    r"\bab",
    r"a(?!b)",
    r"a\n?b",
    r"(a|b)\n",
    r"(?<!a)bb",
    r"(?m)^ab",
    r"a(?=\nb)",
    r"(?s)a.*\n",
    r"[ab]{3}",
    r"([ab])\1",
    r"abab|ba",
    r"(?>a+)b",
]


def by_characters(text: str, stops: list[str], patterns: list[str], include_stop: bool) -> tuple[str, bool]:
    """The expected output: the shortest beginning of the text with a match, up to that match."""
    searches = [regex.escape(stop) for stop in stops] + patterns
    for end in range(1, len(text) + 1):
        spans = [match.span() for search in searches if (match := regex.search(search, text[:end]))]
        if spans:
            return text[: min(spans)[include_stop]], True
    return text, False


@given(
    pieces_of_text,
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=6), max_size=3),
    st.lists(st.sampled_from(PATTERNS), max_size=2),
    st.booleans(),
)
def test_any_cutting_gives_the_same_text(pieces, stops, patterns, include_stop):
    shown, stopped = run(tuple(stops), pieces, tuple(patterns), include_stop)
    assert ("".join(shown), stopped) == by_characters("".join(pieces), stops, patterns, include_stop)


@given(
    pieces_of_text,
    st.integers(0, 8),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=6), max_size=3),
    st.sampled_from(["ab+a", r"([ab])\1", r"(?s)a.*\n", r"a(?!b)"]),
)
def test_a_match_counts_only_where_it_is_complete_once_the_stream_may_stop(pieces, held, stops, pattern):
    scanner = StopScanner(stops, (pattern,))
    shown, stopped = "", False
    for index, piece in enumerate(pieces):
        text, stopped = scanner.push(piece, may_stop=index >= held)
        shown += text
        if stopped:
            break
    text, begin = "".join(pieces), len("".join(pieces[:held]))
    expected = (text, False)
    for end in range(begin + 1, len(text) + 1):
        new = (match for match in regex.finditer(pattern, text[:end], overlapped=True))
        spans = [match.span() for match in new if not is_complete_before(match, begin)]
        spans += [(end - len(stop), end) for stop in stops if text[:end].endswith(stop)]
        if spans:
            expected = text[: min(spans)[0]], True
            break
    assert (shown + ("" if stopped else scanner.flush()), stopped) == expected


def is_complete_before(match: regex.Match, end: int) -> bool:
    """Whether the text up to some earlier place already had a match there."""
    earlier = (match.re.match(match.string[:stop], match.start()) for stop in range(end + 1))
    return any(earlier)


@given(pieces_of_text, st.lists(st.text(alphabet="ab\n", min_size=1, max_size=6), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_is_shown(pieces, stops):
    scanner, pushed, shown = StopScanner(stops), "", ""
    for piece in pieces:
        text, stopped = scanner.push(piece)
        pushed, shown = pushed + piece, shown + text
        assert not any(stop in shown for stop in stops)
        if stopped:
            return
        # Whatever comes next: no stop string begins in what is shown already.
        assert not any(stop.startswith(pushed[begin:]) for stop in stops for begin in range(len(shown)))


def test_a_long_stream_costs_no_more_per_token_at_its_end():
    scanner = StopScanner(("User:",), (r"\n\s*\n", r"</\w+>"))
    start = time.perf_counter()
    for _ in range(20_000):
        scanner.push("word ")
    assert time.perf_counter() - start < 10  # about 0.5 s; with all the text searched every time, minutes
    assert len(scanner._text) <= CONTEXT + 5


def test_a_pattern_that_would_search_for_ever_is_named(monkeypatch):
    monkeypatch.setattr(stop_strings, "SEARCH_TIMEOUT_S", 0.05)
    pattern = r"(.+)+(.+)+(.+)+x\1\2\3q"
    with pytest.raises(UserError, match=r"stop_regex '\(\.\+\).* took more than 0.05 s"):
        StopScanner((), (pattern,)).push("abcdef" * 20 + "x")
