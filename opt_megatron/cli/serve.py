"""opt-megatron serve: OpenAI's completions API and a page, on one process or under torchrun."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import ipaddress
import os
import re
import resource
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MissingPackageError, UserError, first_line, print_notice
from ..generation.engine_options import EngineOptions
from ..generation.sampling.watermark_options import WatermarkOptions
from ..options import Options, Size, from_arguments, option
from .arguments import GenerationConfigOptions, ModelOptions, RuntimeOptions
from .engine_options import check_engine_options, engine_options
from .loading import open_model, print_notices, start_ranks
from .option_groups import Groups, add_groups

if TYPE_CHECKING:
    import socket

    from ..generation.core.engine import Engine
    from ..parallel.context import ParallelContext
    from ..serving.async_engine import AsyncEngine
    from ..serving.limits import Limits
    from ..serving.served_model import ServedModel

HELP = "serve a model over HTTP: OpenAI's completions API, metaseq's, and a page to try it in"
EXAMPLE = "opt-megatron serve --load opt-1.3b --port 8000"

_KEY_VARIABLE = "OPT_MEGATRON_API_KEY"
_TORCHRUN_WAITS = 25.0  # seconds: 30 from a signal to SIGKILL, without an option; less the engine's own end
_OTHER_FILES = 256  # checkpoints, pipes, other ranks
_NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


@dataclass(frozen=True)
class ServerOptions(Options):
    """Where the server listens, and under which names."""

    host: str = option("127.0.0.1", help="address to listen on", default_text="127.0.0.1, this machine alone")
    port: int = option(5000, help="port to listen on; 0 picks a free one", minimum=0, maximum=2**16 - 1)
    allowed_hosts: tuple[str, ...] | None = option(
        None,
        help="take requests whose Host is this name, beside localhost and loopback addresses; * takes all; repeatable",
        metavar="NAME",
        default_text="no other on a loopback --host, else all",
    )
    allowed_origins: tuple[str, ...] | None = option(
        None,
        help="let pages of this origin, as https://example.com, send requests from browsers (CORS); * is every origin; "
        "repeatable",
        metavar="ORIGIN",
    )
    served_model_name: tuple[str, ...] | None = option(
        None, help="what clients call the model; repeatable", metavar="NAME"
    )
    api_key: str | None = option(
        None, help=f"clients must send it; better set in {_KEY_VARIABLE}, which other users cannot see", metavar="KEY"
    )


@dataclass(frozen=True)
class LimitOptions(Options):
    """How much a server accepts, and how long it waits."""

    max_queue_length: int = option(
        1024,
        help="continuations that may wait; beyond them a request may add as many as this divided by those that wait",
        minimum=1,
    )
    # More than may wait and run, so that too many requests get 429 and its Retry-After, and not uvicorn's 503.
    max_connections: int = option(2048, help="connections at a time", minimum=1)
    max_body_size: Size = option("2MiB", help="maximum size of a request", metavar="SIZE")
    request_timeout: float = option(600.0, help="seconds for a request, waiting included", above=0, metavar="S")
    shutdown_timeout: float = option(
        20.0,
        help="seconds for running requests when the server shuts down (torchrun allows 30 in all)",
        above=0,
        metavar="S",
    )


_ON_ALL_RANKS: Groups = {"": (ModelOptions, RuntimeOptions, GenerationConfigOptions), "engine": (EngineOptions,)}
OPTIONS: Groups = {
    **_ON_ALL_RANKS,
    "watermark (of every text, and requests cannot change it; without --watermark-delta, each request has its own)": (
        WatermarkOptions,
    ),
    "server": (ServerOptions,),
    "limits": (LimitOptions,),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_groups(parser, OPTIONS, file=True)


def run(args: argparse.Namespace) -> None:
    """Serve until a signal arrives.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    check_engine_options(args)
    _check_origins(args.allowed_origins or ())
    _check_packages()
    _watermark(args)
    limits, key = _limits(args), _api_key(args)
    engines: list[AsyncEngine] = []  # the leader's, once there is one
    parallel = start_ranks(args, _ON_ALL_RANKS, lambda message: _end_engine_or_process(engines, message))
    if parallel.is_leader and "TORCHELASTIC_RUN_ID" in os.environ and args.shutdown_timeout > _TORCHRUN_WAITS:
        print_notice(
            f"--shutdown-timeout {args.shutdown_timeout:g} is more than there will be: torchrun kills its processes "
            "30 s after it is told to end"
        )

    from ..parallel.context import on_all_ranks
    from ..serving.server import ignore_signals

    listener = on_all_ranks(parallel, lambda: _listen(args) if parallel.is_leader else None)
    if listener is not None:
        _lead(args, parallel, listener, limits, key, engines)
        return
    served = _load(args, parallel)
    ignore_signals()
    for _ in served.engine.generate(()):
        raise AssertionError("only the leader gets events")


def _listen(args: argparse.Namespace) -> socket.socket:
    from ..serving.server import bind

    _allow_connections(args.max_connections)
    return bind(args.host, args.port)


def _lead(
    args: argparse.Namespace,
    parallel: ParallelContext,
    listener: socket.socket,
    limits: Limits,
    key: str | None,
    engines: list[AsyncEngine],
) -> None:
    from ..parallel.memory import out_of_memory_message
    from ..serving.app import make_app
    from ..serving.async_engine import AsyncEngine, EngineTimeoutError
    from ..serving.metrics import Metrics
    from ..serving.server import Server, url_of
    from . import exit_now, is_lost_rank

    url = url_of(listener)
    print_notice(f"loading the model, to be served at {url}")
    is_loopback = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    if key is None and not is_loopback:
        print_notice(f"whoever reaches {url} can use it: there is no --api-key")

    layout = f"TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size}"
    name = _names(args)[0]
    async_engine = AsyncEngine(
        lambda: _load(args, parallel),
        limits,
        Metrics(name),
        lambda: print_notice(f"serving {name} ({layout}) at {url}"),
    )
    engines.append(async_engine)
    allowed_hosts = args.allowed_hosts or (() if is_loopback else ("*",))
    app = make_app(async_engine, key, allowed_hosts=allowed_hosts, allowed_origins=args.allowed_origins or ())
    try:
        Server(async_engine, app, args.max_connections).run([listener])
    except (UserError, SystemExit):
        raise
    except KeyboardInterrupt:
        exit_now("interrupted", 130)
    except BaseException as error:
        message = out_of_memory_message(error)
        if message is not None:
            exit_now(message, 2)
        if is_lost_rank(error):
            raise
        if not isinstance(error, EngineTimeoutError):
            traceback.print_exception(error)
        # Not by sys.exit: the engine's thread may wait forever for a rank that was lost without a sign.
        exit_now(f"the engine has stopped: {first_line(error)}", 1)


def _end_engine_or_process(engines: list[AsyncEngine], message: str) -> None:
    """End after a rank was lost: the engine first, if there is one, so that clients get an answer."""
    from . import exit_now

    if not engines:
        exit_now(message, 1)
    engines[0].lose_rank(message)


def _load(args: argparse.Namespace, parallel: ParallelContext) -> ServedModel:
    # On the leader this runs in the engine's thread. Its GPU is the first one, the default of every new thread.
    from ..serving.served_model import ServedModel

    opt = open_model(args, parallel, use_generation_config=not args.no_generation_config, engine=engine_options(args))
    print_notices(args, opt)
    watermark = _watermark(args)
    if watermark.mark > 0:
        watermark.check_lists(opt.config.vocab_size)
    served = ServedModel(
        opt.engine, opt.tokenizer, opt.config, _names(args), opt.pretrained.generation_config, watermark
    )
    if parallel.is_leader:
        print_notice(_describe_cache(opt.engine, parallel))
    # Collections while a large request is parsed would visit every object of the program: 0.8 s instead of 0.2 s.
    gc.freeze()
    return served


def _describe_cache(engine: Engine, parallel: ParallelContext) -> str:
    from ..generation.step import BLOCK_SIZE
    from ..parallel.memory import device_memory

    free = device_memory(parallel.device).free
    tokens, needed = engine.num_cache_blocks * BLOCK_SIZE, engine.kv_cache_bytes
    return (
        f"KV cache of {tokens} tokens: {needed / 1e9:.2f} GB on each rank at most, where {free / 1e9:.2f} GB are free "
        "(--kv-cache-memory, --max-batch-size)"
    )


def _names(args: argparse.Namespace) -> tuple[str, ...]:
    """The names by which clients call the model: by default the last part of --load's path, or its name."""
    if args.served_model_name:
        return tuple(args.served_model_name)
    if args.load is None:
        return ("story",)
    path = Path(args.load)
    return (path.resolve().name if path.exists() else args.load,)


def _limits(args: argparse.Namespace) -> Limits:
    from ..serving.limits import Limits

    return Limits(
        queue_length=args.max_queue_length,
        body_bytes=args.max_body_size,
        request_seconds=args.request_timeout,
        step_seconds=args.step_timeout,
        drain_seconds=args.shutdown_timeout,
    )


def _watermark(args: argparse.Namespace) -> WatermarkOptions:
    watermark = from_arguments(WatermarkOptions, args)
    watermark.check_is_marked()
    return watermark


def _allow_connections(connections: int) -> None:
    """Raise the limit on this process's open files to what `connections` connections need.

    Raises:
        UserError: the system allows less.
    """
    needed = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError, OverflowError):
        raise UserError(
            f"--max-connections is {connections}, and needs {needed} open files, but the system allows this process "
            f"{hard} (ulimit -Hn): give {max(1, hard - _OTHER_FILES)} at the most"
        ) from None


def _api_key(args: argparse.Namespace) -> str | None:
    key = os.environ.get(_KEY_VARIABLE) if args.api_key is None else args.api_key
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise UserError(f"--api-key (or {_KEY_VARIABLE}) is empty or has other characters than ASCII's printable ones")
    return key


def _check_origins(origins: tuple[str, ...]) -> None:
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise UserError(
                f"--allowed-origins is {origin!r}, but must be * or scheme, host and port alone, as https://example.com"
            )


def _check_packages() -> None:
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingPackageError(", ".join(missing), "serving", "serve")
