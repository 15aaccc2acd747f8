"""Generation with its state on the device, as on a GPU, but on the CPU: the same text as without."""

import pytest
import rank_jobs
from factory import prompts_for

from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams

KINDS = [
    {"temperature": 0},
    {"temperature": 0.9},
    {"temperature": 0, "repetition_penalty": 1.3},  # chosen by the host
    {"top_k": 30, "top_p": 0.9, "n": 2},
    {"temperature": 0, "logprobs": 2},
    {"num_beams": 2},
    {"min_p": 0.05, "max_new_tokens": 1},
    {"temperature": 0, "max_new_tokens": 0, "echo": True},
]


def requests_for(model, kinds=KINDS) -> list[Request]:
    lengths = (70, 12, 25, 7, 40, 9, 18, 26)  # requests leave the batch, and others join it, at different times
    return [
        Request(prompt, SamplingParams(**{"max_new_tokens": length, "seed": length, **kinds[n % len(kinds)]}))
        for n, (prompt, length) in enumerate(zip(prompts_for(model), lengths, strict=True))
    ]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", ["pre-norm", "post-norm"])
def test_the_text_is_the_same_as_on_a_cpu(models, ranks, name, tp, pp):
    directory, model = models[name]
    # Alike: all are chosen on the device. Mixed: some are not, and the steps change from one way to the other.
    alike = [{"temperature": 0}, {"temperature": 1.2}, {"top_k": 20}, {"top_p": 0.8}]
    for requests in (requests_for(model, alike), requests_for(model)):
        for result in ranks(tp * pp).run(rank_jobs.generate_with_tokens_kept, directory, tp, pp, requests, 5):
            kept, expected = result
            assert [c.tokens for c in kept] == [c.tokens for c in expected]
            assert [c.finish_reason for c in kept] == [c.finish_reason for c in expected]
