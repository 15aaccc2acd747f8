"""opt-megatron generate: continue prompts with a model on any number of ranks."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from .arguments import add_config, add_load, add_runtime, config_argument, say_derived
from .engine_options import add_engine, check_engine_options, make_engine
from .loading import TOY_NOTICE
from .prompts import Prompt, read_prompts
from .sampling import add_sampling, sampling_params, with_options

if TYPE_CHECKING:
    from pathlib import Path

    from ..config import OPTConfig
    from ..generation.request import Request
    from ..generation.sampling.sampling_params import SamplingParams
    from ..tokenizer import OPTTokenizer

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
        choices=("int8",),
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
    from ..parallel.context import check_seed
    from ..parallel.layout import check_layout, world_size_from_environment

    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    check_layout(None, tp, pp, world_size_from_environment(), data_parallel=False)
    check_seed(args.seed)  # all before torch.distributed starts: mistakes are told at once
    parameters = sampling_params(args)
    check_engine_options(args)

    from ..checkpoint.formats.registry import open_checkpoint
    from ..checkpoint.load import load_model, locate_on_all_ranks
    from ..checkpoint.locate import EMBEDDED_NAME
    from ..parallel.context import init_parallel, on_all_ranks
    from .output import show

    parallel = init_parallel(tp, pp, seed=args.seed, device=args.device)
    directory = locate_on_all_ranks(EMBEDDED_NAME if args.load is None else args.load, parallel, args.revision)
    checkpoint = on_all_ranks(parallel, lambda: open_checkpoint(directory, config_argument(args)))
    config = checkpoint.config
    check_layout(config, tp, pp, parallel.world_size)
    read = on_all_ranks(
        parallel, lambda: _read(args, parameters, checkpoint.path, config) if parallel.is_leader else NOTHING
    )
    if args.load is None and parallel.is_leader:
        print(TOY_NOTICE, file=sys.stderr)
    if parallel.is_leader:
        say_derived(checkpoint.config_notes)
    model = load_model(checkpoint, config, parallel, args.dtype, quantization=args.quantization)
    engine = make_engine(args, model, parallel, read.num_tokens)
    show(engine.generate(read.requests), read.prompts, read.requests, args.json, args.stream)


@dataclass(frozen=True)
class Read:
    """What the leader has read and checked.

    Attributes:
        num_tokens: ids from this one on are vocabulary padding.
    """

    prompts: list[Prompt]
    requests: list[Request]
    num_tokens: int | None


NOTHING = Read([], [], None)


def _read(args: argparse.Namespace, params: SamplingParams, directory: Path, config: OPTConfig) -> Read:
    """Read and encode the prompts, and check that the model can run them."""
    from ..generation.request import Request, check_request

    prompts = read_prompts(args.prompt, args.prompt_file, args.prompt_tokens)
    tokenizer = _tokenizer(args, directory, config, needed=prompts[0].text is not None)
    if tokenizer is not None:
        params = replace(params, sentence_end_tokens=tokenizer.sentence_end_tokens())
    requests = []
    for number, prompt in enumerate(prompts, 1):
        tokens = prompt.tokens if prompt.text is None else tuple(tokenizer.encode(prompt.text))
        own = with_options(params, prompt.options, f"prompt {number}")
        requests.append(Request(tokens, own, tokenizer and tokenizer.stream))
        check_request(requests[-1], config, f"prompt {number}")
    num_tokens = config.num_tokens if tokenizer is None else min(config.num_tokens, len(tokenizer))
    return Read(prompts, requests, num_tokens)


def _tokenizer(args: argparse.Namespace, directory: Path, config: OPTConfig, *, needed: bool) -> OPTTokenizer | None:
    from ..pretrained import read_tokenizer

    try:
        return read_tokenizer(args.tokenizer, directory, config)
    except CheckpointError:
        if needed or args.tokenizer is not None:
            raise
        return None  # ids go in, and ids come out
