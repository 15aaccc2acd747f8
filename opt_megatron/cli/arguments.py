"""Options that several subcommands share, under Megatron-LM's names."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, print_notice
from ..model.linear_methods.registry import group_sizes, quantization_help, quantizations
from ..options import Options, option

if TYPE_CHECKING:
    from ..config import OPTConfig

_FORMATS = (
    "a checkpoint in any format (Hugging Face, Megatron, metaseq, FlagAI, a training run), a name (opt-125m ... story) "
    "or a Hub repository (owner/name)"
)


@dataclass(frozen=True, kw_only=True)
class LoadOptions(Options):
    """Which checkpoint a command reads."""

    load: str | None = option(
        None, help=_FORMATS, metavar="CHECKPOINT", default_text="the embedded toy model, story", is_path=True
    )
    revision: str | None = option(None, help="branch, tag or commit of a Hub repository")
    adapter: str | None = option(
        None,
        help="an adapter of peft (LoRA) that is added to the weights: a directory or a Hub repository",
        metavar="DIR",
        is_path=True,
    )


@dataclass(frozen=True, kw_only=True)
class RequiredLoadOptions(LoadOptions):
    """Which checkpoint a command reads; there is no default."""

    load: str = option(help=_FORMATS, metavar="CHECKPOINT", required=True, is_path=True)


@dataclass(frozen=True, kw_only=True)
class ModelConfigOptions(Options):
    """An architecture that replaces the checkpoint's."""

    model_config: str | None = option(
        None,
        help="a config.json (or its directory) to use instead of the checkpoint's own",
        metavar="FILE",
        is_path=True,
    )
    activation: str | None = option(
        None, help="state that the model has OPT's activation, where its files cannot say it", choices=("relu",)
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(ModelConfigOptions, LoadOptions):
    """Which model a command runs."""

    tokenizer: str | None = option(
        None, help="where the tokenizer's files are", metavar="DIR", default_text="--load", is_path=True
    )


@dataclass(frozen=True, kw_only=True)
class GenerationConfigOptions(Options):
    """Whether the checkpoint says how texts are generated."""

    no_generation_config: bool = option(
        False,
        help="leave out the checkpoint's generation_config.json: its ends of a text, suppressed tokens and defaults",
    )


@dataclass(frozen=True, kw_only=True)
class LayoutOptions(Options):
    """Over how many ranks a model is divided, and when one of them counts as lost."""

    tensor_model_parallel_size: int = option(1, help="ranks that share each layer", metavar="T")
    pipeline_model_parallel_size: int = option(1, help="stages, each with a part of the layers", metavar="P")
    step_timeout: float = option(
        300.0,
        help="seconds without a sign of life from a rank (in serve also: for a step of the engine), after which it "
        "counts as lost and the others end",
        above=0,
        metavar="S",
    )


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(LayoutOptions):
    """Where and how a model runs."""

    dtype: str = option(
        "auto", help="float32, float16, bfloat16 or auto (the checkpoint's; on a CPU computed in float32)"
    )
    device: str | None = option(
        None, help="device to run on", choices=("cpu", "cuda"), default_text="cuda where there is one"
    )
    seed: int = option(1234, help="seed of all random choices")
    quantization: str | None = option(None, help=quantization_help(), choices=quantizations())
    group_size: int | None = option(
        None,
        help="inputs that share a scale in --quantization int4; smaller ones are more accurate and take more memory",
        choices=group_sizes(),
        default_text="128",
    )


@dataclass(frozen=True, kw_only=True)
class JsonLinesOptions(Options):
    """The texts that a command reads."""

    input: tuple[str, ...] = option(
        help="JSON lines, one object a line; also .gz", nargs="+", metavar="FILE", required=True, is_path=True
    )
    json_key: str = option("text", help="the text's key in each object", metavar="KEY")
    strict: bool = option(False, help="stop at the first bad line; default: skip and report them")


def config_argument(args: argparse.Namespace) -> OPTConfig | None:
    """The config that --model-config names, or None."""
    if args.model_config is None:
        return None
    from ..config import OPTConfig

    return OPTConfig.from_path(Path(args.model_config))


def print_config_notes(notes: list[str], args: argparse.Namespace) -> None:
    """Print which values of the config were inferred because the files do not contain them.

    Args:
        args: with `--activation` among them, which states what is assumed otherwise.
    """
    from ..checkpoint.formats.infer_config import ACTIVATION_IS_ASSUMED

    for note in notes:
        if note != ACTIVATION_IS_ASSUMED or args.activation is None:
            print_notice(f"no config.json: {note}")


def check_picture(output: Path, force: bool) -> None:
    """Raise UserError unless --output names a PNG that can be written; before the work that it shows."""
    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: is drawn as a PNG; end its name with .png")
    if output.exists() and not force:
        raise UserError(f"--output {output}: is there already; --force replaces it")
