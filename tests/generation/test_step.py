"""The input of a step, as it is broadcast."""

from hypothesis import given
from hypothesis import strategies as st

from opt_megatron.generation.sampling.batch_sampler import SamplingRow
from opt_megatron.generation.step import KVCacheBlocks, OutputKind, ScheduledSequence, StepInput

SEQUENCES = st.builds(
    ScheduledSequence,
    st.builds(KVCacheBlocks, st.integers(0, 10**6), st.integers(1, 2048)),
    st.integers(0, 2047),
    st.lists(st.integers(0, 60000), min_size=1, max_size=5).map(tuple),
    st.integers(0, 5),
    st.none()
    | st.builds(
        SamplingRow,
        st.floats(0, allow_infinity=False),
        st.integers(0, 2**31),
        st.floats(0, 1),
        st.floats(0, 1),
        st.integers(-(2**63), 2**63 - 1),
        st.integers(0, 128),
        st.floats(0, 100),
        st.floats(0, 1),
        st.integers(0, 2**63 - 1),
        st.integers(0, 50272),
    ),
)


@given(st.lists(SEQUENCES).map(tuple), st.sampled_from(OutputKind))
def test_step_inputs_survive_the_wire(sequences, kind):
    assert StepInput.from_numbers(StepInput(sequences, kind).to_numbers()) == StepInput(sequences, kind)
