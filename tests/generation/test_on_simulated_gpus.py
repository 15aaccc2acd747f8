"""Generation, scoring and research on simulated GPUs: what a CPU gives, and no operation mixes devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import api_jobs
import evaluation_jobs
import pytest
import rank_jobs
import torch
from factory import prompts_for, random_model, save
from ranks import RankPool
from torch.utils._pytree import tree_leaves

from opt_megatron.analysis.logit_lens import Lens
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.model.scoring import Item

LAYOUTS = [pytest.param(1, 1, id="TP1"), pytest.param(2, 1, id="TP2"), pytest.param(1, 2, id="PP2")]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"typical_p": 0.9},
    {"repetition_penalty": 1.2, "presence_penalty": 0.2, "frequency_penalty": 0.1},
    {"prompt_presence_penalty": 0.3, "lambda_decay": 0.9, "omega_bound": 0.3, "top_p": 0.8},
    {"logit_bias": {5: 1.0}, "banned_tokens": (7,), "bad_word_ids": ((11, 12),), "begin_suppress_tokens": (9,)},
    {"allowed_token_ids": tuple(range(10, 60)), "min_new_tokens": 3, "stop_token_ids": (20,)},
    {"temperature": 0, "logprobs": 3, "prompt_logprobs": 1},
    {"temperature": 0, "echo": True, "logprobs": 2},
    {"best_of": 3, "n": 2},
    {"num_beams": 3},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"watermark_delta": 3.0, "top_k": 60},
    {"watermark_delta": 3.0, "temperature": 0, "watermark_vocab_size": 400},
    {"watermark_delta": 3.0, "watermark_scheme": "selfhash", "watermark_context_width": 3},
    {"watermark_delta": 3.0, "num_beams": 2},
]

Pools = Callable[[int], RankPool]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model of two layers, and where it is saved."""
    made = random_model(num_hidden_layers=2)
    return save(made, tmp_path_factory.mktemp("model")), made


def requests_for(model: Any, kinds: list[dict[str, Any]], count: int = 6) -> list[Request]:
    """One of each kind."""
    prompts = prompts_for(model, [3 + 5 * number for number in range(len(kinds))])
    return [
        Request(prompt, SamplingParams(**{"max_new_tokens": count, "ignore_eos": True, "seed": number, **kind}))
        for number, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_every_kind_of_request(simulated_gpus: Pools, ranks: Pools, model: tuple[Path, Any], tp: int, pp: int) -> None:
    directory, oracle = model
    arguments = rank_jobs.generate, directory, 1, 1, requests_for(oracle, KINDS)
    expected = ranks(1).run(*arguments)[0]
    for completions in simulated_gpus(tp * pp).run(arguments[0], directory, tp, pp, arguments[-1]):
        assert [c.tokens for c in completions] == [c.tokens for c in expected]
        for completion, other in zip(completions, expected, strict=True):
            if other.logprobs is not None:
                assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("has_draft", [True, False], ids=["draft model", "prompt lookup"])
def test_speculation(
    simulated_gpus: Pools,
    ranks: Pools,
    model: tuple[Path, Any],
    tmp_path: Path,
    tp: int,
    pp: int,
    has_draft: bool,
) -> None:
    directory, oracle = model
    draft = save(_near(oracle), tmp_path) if has_draft else None
    kinds = [{"temperature": 0}, {"top_p": 0.9}, {"temperature": 0.9, "repetition_penalty": 1.2, "top_k": 50}]
    kinds += [{"temperature": 0, "watermark_delta": 2.0}, {"watermark_delta": 2.0, "watermark_scheme": "selfhash"}]
    requests = requests_for(oracle, kinds, count=12)
    expected = ranks(1).run(rank_jobs.speculate, directory, draft, 1, 1, requests)[0]
    for completions in simulated_gpus(tp * pp).run(rank_jobs.speculate, directory, draft, tp, pp, requests):
        assert [c.tokens for c in completions] == [c.tokens for c in expected]


def _near(model: Any) -> Any:
    """A model of which most proposals are accepted, and some are not."""
    draft = random_model(num_hidden_layers=2)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return draft


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_int8(simulated_gpus: Pools, model: tuple[Path, Any], tp: int, pp: int) -> None:
    directory, oracle = model
    tokens = list(prompts_for(oracle, [40])[0])
    with torch.no_grad():
        expected = oracle(torch.tensor([tokens])).logits[0, 29:]
    found = simulated_gpus(tp * pp).run(rank_jobs.cached_logits, directory, tp, pp, tokens, 30, "int8")[0]
    assert 0 < (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_research(simulated_gpus: Pools, ranks: Pools, four_layers: Path, tp: int, pp: int) -> None:
    tokens = torch.arange(4, 24)[None]
    point = "layers.1.mlp"
    jobs = [(api_jobs.look,), (api_jobs.lens,), (api_jobs.captured, [point]), (api_jobs.changed, point)]
    for job, *arguments in jobs:
        expected = ranks(1).run(job, four_layers, 1, 1, tokens, *arguments)[0]
        for found in simulated_gpus(tp * pp).run(job, four_layers, tp, pp, tokens, *arguments):
            for one, other in zip(_numbers(found), _numbers(expected), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def _numbers(result: Any) -> list[torch.Tensor]:
    """All numbers of a job's result."""
    leaves = tree_leaves(vars(result) if isinstance(result, Lens) else result)
    return [torch.as_tensor(leaf) for leaf in leaves]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_scores(simulated_gpus: Pools, model: tuple[Path, Any], tp: int, pp: int) -> None:
    directory, oracle = model
    items = [Item(prompt[:2], prompt[2:]) for prompt in prompts_for(oracle, [5, 31, 17])]
    expected = []
    for item in items:
        tokens = torch.tensor([[*item.context, *item.continuation]])
        with torch.no_grad():
            rows = oracle(tokens).logits[0, 1:-1].log_softmax(-1)
        expected.append(float(rows.gather(1, tokens[0, 2:, None]).sum()))
    for scores in simulated_gpus(tp * pp).run(evaluation_jobs.scores, directory, tp, pp, items, 2):
        assert [score.total for score in scores] == pytest.approx(expected, abs=1e-3)
