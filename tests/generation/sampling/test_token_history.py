"""The history of a sequence, and what is counted of it."""

from hypothesis import given
from hypothesis import strategies as st
from sampling_inputs import history

from opt_megatron.generation.sampling.token_history import TokenHistory


def as_lists(known: TokenHistory) -> tuple[object, ...]:
    counts = dict(zip(*(part.tolist() for part in known.output_counts()), strict=True))
    return known.tokens, known.output, sorted(known.distinct().tolist()), counts, known.tokens_since({4})


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_a_copy_grows_alone(prompt, output):
    known = history(*output, prompt=tuple(prompt))
    other = known.copy()
    other.append(1)
    assert as_lists(other) == as_lists(history(*output, 1, prompt=tuple(prompt)))
    assert as_lists(known) == as_lists(history(*output, prompt=tuple(prompt)))
    assert as_lists(known)[2] == sorted({*prompt, *output})
