"""opt-megatron train: pre-training and fine-tuning, on one process or under torchrun."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.locate import EMBEDDED_NAME
from ..config import released_name
from ..data.options import DataOptions, SupervisedOptions
from ..errors import UserError, print_notice
from ..model.lora_options import LORA_TARGETS, LoRAOptions
from ..options import Option, from_arguments, options_of
from ..training.options import (
    DeviceOptions,
    ExecutionOptions,
    MezoOptions,
    OptimizerOptions,
    SavingOptions,
    ScheduleOptions,
    StartOptions,
    TrainerOptions,
)
from ..training.run_file import HEADER
from .arguments import LayoutOptions, config_argument, print_config_notes
from .loading import lost_rank_policy
from .option_groups import Groups, add_groups, comparable_options, declared_options, resolved_options

if TYPE_CHECKING:
    from ..checkpoint.adapter import Adapter
    from ..config import OPTConfig
    from ..parallel.context import ParallelContext
    from ..training.recipe import Recipe
    from ..training.training_options import TrainingOptions

HELP = "pre-train or fine-tune, on one process or under torchrun with tensor, pipeline, data and sequence parallelism"
EXAMPLE = "opt-megatron train --load opt-125m --data-path data/corpus_text_document --save runs/mine --train-iters 1000"

_OF_GRADIENTS = ("sequence_parallel", "recompute_granularity", "transformer_impl", "cross_entropy_loss_fusion")
_WRITTEN = {"save", "tensorboard_dir", "data_cache_path"}  # paths that may not exist yet

OPTIONS: Groups = {
    "model (one of --preset, --model-config and --load)": (StartOptions,),
    "data (indexed files of preprocess, or JSON lines with src and tgt)": (DataOptions, SupervisedOptions),
    "steps (defaults: OPT's recipe)": (TrainerOptions,),
    "optimisation (defaults: OPT's recipe)": (ScheduleOptions, OptimizerOptions),
    "MeZO (--optimizer mezo)": (MezoOptions,),
    "LoRA": (LoRAOptions,),
    "what is written": (SavingOptions,),
    "how it runs": (LayoutOptions, ExecutionOptions, DeviceOptions),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments, under Megatron-LM's names."""
    add_groups(parser, OPTIONS, file=True)


def run(args: argparse.Namespace) -> None:
    """Train.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    from ..parallel.context import check_seed
    from ..parallel.launch_environment import order_cuda_kernels, world_size_from_environment
    from ..parallel.layout import check_layout

    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    check_layout(None, tp, pp, world_size_from_environment())
    check_seed(args.seed)
    _check_sources(args)
    recipe = _recipe(args)
    order_cuda_kernels(tp, args.device)

    from ..parallel.context import init_parallel

    parallel = init_parallel(
        tp,
        pp,
        seed=args.seed,
        device=args.device,
        options=comparable_options(args, OPTIONS),
        lost_ranks=lost_rank_policy(args),
    )
    from ..checkpoint.locate import locate
    from ..parallel.context import on_all_ranks
    from ..tokenizer import has_tokenizer
    from ..training.train import train

    load, config = _start_of_run(args, recipe, parallel)
    adapter = _open_adapter(args, config, parallel)
    check_layout(config, tp, pp, parallel.world_size)
    if args.tokenizer is None:
        tokenizer = load if load is not None and has_tokenizer(load) else None
    else:
        tokenizer = on_all_ranks(parallel, lambda: locate(args.tokenizer))
    options = _options_of_run(args, config, recipe, load, adapter, tokenizer)
    finished = train(options, parallel, lambda text: print(text, file=sys.stderr, flush=True))
    if finished and parallel.is_leader and options.directory:
        print(options.directory)


def _start_of_run(
    args: argparse.Namespace, recipe: Recipe | None, parallel: ParallelContext
) -> tuple[Path | None, OPTConfig]:
    """The checkpoint to start from, or None, and the model's config."""
    from ..checkpoint.load import open_on_all_ranks

    if args.load is not None:
        opened = open_on_all_ranks(args.load, parallel, args.revision)
        if parallel.is_leader:
            print_config_notes(opened.config_notes, args)
        return opened.path, opened.config
    config = config_argument(args) if recipe is None else recipe.config
    assert config is not None  # _check_sources requires one of the three
    return None, config


def _open_adapter(args: argparse.Namespace, config: OPTConfig, parallel: ParallelContext) -> Adapter | None:
    """The adapter that is trained further, if there is one."""
    if args.adapter is None:
        return None
    from ..checkpoint.formats.registry import open_adapter
    from ..checkpoint.load import locate_on_all_ranks
    from ..parallel.context import on_all_ranks

    found = locate_on_all_ranks(args.adapter, parallel)
    adapter = on_all_ranks(parallel, lambda: open_adapter(found, config))
    if adapter.dropout and parallel.is_leader:
        print_notice(f"LoRA's dropout of {adapter.dropout:g}, as {found} has it, is not applied")
    return adapter


def _check_sources(args: argparse.Namespace) -> None:
    given = [name for name in ("preset", "model_config", "load") if getattr(args, name) is not None]
    if len(given) != 1:
        raise UserError(f"give one of --preset, --model-config and --load, not {' and '.join(given) or 'none'}")
    if args.bf16 and args.fp16:
        raise UserError("--bf16 and --fp16 exclude each other")
    if args.lora_rank and args.load is None:
        raise UserError("--lora-rank adapts a trained model: give --load")
    if args.adapter is not None and args.load is None:
        raise UserError("--adapter is given without --load, the model that it was made for")
    if args.adapter is not None and args.lora_rank:
        raise UserError("--adapter has ranks of its own: leave --lora-rank out")
    if args.lora_target_modules != LORA_TARGETS and not args.lora_rank:
        raise UserError("--lora-target-modules is given without --lora-rank")
    if args.revision is not None and args.load is None:
        raise UserError("--revision is given without --load")
    if args.supervised_valid_data and not args.supervised_data:
        raise UserError("--supervised-valid-data is given without --supervised-data")
    if args.supervised_data and args.eval_interval and not args.supervised_valid_data:
        raise UserError("--eval-interval is given, but nothing to validate on: give --supervised-valid-data")
    if (args.valid_data_path or args.supervised_valid_data) and not args.eval_interval:
        raise UserError("validation data are given, but not --eval-interval")
    _check_optimizer(args)
    if args.save is not None and not args.save.strip():
        raise UserError("--save is empty: give a directory")


def _check_optimizer(args: argparse.Namespace) -> None:
    """Refuse what the chosen optimizer would ignore."""
    if args.optimizer != "mezo":
        for declared in _changed(args, options_of(MezoOptions)):
            raise UserError(f"{declared.flag} is given without --optimizer mezo")
        return
    if args.load is None or not args.supervised_data:
        raise UserError("--optimizer mezo fine-tunes a trained model on answers: give --load and --supervised-data")
    execution = options_of(ExecutionOptions)
    for declared in _changed(args, options_of(OptimizerOptions) | {name: execution[name] for name in _OF_GRADIENTS}):
        if declared.name != "optimizer":
            raise UserError(f"{declared.flag} is given, which --optimizer mezo does not have: it computes no gradients")
    if args.adapter is not None:
        raise UserError("--optimizer mezo begins with new factors: merge --adapter into --load with convert first")
    if args.hidden_dropout or args.attention_dropout:
        raise UserError("--optimizer mezo trains without dropout: leave --hidden-dropout and --attention-dropout out")


def _changed(args: argparse.Namespace, declared: dict[str, Option]) -> list[Option]:
    """The options that are not at their defaults; run.yaml gives those too that are."""
    return [one for one in declared.values() if one.cli and getattr(args, one.argument) != one.default]


def _recipe(args: argparse.Namespace) -> Recipe | None:
    if args.preset is None:
        return None
    from ..training.recipe import find_recipe

    return find_recipe(args.preset)


def _options_of_run(
    args: argparse.Namespace,
    config: OPTConfig,
    recipe: Recipe | None,
    load: Path | None,
    adapter: Adapter | None,
    tokenizer: Path | None,
) -> TrainingOptions:
    """The options of a run, with the recipe's numbers where none were given, which the arguments get as well.

    Raises:
        UserError: a number is missing or does not make sense.
    """
    import torch

    from ..options.yaml_file import write_options
    from ..training.lr_schedule import LRSchedule
    from ..training.training_options import TrainingOptions

    _fill_in(args, config, recipe)
    dropout = {"dropout": args.hidden_dropout, "attention_dropout": args.attention_dropout}
    return TrainingOptions(
        config=config.replace(**{name: share for name, share in dropout.items() if share is not None}),
        schedule=LRSchedule(args.lr, args.min_lr, args.lr_warmup_iters, args.train_iters, args.lr_decay_style),
        trainer=from_arguments(TrainerOptions, args),
        optimizer=from_arguments(OptimizerOptions, args),
        data=from_arguments(DataOptions, args) if args.data_path or args.train_data_path else None,
        supervised=from_arguments(SupervisedOptions, args) if args.supervised_data else None,
        load=None if load is None else str(load),
        base_model=None if load is None else (adapter and adapter.base_model) or _base_model(args.load, load),
        adapter=adapter,
        tokenizer=tokenizer,
        lora=from_arguments(LoRAOptions, args) if args.lora_rank else None,
        mezo=from_arguments(MezoOptions, args) if args.optimizer == "mezo" else None,
        dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
        init_std=args.init_method_std,
        run_file=write_options(_for_run_file(args), HEADER),
        **vars(from_arguments(SavingOptions, args)),
        **vars(from_arguments(ExecutionOptions, args)),
    )


def _base_model(name: str, path: Path) -> str:
    """By which name transformers finds the model of --load: its repository on the Hub, or its path."""
    if name == EMBEDDED_NAME or Path(name).exists():
        return str(path.absolute())
    size = released_name(name)
    return name if size is None else f"facebook/{size}"


def _fill_in(args: argparse.Namespace, config: OPTConfig, recipe: Recipe | None) -> None:
    """Give the arguments the numbers that the recipe, the model or other arguments determine."""
    for name in ("train_iters", "global_batch_size", "lr"):
        if getattr(args, name) is None:
            if recipe is None:
                raise UserError(f"--{name.replace('_', '-')} is missing: only a --preset has one of its own")
            setattr(args, name, getattr(recipe, name))
    if args.min_lr is None:
        args.min_lr = args.lr / 10
    if args.lr_warmup_iters is None:
        args.lr_warmup_iters = min(recipe.lr_warmup_iters, args.train_iters) if recipe else 0
    if args.seq_length is None:
        args.seq_length = config.max_position_embeddings


def _for_run_file(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The options of the run, with absolute paths: it may be repeated from another working directory."""
    resolved = resolved_options(args, OPTIONS)
    for title, declared in declared_options(OPTIONS):
        name = declared.argument
        if declared.is_path and name in resolved.get(title, {}):
            resolved[title][name] = _absolute(resolved[title][name], is_written=name in _WRITTEN)
    return resolved


def _absolute(value: str | tuple[str, ...], *, is_written: bool) -> str | tuple[str, ...]:
    if isinstance(value, tuple):
        return tuple(str(_absolute(item, is_written=is_written)) for item in value)
    path = Path(value)
    # A name, as story, and the weight of a corpus are no paths; a corpus is PREFIX.bin.
    is_there = path.exists() or Path(f"{path}.bin").exists()
    return str(path.absolute()) if is_there or is_written else value
