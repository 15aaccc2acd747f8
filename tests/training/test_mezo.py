"""MeZO: the same step at every layout, the reference's rule, and a checkpoint that repeats the run to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mezo_jobs as jobs
import pytest
import torch
from factory import random_model, save
from ranks import RankPool

from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.checkpoint.mezo.normal_numbers import normal_block, seed_of_step
from opt_megatron.checkpoint.mezo.steps import MezoStep
from opt_megatron.checkpoint.storage.blocks import whole
from opt_megatron.errors import UserError
from opt_megatron.model.lora_options import LoRAOptions

STEP = MezoStep(0xFEDCBA9876543210, 2.5, 1e-3)
LAYOUTS = [(2, 1, 2), (1, 2, 2), (1, 1, 2), (2, 2, 4)]  # tensor, pipeline, world
LORA = {"lora": LoRAOptions(3)}


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [("four_layers", {}, "nll"), ("post_norm", {}, "classification"), ("four_layers", LORA, "nll")],
)
def test_a_step_is_the_same_to_the_bit_at_every_layout(
    ranks: Callable[[int], RankPool], request: pytest.FixtureRequest, name: str, changes: dict[str, Any], kind: str
) -> None:
    directory, answers = request.getfixturevalue(name), 2 if kind == "classification" else 1
    step = (changes, STEP, kind, answers)
    expected, (plus, minus) = ranks(1).run(jobs.one_step, directory, 1, 1, *step)[0]
    assert abs(plus.loss - minus.loss) > 1e-3
    for tp, pp, world in LAYOUTS:
        for found, sums in ranks(world).run(jobs.one_step, directory, tp, pp, *step):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], values) for name, values in expected.items())
            assert [one.loss for one in sums] == pytest.approx([plus.loss, minus.loss], abs=2e-6)
            assert [(one.count, one.tokens) for one in sums] == [(plus.count, plus.tokens)] * 2


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_step_on_simulated_gpus_has_the_cpus_bits(
    simulated_gpus: Callable[[int], RankPool], ranks: Callable[[int], RankPool], four_layers: Path, tp: int, pp: int
) -> None:
    step = (LORA, STEP, "nll", 1)
    expected = ranks(1).run(jobs.one_step, four_layers, 1, 1, *step)[0][0]
    for found, _ in simulated_gpus(2).run(jobs.one_step, four_layers, tp, pp, *step):
        assert all(torch.equal(found[name], values) for name, values in expected.items())


def reference(model: Any, batches: list[list[Any]], kind: str, epsilon: float, lr: float) -> list[float]:
    """The authors' steps on transformers' model, in their order, on this project's z; the projected gradients."""

    def loss(batch: list[Any]) -> float:
        logprobs = []
        for example in batch:
            for answer in example.answers:
                ids = torch.tensor([[*example.prompt, *answer]])
                found = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                logprobs.append(found[len(example.prompt) - 1 :])
        if kind == "nll":
            return -float(torch.cat(logprobs).mean())
        logits = torch.stack([one.mean() for one in logprobs]).view(len(batch), -1)
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor([example.label for example in batch])))

    def perturb(seed: int, factor: float) -> None:
        for name, parameter in model.named_parameters():
            z = normal_block([seed], name, whole(tuple(parameter.shape)))[0]
            parameter.data = parameter.data + factor * z

    gradients = []
    with torch.no_grad():
        for number, batch in enumerate(batches, 1):
            seed = seed_of_step(1, number)
            perturb(seed, epsilon)
            plus = loss(batch)
            perturb(seed, -2 * epsilon)
            minus = loss(batch)
            perturb(seed, epsilon)
            gradients.append((plus - minus) / (2 * epsilon))
            perturb(seed, -lr * gradients[-1])
    return gradients


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions with two candidates each."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [{"src": f"The fox number {n} ran. Was it", "tgt": (" fast", " a slow one")[n % 2]} for n in range(12)]
    path.write_text("".join(json.dumps(line | {"candidates": [" fast", " a slow one"]}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers with the embedded model's tokenizer."""
    model = random_model(vocab_size=4096, num_hidden_layers=2, num_attention_heads=4)
    directory = save(model, tmp_path_factory.mktemp("small"))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(EMBEDDED_DIRECTORY / name, directory)
    return directory


@pytest.mark.parametrize("kind", ["nll", "classification"])
def test_steps_follow_the_references_rule(
    ranks: Callable[[int], RankPool], small: Path, pairs: Path, kind: str
) -> None:
    from transformers import OPTForCausalLM

    from opt_megatron.data.prompt_dataset import PromptDataset
    from opt_megatron.tokenizer import OPTTokenizer

    settings = jobs.mezo_settings(small, pairs, 3, objective=kind)
    tokenizer = OPTTokenizer.from_directory(small)
    data = PromptDataset([str(pairs)], tokenizer, 256, 1, 24, has_candidates=kind != "nll")
    batches = [[data[index] for index in range(first, first + 8)] for first in (0, 8, 16)]
    model = OPTForCausalLM.from_pretrained(small, dtype="float32").eval()
    gradients = reference(model, batches, kind, 1e-3, 1e-5)
    steps, found, _ = ranks(1).run(jobs.run_steps, settings, 1, 1)[0]
    assert [step.projected_gradient for step in steps] == pytest.approx(gradients, abs=2e-2)
    for name, values in model.named_parameters():
        assert torch.allclose(found[name], values.data, rtol=0, atol=3e-6), name


@pytest.mark.parametrize(("tp", "pp", "changes"), [(1, 1, {}), (2, 1, LORA)])
def test_a_checkpoint_repeats_the_run_and_goes_on_with_it(
    ranks: Callable[[int], RankPool],
    small: Path,
    pairs: Path,
    tmp_path: Path,
    tp: int,
    pp: int,
    changes: dict[str, Any],
) -> None:
    settings = jobs.mezo_settings(small, pairs, 4, tmp_path / "run", mezo_epsilon=1e-2, **changes)
    unsaved = replace(settings, save=None)
    world = ranks(tp * pp)
    steps, expected, _ = world.run(jobs.run_steps, unsaved, tp, pp)[0]
    stopped = replace(settings, trainer=replace(settings.trainer, exit_iters=2))
    assert world.run(jobs.run_steps, stopped, tp, pp)[0][0] == steps[:2]
    found_steps, found, said = world.run(jobs.run_steps, settings, tp, pp)[0]
    assert found_steps == steps and any("resumed from" in line for line in said)
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert (tmp_path / "run" / "iter_0000004" / "mezo_steps.bin").stat().st_size == 4 * 24

    checkpoint = open_checkpoint(tmp_path / "run")
    if not changes:
        assert all(torch.equal(checkpoint.read(name), values) for name, values in expected.items())
    else:
        name = "model.decoder.layers.1.fc2.weight"
        a, b = (expected[f"decoder.layers.1.mlp.linear_fc2.lora_{factor}"] for factor in "ab")
        base = open_checkpoint(small).read(name).float()
        assert b.any() and torch.equal(checkpoint.read(name), base + LoRAOptions(3).alpha / 3 * (b @ a))
    convert(tmp_path / "run", tmp_path / "hf", ConversionOptions(to="hf"))
    baked = open_checkpoint(tmp_path / "hf")
    assert all(torch.equal(baked.read(name), checkpoint.read(name)) for name in checkpoint.tensors)


def test_another_base_or_optimizer_is_refused(
    ranks: Callable[[int], RankPool], small: Path, pairs: Path, four_layers: Path, tmp_path: Path
) -> None:
    from training_jobs import refusal

    settings = jobs.mezo_settings(small, pairs, 2, tmp_path / "run")
    ranks(1).run(jobs.run_steps, replace(settings, trainer=replace(settings.trainer, exit_iters=1)), 1, 1)
    message = ranks(1).run(refusal, tmp_path / "run", replace(settings, mezo=None))[0]
    assert "is of a run with MeZO: use another --save" in message
    run = tmp_path / "run" / "iter_0000001" / "mezo.json"
    text = run.read_text()
    for base, reason in ((four_layers, "is another model"), (tmp_path / "none", "its base cannot be opened")):
        run.write_text(text.replace(str(small), str(base)))
        with pytest.raises(UserError, match=reason):
            open_checkpoint(tmp_path / "run")


def test_it_learns_the_names_task(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    lines = (EMBEDDED_DIRECTORY.parent / "names-task" / "train.jsonl").read_text().splitlines()[:8]
    (tmp_path / "few.jsonl").write_text("\n".join(lines) + "\n")
    settings = jobs.mezo_settings(
        EMBEDDED_DIRECTORY, tmp_path / "few.jsonl", 20, lr=2e-3, mezo_epsilon=1e-2, lora=LoRAOptions(8)
    )
    losses = ranks(1).run(jobs.losses_of_run, settings)[0]
    assert losses[-1] < losses[0] - 0.4
