"""Sampling of all rows at once against the choice for one row at a time."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_inputs import NEVER, history

from opt_megatron.errors import UserError
from opt_megatron.generation.sampling.batch_sampler import (
    NO_TOKEN,
    SamplingRow,
    SamplingTensors,
    argmax_rows,
    green_bits_of_rows,
    row_of,
    sample_rows,
)
from opt_megatron.generation.sampling.logits_processors import NO_IDS, ProcessorChain
from opt_megatron.generation.sampling.sampler import SamplerState, choose_token
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.generation.step import sampling_numbers


class Given:
    """Random numbers that are one."""

    def __init__(self, number: float) -> None:
        self.number = number

    def at(self, position: int) -> float:
        return self.number


def sampled(logits, params, numbers, suppressed=NO_IDS) -> list[int]:
    rows = [row_of(ProcessorChain(one), 0, 0) for one in params]
    tensors = SamplingTensors.of(torch.tensor([sampling_numbers(row) for row in rows]).T, logits.size(-1))
    given_numbers = torch.tensor(numbers, dtype=torch.float64) * tensors.is_sampled
    green = green_bits_of_rows(rows, history().tokens[-1:] * len(rows), logits.size(-1))
    return sample_rows(logits, tensors, given_numbers, suppressed, green).tolist()


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-300, 1e-4, 0.3, 0.8, 1.0, 1.7, 30.0]),
    top_k=st.sampled_from([0, 1, 2, 3, 7, 50, 1000]),
    top_p=st.sampled_from([1e-300, 0.05, 0.3, 0.5, 0.9, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 0.9, 1.0]),
    watermark_delta=st.sampled_from([0.0, 0.0, 2.5, 100.0]),
)
NUMBERS = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 0.5, 1 - 2**-53]))
KINDS = st.sampled_from(["normal", "equal", "few values", "few possible", "huge", "infinite", "impossible", "nan"])


def logits_of(kind: str, seed: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(size, generator=generator) * 3
    if kind == "equal":
        return torch.zeros(size)
    if kind == "few values":
        return row.round()
    if kind == "few possible":
        return row.masked_fill(torch.rand(size, generator=generator) < 0.8, NEVER)
    if kind == "huge":
        return row * 1e37
    if kind == "infinite":
        return row.masked_fill(torch.rand(size, generator=generator) < 0.1, torch.inf)
    if kind == "impossible":
        return torch.full((size,), NEVER)
    return row * torch.nan if kind == "nan" else row


def expected(logits: torch.Tensor, params: SamplingParams, number: float, suppressed: torch.Tensor) -> int:
    if params.is_greedy and not logits.index_fill(-1, suppressed, NEVER).max() > NEVER:
        return NO_TOKEN  # greedy search alone does not look
    try:
        return choose_token(logits, SamplerState(ProcessorChain(params, suppressed), history(), Given(number)))
    except UserError:
        return NO_TOKEN


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(PARAMS, NUMBERS, KINDS, st.integers(0, 10**6)), min_size=1, max_size=6),
    st.sampled_from([1, 2, 9, 300, 3000]),
    st.booleans(),
)
def test_rows_get_the_tokens_that_they_would_get_alone(cases, size, suppresses):
    suppressed = torch.tensor([0, size // 2]).unique() if suppresses and size > 2 else NO_IDS
    logits = torch.stack([logits_of(kind, seed, size) for _, _, kind, seed in cases])
    chosen = sampled(logits, [params for params, *_ in cases], [number for _, number, *_ in cases], suppressed)
    assert chosen == [expected(row, p, n, suppressed) for row, (p, n, *_) in zip(logits, cases, strict=True)]


def test_a_whole_vocabulary():
    logits = torch.stack([logits_of("normal", seed, 50272) for seed in range(4)])
    params = [SamplingParams(**o) for o in ({"top_p": 0.9}, {"top_k": 50}, {"temperature": 1.3}, {"min_p": 0.01})]
    params[1] = replace(params[1], watermark_delta=2.0, watermark_vocab_size=50265)
    numbers = [0.1, 0.7, 0.99, 0.4]
    chosen = sampled(logits, params, numbers)
    assert chosen == [expected(*case, NO_IDS) for case in zip(logits, params, numbers, strict=True)]
    assert torch.equal(argmax_rows(logits, NO_IDS), logits.argmax(-1))


def test_what_needs_the_host_has_no_row():
    host = (
        {"repetition_penalty": 2.0},
        {"typical_p": 0.5},
        {"banned_tokens": (1,)},
        {"temperature": 0, "logit_bias": ((1, 2.0),)},
        {"watermark_delta": 2.0, "watermark_scheme": "selfhash"},
        {"watermark_delta": 2.0, "watermark_context_width": 2},
        {"watermark_delta": 2.0, "repetition_penalty": 2.0},
    )
    assert all(row_of(ProcessorChain(SamplingParams(**options)), 0, 0) is None for options in host)
    assert row_of(ProcessorChain(SamplingParams(temperature=0.5, top_k=3)), 4, 2) == SamplingRow(0.5, 3, 1.0, 0.0, 4, 2)
