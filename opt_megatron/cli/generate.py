"""opt-megatron generate: continue prompts with a model on any number of ranks."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..generation.engine_options import EngineOptions
from ..generation.sampling.sampling_params import SamplingParams
from ..generation.sampling.watermark_options import WatermarkOptions
from ..options import Options, option
from .arguments import GenerationConfigOptions, ModelOptions, RuntimeOptions
from .engine_options import check_engine_options, engine_options
from .loading import open_model, print_notices, start_ranks
from .option_groups import Groups, add_groups
from .prompts import Prompt, read_prompts
from .sampling import given_options, sampling_params

if TYPE_CHECKING:
    from ..api import OPT
    from ..generation.request import Request
    from ..parallel.context import ParallelContext

HELP = "continue prompts, on one process or under torchrun with tensor and pipeline parallelism"
EXAMPLE = 'opt-megatron generate --load opt-125m --prompt "The capital of France is" --max-new-tokens 20'


@dataclass(frozen=True)
class PromptOptions(Options):
    """The prompts that are continued."""

    prompt: tuple[str, ...] | None = option(None, help="a prompt; repeatable", metavar="TEXT")
    prompt_file: str | None = option(
        None, help="a prompt a line, or JSON lines with 'prompt'", metavar="FILE", is_path=True
    )
    prompt_tokens: tuple[str, ...] | None = option(
        None, help="token ids, used as they are; repeatable; needs no tokenizer", metavar='"2 15 7"'
    )


@dataclass(frozen=True)
class OutputOptions(Options):
    """How the continuations are printed."""

    json: bool = option(False, help="one JSON object a line for each prompt, nothing else")
    stream: bool = option(False, help="print as it is generated")
    interactive: bool = option(False, help="type a text and continue it turn by turn; /help shows the commands")


OPTIONS: Groups = {
    "": (ModelOptions, RuntimeOptions, GenerationConfigOptions),
    "prompts (default: standard input, read like --prompt-file)": (PromptOptions,),
    "watermark": (WatermarkOptions,),
    "sampling and search": (SamplingParams,),
    "engine": (EngineOptions,),
    "output": (OutputOptions,),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_groups(parser, OPTIONS, file=True)


def run(args: argparse.Namespace) -> None:
    """Load, generate, print.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    if args.interactive:
        _check_interactive(args)
    given = given_options(args)
    SamplingParams(**given)  # before torch.distributed starts: mistakes are reported at once
    check_engine_options(args)
    parallel = start_ranks(args, OPTIONS)
    from ..parallel.context import on_all_ranks
    from .output import print_events

    if args.interactive:
        _run_interactive(args, parallel, given)
        return
    opt = _open(args, parallel, engine_options(args), needs_tokenizer=False)
    # The leader alone has the prompts. They are checked before the weights are read.
    prompts, requests = on_all_ranks(
        parallel, lambda: _read_requests(args, given, opt) if parallel.is_leader else ([], [])
    )
    print_notices(args, opt)
    opt.load()
    print_events(opt.engine.generate(requests), prompts, requests, args.json, args.stream)


def _open(args: argparse.Namespace, parallel: ParallelContext, engine: EngineOptions, *, needs_tokenizer: bool) -> OPT:
    use_generation_config = not args.no_generation_config
    return open_model(
        args, parallel, needs_tokenizer=needs_tokenizer, use_generation_config=use_generation_config, engine=engine
    )


def _check_interactive(args: argparse.Namespace) -> None:
    for name in ("prompt", "prompt_file", "prompt_tokens", "json", "stream"):
        if getattr(args, name):
            raise UserError(f"--interactive and --{name.replace('_', '-')} are given; use one of them")


def _run_interactive(args: argparse.Namespace, parallel: ParallelContext, given: dict[str, Any]) -> None:
    from .interactive import run_interactive

    params = SamplingParams(**given)
    num_rows = max(params.num_sampled, params.num_beams)  # the cache need not hold more
    engine = replace(engine_options(args), max_batch_size=min(args.max_batch_size, num_rows))
    opt = _open(args, parallel, engine, needs_tokenizer=True)
    print_notices(args, opt)
    run_interactive(opt.load(), given)


def _read_requests(args: argparse.Namespace, given: dict[str, Any], opt: OPT) -> tuple[list[Prompt], list[Request]]:
    """The prompts, and a request for each, which has been checked against the model."""
    from ..generation.request import check_request

    prompts = read_prompts(args.prompt, args.prompt_file, args.prompt_tokens)
    if prompts[0].text is not None:
        opt.pretrained.require_tokenizer()
    requests = []
    for number, prompt in enumerate(prompts, 1):
        own = sampling_params(given, prompt.options, opt.pretrained.generation_config, f"prompt {number}")
        requests.append(opt.request(prompt.tokens or () if prompt.text is None else prompt.text, own))
        check_request(requests[-1], opt.config, f"prompt {number}")
    return prompts, requests
