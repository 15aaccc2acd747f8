"""Stop strings in a stream."""

from hypothesis import given
from hypothesis import strategies as st

from opt_megatron.generation.stopping import StopScanner


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[list[str], bool]:
    scanner = StopScanner(stops)
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


def test_the_earliest_of_several_wins():
    assert run(("b", "abc"), ["xxabc"]) == (["xx"], True)


short = st.text(alphabet="ab\n", max_size=6)


@given(st.lists(short, max_size=8), st.lists(short.filter(bool), max_size=3))
def test_any_cutting_gives_the_text_up_to_the_first_stop(pieces, stops):
    whole = "".join(pieces)
    positions = [whole.find(stop) for stop in stops if stop in whole]
    shown, stopped = run(tuple(stops), pieces)
    assert stopped == bool(positions)
    text = "".join(shown)
    if not positions:
        assert text == whole
        return
    # A longer stop string may begin before a shorter one that is complete sooner in the stream.
    assert whole.startswith(text) and text in {whole[: whole.find(stop)] for stop in stops if stop in whole}
