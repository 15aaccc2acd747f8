"""The history of a sequence, and what is counted of it."""

from hypothesis import given
from hypothesis import strategies as st
from sampling_inputs import history

from opt_megatron.generation.sampling.token_history import TokenHistory


def as_lists(known: TokenHistory) -> tuple[object, ...]:
    counts = dict(zip(*(part.tolist() for part in known.output_counts()), strict=True))
    return known.tokens, known.output, sorted(known.distinct().tolist()), counts, known.tokens_since({4})


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)), st.data())
def test_a_truncated_history_is_one_that_never_went_further(prompt, output, data):
    known = history(*output, prompt=tuple(prompt))
    kept = data.draw(st.integers(0, len(output)))
    other = known.copy()
    other.truncate(kept)
    assert as_lists(other) == as_lists(history(*output[:kept], prompt=tuple(prompt)))
    other.append(1)
    assert as_lists(known) == as_lists(history(*output, prompt=tuple(prompt)))  # the copy went alone
    assert as_lists(known)[2] == sorted({*prompt, *output})
