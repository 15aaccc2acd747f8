"""opt-megatron generate: continue prompts with a model on any number of ranks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from ..model.linear_methods.registry import quantizations
from .arguments import add_config, add_load, add_runtime
from .engine_options import add_engine, check_engine_options, engine_options
from .loading import open_model, print_notices, start_ranks
from .prompts import Prompt, read_prompts
from .sampling import add_sampling, sampling_params, with_options

if TYPE_CHECKING:
    from ..api import OPT
    from ..generation.request import Request
    from ..generation.sampling.sampling_params import SamplingParams

HELP = "continue prompts, on one process or under torchrun with tensor and pipeline parallelism"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_load(parser, required=False)
    add_config(parser)
    parser.add_argument("--tokenizer", metavar="DIR", help="where the tokenizer's files are; default: --load")
    source = parser.add_argument_group("prompts (default: standard input, read like --prompt-file)")
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeatable")
    source.add_argument("--prompt-file", metavar="FILE", help="a prompt a line, or JSON lines with 'prompt'")
    source.add_argument(
        "--prompt-tokens",
        action="append",
        metavar='"2 15 7"',
        help="token ids, used as they are; repeatable; needs no tokenizer",
    )
    add_sampling(parser)
    engine = parser.add_argument_group("how it runs")
    engine.add_argument(
        "--quantization",
        choices=quantizations(),
        help="8-bit weights, quantised while loading; a quarter of float32's memory",
    )
    add_engine(engine)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object a line for each prompt, nothing else")
    output.add_argument("--stream", action="store_true", help="print as it is generated")
    add_runtime(parser)


def run(args: argparse.Namespace) -> None:
    """Load, generate, print.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    parameters = sampling_params(args)  # before torch.distributed starts: mistakes are reported at once
    check_engine_options(args)
    parallel = start_ranks(args)
    from ..parallel.context import on_all_ranks
    from .output import show

    opt = open_model(args, parallel, needs_tokenizer=False, engine=engine_options(args))
    # The leader alone has the prompts. They are checked before the weights are read.
    read = on_all_ranks(parallel, lambda: _read(args, parameters, opt) if parallel.is_leader else NOTHING)
    print_notices(args, opt)
    opt.load()
    show(opt.engine.generate(read.requests), read.prompts, read.requests, args.json, args.stream)


class Read(NamedTuple):
    """What the leader has read and checked: prompts, and a request for each."""

    prompts: list[Prompt]
    requests: list[Request]


NOTHING = Read([], [])


def _read(args: argparse.Namespace, params: SamplingParams, opt: OPT) -> Read:
    """Read and encode the prompts, and check that the model can run them."""
    from ..generation.request import check_request

    prompts = read_prompts(args.prompt, args.prompt_file, args.prompt_tokens)
    if prompts[0].text is not None:
        opt.pretrained.require_tokenizer()
    requests = []
    for number, prompt in enumerate(prompts, 1):
        own = with_options(params, prompt.options, f"prompt {number}")
        requests.append(opt.request(prompt.tokens or () if prompt.text is None else prompt.text, own))
        check_request(requests[-1], opt.config, f"prompt {number}")
    return Read(prompts, requests)
