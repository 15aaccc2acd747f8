"""opt-megatron train: pre-training and fine-tuning, on one process or under torchrun."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .arguments import add_config, add_layout, config_argument

if TYPE_CHECKING:
    from ..config import OPTConfig
    from ..model.lora import LoRAOptions
    from ..training.recipe import Recipe
    from ..training.session import SupervisedOptions, TrainingSettings

HELP = "pre-train or fine-tune, on one process or under torchrun with tensor, pipeline, data and sequence parallelism"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments, under Megatron-LM's names."""
    model = parser.add_argument_group("model (one of --preset, --config and --load)")
    model.add_argument("--preset", metavar="SIZE", help="a size of OPT's recipe (8m, 125m ... 175b), from scratch")
    add_config(model)
    model.add_argument("--load", metavar="CHECKPOINT", help="fine-tune this one: any format, a name, or a repository")
    model.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    model.add_argument("--tokenizer", metavar="DIR", help="a tokenizer (or a name) to keep beside the checkpoints")
    model.add_argument("--hidden-dropout", type=float, metavar="P", help="of the residuals; default: the model's")
    model.add_argument("--attention-dropout", type=float, metavar="P", help="default: the model's")
    model.add_argument("--init-method-std", type=float, default=0.006, metavar="S", help="default: 0.006")
    _add_data(parser.add_argument_group("data (indexed files of preprocess, or JSON lines with src and tgt)"))
    _add_optimization(parser.add_argument_group("optimisation (defaults: OPT's recipe)"))
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--lora-rank", type=int, default=0, metavar="R", help="train factors of this rank; 0: everything")
    lora.add_argument("--lora-alpha", type=float, default=16.0, metavar="A", help="scale A / R; default: 16")
    lora.add_argument(
        "--lora-target-modules", nargs="+", metavar="NAME", help="of linear_qkv linear_proj linear_fc1 linear_fc2"
    )
    _add_run(parser.add_argument_group("the run"))
    how = parser.add_argument_group("how it runs")
    add_layout(how)
    how.add_argument("--sequence-parallel", action="store_true", help="divide norms and dropout over tensor ranks too")
    how.add_argument("--recompute-granularity", choices=("full", "selective"), help="recompute activations")
    how.add_argument("--bf16", action="store_true", help="bfloat16 with float32 main parameters")
    how.add_argument("--fp16", action="store_true", help="float16 with those and dynamic loss scaling")
    how.add_argument(
        "--use-distributed-optimizer", action="store_true", help="CUDA: divide Adam's state over the ranks"
    )
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    how.add_argument("--seed", type=int, default=1, help="default: 1")


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data-path", nargs="+", metavar="PREFIX", help="prefixes, or weight prefix weight prefix ...")
    group.add_argument("--split", default="969,30,1", help="training, validation, test; default: 969,30,1")
    group.add_argument("--train-data-path", nargs="+", metavar="PREFIX", help="instead of --data-path and --split")
    group.add_argument("--valid-data-path", nargs="+", metavar="PREFIX")
    group.add_argument("--data-cache-path", metavar="DIR", help="for the shuffled indices; default: beside the data")
    group.add_argument("--supervised-data", nargs="+", metavar="FILE", help="JSON lines with src and tgt, or text")
    group.add_argument("--supervised-valid-data", nargs="+", metavar="FILE")
    group.add_argument("--seq-length", type=int, metavar="S", help="default: the model's positions")


def _add_optimization(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--micro-batch-size", type=int, default=1, metavar="B", help="sequences at a time; default: 1")
    group.add_argument("--global-batch-size", type=int, metavar="G", help="sequences a step; default: the preset's")
    group.add_argument("--train-iters", type=int, metavar="N", help="steps; default: the preset's")
    group.add_argument("--lr", type=float, help="the peak; default: the preset's")
    group.add_argument("--min-lr", type=float, help="at the end; default: a tenth of --lr")
    group.add_argument("--lr-warmup-iters", type=int, metavar="N", help="default: the preset's, else 0")
    group.add_argument("--lr-decay-style", default="linear", choices=("linear", "cosine", "constant"))
    group.add_argument("--weight-decay", type=float, default=0.1)
    group.add_argument("--adam-beta1", type=float, default=0.9)
    group.add_argument("--adam-beta2", type=float, default=0.95)
    group.add_argument("--adam-eps", type=float, default=1e-8)
    group.add_argument("--clip-grad", type=float, default=1.0, help="largest norm of the gradients; default: 1.0")
    group.add_argument(
        "--skip-grad-norm", type=float, default=0.0, metavar="N", help="skip steps with a larger norm; default: none"
    )
    group.add_argument("--max-skipped-iters", type=int, default=10, metavar="N", help="in a row end a run; default: 10")
    group.add_argument("--initial-loss-scale", type=float, default=4.0, help="of fp16; default: 4")
    group.add_argument("--loss-scale-window", type=int, default=256, help="of fp16; default: 256")


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--save", metavar="DIR", help="checkpoints and metrics.jsonl; a run there is resumed")
    group.add_argument("--save-interval", type=int, default=0, metavar="N", help="steps; default: at the end alone")
    group.add_argument("--keep-last", type=int, default=0, metavar="K", help="checkpoints to keep; default: all")
    group.add_argument("--no-async-save", action="store_true", help="wait while a checkpoint is written")
    group.add_argument("--eval-interval", type=int, default=0, metavar="N", help="steps; default: no validation")
    group.add_argument("--eval-iters", type=int, default=0, metavar="N", help="micro-batches; default: all there are")
    group.add_argument("--log-interval", type=int, default=10, metavar="N", help="steps; default: 10")
    group.add_argument("--exit-iters", type=int, default=0, metavar="N", help="save and stop after this step")
    group.add_argument("--tensorboard-dir", metavar="DIR")


def run(args: argparse.Namespace) -> None:
    """Train.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    from ..parallel.context import check_seed
    from ..parallel.layout import check_layout, world_size_from_environment

    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    check_layout(None, tp, pp, world_size_from_environment())
    check_seed(args.seed)
    _check_sources(args)
    recipe = _recipe(args)

    from ..parallel.context import init_parallel

    parallel = init_parallel(tp, pp, seed=args.seed, device=args.device)
    from ..checkpoint.formats.registry import open_checkpoint
    from ..checkpoint.load import locate_on_all_ranks
    from ..checkpoint.locate import locate
    from ..parallel.context import on_all_ranks
    from ..tokenizer import has_tokenizer
    from ..training.session import train

    load = None
    if args.load is not None:
        found = locate_on_all_ranks(args.load, parallel, args.revision)
        opened = on_all_ranks(parallel, lambda: open_checkpoint(found))
        load, config = opened.path, opened.config
    else:
        config = recipe.config if recipe else config_argument(args)
    check_layout(config, tp, pp, parallel.world_size)
    if args.tokenizer is None:
        tokenizer = load if load is not None and has_tokenizer(load) else None
    else:
        tokenizer = on_all_ranks(parallel, lambda: locate(args.tokenizer))
    settings = settings_from(args, config, recipe, load, tokenizer)
    finished = train(settings, parallel, lambda text: print(text, file=sys.stderr, flush=True))
    if finished and parallel.is_leader and settings.save:
        print(settings.save)


def _check_sources(args: argparse.Namespace) -> None:
    given = [name for name in ("preset", "config", "load") if getattr(args, name) is not None]
    if len(given) != 1:
        raise UserError(f"give one of --preset, --config and --load, not {' and '.join(given) or 'none'}")
    if args.bf16 and args.fp16:
        raise UserError("--bf16 and --fp16 exclude each other")
    if args.lora_rank and args.load is None:
        raise UserError("--lora-rank adapts a trained model: give --load")
    if args.lora_target_modules and not args.lora_rank:
        raise UserError("--lora-target-modules is given without --lora-rank")
    if args.revision is not None and args.load is None:
        raise UserError("--revision is given without --load")
    if args.supervised_valid_data and not args.supervised_data:
        raise UserError("--supervised-valid-data is given without --supervised-data")
    if args.supervised_data and args.eval_interval and not args.supervised_valid_data:
        raise UserError("--eval-interval is given, but nothing to validate on: give --supervised-valid-data")
    if (args.valid_data_path or args.supervised_valid_data) and not args.eval_interval:
        raise UserError("validation data are given, but not --eval-interval")
    if args.save is not None and not args.save.strip():
        raise UserError("--save is empty: give a directory")
    if args.seq_length is not None and args.seq_length < 1:
        raise UserError(f"--seq-length is {args.seq_length}, but must be at least 1")
    for name in ("save_interval", "keep_last", "eval_interval", "eval_iters", "exit_iters", "lora_rank"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must not be negative")
    for name in ("log_interval", "max_skipped_iters", "micro_batch_size", "loss_scale_window"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be at least 1")


def _recipe(args: argparse.Namespace) -> Recipe | None:
    if args.preset is None:
        return None
    from ..training.recipe import find_recipe

    return find_recipe(args.preset)


def settings_from(
    args: argparse.Namespace, config: OPTConfig, recipe: Recipe | None, load: Path | None, tokenizer: Path | None
) -> TrainingSettings:
    """The arguments as settings, with the recipe's numbers where none were given.

    Raises:
        UserError: a number is missing or does not make sense.
    """
    import torch

    from ..training.optimizer import OptimizerOptions
    from ..training.schedule import Schedule
    from ..training.session import TrainingSettings
    from ..training.trainer import TrainerOptions

    for name, field in (("hidden_dropout", "dropout"), ("attention_dropout", "attention_dropout")):
        value = getattr(args, name)
        if value is not None:
            if not 0 <= value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}, but must be from 0 up to 1")
            config = config.replace(**{field: value})
    train_iters = _number(args, recipe, "train_iters")
    lr = _number(args, recipe, "lr")
    warmup = args.lr_warmup_iters
    if warmup is None:
        warmup = min(recipe.lr_warmup_iters, train_iters) if recipe else 0
    optimizer = ("weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "skip_grad_norm")
    optimizer += ("initial_loss_scale", "loss_scale_window", "use_distributed_optimizer")
    return TrainingSettings(
        config=config,
        schedule=Schedule(
            lr, lr / 10 if args.min_lr is None else args.min_lr, warmup, train_iters, args.lr_decay_style
        ),
        trainer=TrainerOptions(
            train_iters=train_iters,
            global_batch_size=_number(args, recipe, "global_batch_size"),
            micro_batch_size=args.micro_batch_size,
            seq_length=args.seq_length or config.max_position_embeddings,
            log_interval=args.log_interval,
            eval_interval=args.eval_interval,
            eval_iters=args.eval_iters,
            save_interval=args.save_interval,
            max_skipped_iters=args.max_skipped_iters,
            exit_iters=args.exit_iters,
        ),
        optimizer=OptimizerOptions(**{name: getattr(args, name) for name in optimizer}),
        data=_data(args),
        supervised=_supervised(args),
        load=None if load is None else str(load),
        tokenizer=tokenizer,
        lora=_lora(args),
        dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
        init_std=args.init_method_std,
        seed=args.seed,
        sequence_parallel=args.sequence_parallel,
        recompute=args.recompute_granularity,
        save=None if args.save is None else Path(args.save).expanduser(),
        keep_last=args.keep_last,
        background_saving=not args.no_async_save,
        tensorboard=None if args.tensorboard_dir is None else Path(args.tensorboard_dir),
    )


def _number(args: argparse.Namespace, recipe: Recipe | None, name: str) -> Any:
    value = getattr(args, name)
    if value is None and recipe is not None:
        value = getattr(recipe, name)
    flag = f"--{name.replace('_', '-')}"
    if value is None:
        raise UserError(f"{flag} is missing: only a --preset has one of its own")
    if not value > 0:
        raise UserError(f"{flag} is {value}, but must be positive")
    return value


def _data(args: argparse.Namespace) -> Any:
    from ..data.pretraining_dataset import DataOptions

    if args.data_path is None and args.train_data_path is None:
        return None
    names = ("data_path", "split", "train_data_path", "valid_data_path", "data_cache_path")
    return DataOptions(**{name: getattr(args, name) for name in names})


def _supervised(args: argparse.Namespace) -> SupervisedOptions | None:
    from ..training.session import SupervisedOptions

    if args.supervised_data is None:
        return None
    return SupervisedOptions(tuple(args.supervised_data), tuple(args.supervised_valid_data or ()))


def _lora(args: argparse.Namespace) -> LoRAOptions | None:
    from ..model.lora import LORA_TARGETS, LoRAOptions

    if not args.lora_rank:
        return None
    return LoRAOptions(args.lora_rank, args.lora_alpha, tuple(args.lora_target_modules or LORA_TARGETS))
