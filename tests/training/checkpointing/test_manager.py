"""Saving and resuming: the same curve, at the same layout to the bit; nothing but whole checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_jobs as jobs
from formats import write_peft
from ranks import RankPool
from safetensors.torch import load_file
from torch_dist_jobs import load_with_core

from opt_megatron.checkpoint.checkpoint import Checkpoint
from opt_megatron.checkpoint.conversion_options import ConversionOptions
from opt_megatron.checkpoint.convert import convert
from opt_megatron.checkpoint.formats.megatron_ranks import TRACKER
from opt_megatron.checkpoint.formats.registry import open_checkpoint
from opt_megatron.checkpoint.load import load_model
from opt_megatron.data.options import DataOptions
from opt_megatron.model.lora_options import LoRAOptions
from opt_megatron.parallel.context import ParallelContext
from opt_megatron.training.checkpointing.integrity import find_damage, saved_checkpoints
from opt_megatron.training.lr_schedule import LRSchedule
from opt_megatron.training.metrics import METRICS_FILE
from opt_megatron.training.options import TrainerOptions
from opt_megatron.training.training_options import TrainingOptions

PEFT_LAYER = "base_model.model.model.decoder.layers.0"


@pytest.fixture
def settings(corpus: str, four_layers: Path) -> TrainingOptions:
    """Twelve steps from scratch with dropout, a checkpoint every four, of OPT's initialisation."""
    base = jobs.settings_for(four_layers)
    return TrainingOptions(
        config=base.config.replace(dropout=0.1, attention_dropout=0.1),
        schedule=LRSchedule(1e-3, 1e-4, 3, 12),
        trainer=TrainerOptions(12, jobs.GLOBAL, jobs.SEQ, 4, log_interval=1, save_interval=4),
        data=DataOptions(train_data_path=[corpus]),
        init_std=0.02,
    )


def losses_of(run: Path) -> list[float]:
    """The losses in metrics.jsonl, which must be of the steps 1, 2, 3 ..."""
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def without_dropout(settings: TrainingOptions) -> TrainingOptions:
    """Dropout depends on the layout; the rest of a run does not."""
    return replace(settings, config=settings.config.replace(dropout=0.0, attention_dropout=0.0))


@pytest.mark.parametrize(("tp", "pp", "world"), [(1, 1, 1), (2, 1, 2), (1, 2, 2), (1, 1, 2)])
def test_a_resumed_run_is_the_same_to_the_bit(
    ranks: Callable[[int], RankPool], settings: TrainingOptions, tmp_path: Path, tp: int, pp: int, world: int
) -> None:
    ranks(world).run(jobs.whole_run, tmp_path / "whole", tp, pp, settings)
    ranks(world).run(jobs.whole_run, tmp_path / "cut", tp, pp, settings, 5)
    said = ranks(world).run(jobs.whole_run, tmp_path / "cut", tp, pp, settings)[0]
    assert "iteration 5" in said[0]
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert len(losses_of(tmp_path / "whole")) == 12
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


def same_weights(left: Path, right: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same bits."""
    first, second = open_checkpoint(left), open_checkpoint(right)
    return all(torch.equal(first.read(name), second.read(name)) for name in first.tensors)


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 1, 2), (1, 2, 2)), ((1, 2, 2), (1, 1, 1)), ((1, 1, 1), (2, 2, 4)), ((2, 1, 4), (1, 1, 2))],
)
def test_a_run_goes_on_at_another_layout(
    ranks: Callable[[int], RankPool],
    settings: TrainingOptions,
    tmp_path: Path,
    before: tuple[int, int, int],
    after: tuple[int, int, int],
) -> None:
    settings = without_dropout(settings)
    ranks(1).run(jobs.whole_run, tmp_path / "whole", 1, 1, settings)
    ranks(before[2]).run(jobs.whole_run, tmp_path / "cut", *before[:2], settings, 6)
    ranks(after[2]).run(jobs.whole_run, tmp_path / "cut", *after[:2], settings)
    assert losses_of(tmp_path / "cut") == pytest.approx(losses_of(tmp_path / "whole"), abs=1e-4)


def test_350ms_projections_and_an_uneven_vocabulary_are_saved_too(
    ranks: Callable[[int], RankPool], settings: TrainingOptions, post_norm: Path, tmp_path: Path
) -> None:
    config = open_checkpoint(post_norm).config.replace(dropout=0.0)
    settings = replace(settings, config=config, load=str(post_norm), schedule=LRSchedule(1e-4, 1e-5, 0, 12))
    ranks(2).run(jobs.whole_run, tmp_path / "whole", 2, 1, settings)
    ranks(2).run(jobs.whole_run, tmp_path / "cut", 2, 1, settings, 4)
    ranks(2).run(jobs.whole_run, tmp_path / "cut", 1, 2, settings, 8)
    ranks(2).run(jobs.whole_run, tmp_path / "cut", 2, 1, settings)
    assert losses_of(tmp_path / "cut") == pytest.approx(losses_of(tmp_path / "whole"), abs=1e-4)
    # Every tensor is found, and the vocabulary is as large as without the padding of two ranks.
    assert open_checkpoint(tmp_path / "cut").tensors["model.decoder.embed_tokens.weight"].shape[0] == 517


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_main_parameters(
    ranks: Callable[[int], RankPool], settings: TrainingOptions, tmp_path: Path, dtype: torch.dtype
) -> None:
    settings = replace(settings, dtype=dtype)
    ranks(1).run(jobs.whole_run, tmp_path / "whole", 1, 1, settings)
    ranks(1).run(jobs.whole_run, tmp_path / "cut", 1, 1, settings, 7)
    ranks(1).run(jobs.whole_run, tmp_path / "cut", 1, 1, settings)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert losses_of(tmp_path / "cut")[-1] < losses_of(tmp_path / "cut")[0]


def test_the_newest_whole_checkpoint_is_taken(
    ranks: Callable[[int], RankPool], settings: TrainingOptions, tmp_path: Path
) -> None:
    ranks(2).run(jobs.whole_run, tmp_path / "run", 2, 1, settings)
    whole = losses_of(tmp_path / "run")
    newest, older = (tmp_path / "run" / f"iter_{n:07d}" for n in (12, 8))
    shard = next(newest.glob("__0_*.distcp"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    next(older.glob("__1_*.distcp")).unlink()
    (tmp_path / "run" / ".iter_0000016.partial").mkdir()
    said = ranks(2).run(jobs.whole_run, tmp_path / "run", 2, 1, settings)[0]
    assert "damaged" in said[0] and "missing" in said[1] and "iteration 4" in said[2]
    assert losses_of(tmp_path / "run") == whole
    assert find_damage(newest) is None
    assert not list((tmp_path / "run").glob(".iter*"))


def test_only_the_last_are_kept(ranks: Callable[[int], RankPool], settings: TrainingOptions, tmp_path: Path) -> None:
    ranks(1).run(jobs.whole_run, tmp_path / "run", 1, 1, replace(settings, keep_last=2))
    assert [iteration for iteration, _ in saved_checkpoints(tmp_path / "run")] == [12, 8]
    assert (tmp_path / "run" / TRACKER).read_text() == "12"


def test_other_settings_are_another_run(
    ranks: Callable[[int], RankPool], settings: TrainingOptions, tmp_path: Path
) -> None:
    ranks(1).run(jobs.whole_run, tmp_path / "run", 1, 1, settings, 4)
    with pytest.raises(AssertionError, match=r"belongs to another run .seed was 1 and is 2"):
        ranks(1).run(jobs.whole_run, tmp_path / "run", 1, 1, replace(settings, seed=2))


def test_lora_is_merged_as_it_is_read(
    ranks: Callable[[int], RankPool],
    settings: TrainingOptions,
    four_layers: Path,
    alone: ParallelContext,
    tmp_path: Path,
) -> None:
    lora = LoRAOptions(4, 8.0)
    settings = replace(settings, load=str(four_layers), lora=lora, schedule=LRSchedule(1e-2, 1e-3, 0, 12))
    ranks(2).run(jobs.whole_run, tmp_path / "run", 2, 1, settings)
    parameters, logits = ranks(2).run(jobs.adapted_logits, tmp_path / "run", 2, 1, settings)[0]
    model = load_model(tmp_path / "run", None, alone)
    tokens = torch.arange(4, 24)[None]
    assert (model(tokens) - logits).abs().max() <= 1e-4
    base = load_model(four_layers, None, alone)
    assert (base(tokens) - logits).abs().max() > 1e-2
    assert parameters  # the factors have moved
    convert(tmp_path / "run", tmp_path / "peft", ConversionOptions(to="peft"))
    assert_same_tensors(open_checkpoint(four_layers, adapter=tmp_path / "peft"), open_checkpoint(tmp_path / "run"))
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(stored) == 4 * 6 * 2
    of_q, of_k = (stored[f"{PEFT_LAYER}.self_attn.{name}_proj.lora_A.weight"] for name in "qk")
    assert torch.equal(of_q, of_k)


def assert_same_tensors(left: Checkpoint, right: Checkpoint) -> None:
    """The same values, to the bit."""
    assert left.tensors.keys() == right.tensors.keys()
    assert all(torch.equal(left.read(name), right.read(name)) for name in left.tensors)


def test_an_adapter_of_peft_is_saved_resumed_and_written_again(
    ranks: Callable[[int], RankPool],
    settings: TrainingOptions,
    four_layers: Path,
    alone: ParallelContext,
    tmp_path: Path,
) -> None:
    """Only q and v of the last layer, which one pipeline stage alone holds."""
    modules = ["layers.3.self_attn.q_proj", "layers.3.self_attn.v_proj"]
    weights = load_file(four_layers / "model.safetensors")
    write_peft(tmp_path / "adapter", weights, dict.fromkeys(modules, 4), layers_to_transform=[3])
    settings = without_dropout(replace(settings, load=str(four_layers), schedule=LRSchedule(1e-2, 1e-3, 0, 12)))
    save, adapter = tmp_path / "run", tmp_path / "adapter"
    ranks(2).run(jobs.whole_run, save, 1, 2, settings, 5, adapter)
    assert "iteration 5" in ranks(2).run(jobs.whole_run, save, 2, 1, settings, 0, adapter)[0][0]
    _, logits = ranks(2).run(jobs.adapted_logits, save, 2, 1, settings, adapter)[0]
    model = load_model(save, None, alone)
    assert (model(torch.arange(4, 24)[None]) - logits).abs().max() <= 1e-4
    convert(save, tmp_path / "again", ConversionOptions(to="peft"))
    stored, before = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "adapter"))
    assert stored.keys() == before.keys()
    assert all((stored[name] - before[name]).abs().max() > 1e-3 for name in stored)
    assert_same_tensors(open_checkpoint(four_layers, adapter=tmp_path / "again"), open_checkpoint(save))


def test_core_loads_a_run_into_its_own_model(
    ranks: Callable[[int], RankPool], settings: TrainingOptions, tmp_path: Path
) -> None:
    ranks(2).run(jobs.whole_run, tmp_path / "run", 2, 1, settings, 4)
    different = ranks(2).run(load_with_core, tmp_path / "run" / "iter_0000004", 1, 2)
    assert different == [[], []]


def test_a_run_that_was_saved_by_old_names_goes_on(
    ranks: Callable[[int], RankPool], settings: TrainingOptions, tmp_path: Path
) -> None:
    ranks(1).run(jobs.whole_run, tmp_path / "whole", 1, 1, settings)
    ranks(1).run(jobs.run_by_old_names, tmp_path / "cut", settings, 5)
    ranks(1).run(jobs.whole_run, tmp_path / "cut", 1, 1, settings)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
