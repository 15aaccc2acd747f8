"""opt-megatron serve: OpenAI's completions API and a page, on one process or under torchrun."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import math
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..errors import UserError
from .engine_options import add_engine, check_engine_options, engine_options
from .loading import add_model, open_model, print_notices, start_ranks

if TYPE_CHECKING:
    import socket

    from ..parallel.context import ParallelContext
    from ..serving.limits import Limits
    from ..serving.served_model import ServedModel

HELP = "serve a model over HTTP: OpenAI's completions API, metaseq's, and a page to try it in"

_KEY_VARIABLE = "OPT_MEGATRON_API_KEY"
_TORCHRUN_WAITS = 25.0  # seconds: 30 from a signal to SIGKILL, without an option; less the engine's own end
_OTHER_FILES = 256  # checkpoints, pipes, other ranks
_NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_model(parser)
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine alone"
    )
    server.add_argument("--port", type=int, default=5000, help="0 takes a free one; default: 5000")
    server.add_argument(
        "--served-model-name", action="append", metavar="NAME", help="what clients call the model; repeatable"
    )
    server.add_argument(
        "--api-key", metavar="KEY", help=f"clients must show it; better given in {_KEY_VARIABLE}, which nobody sees"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-queue-length", type=int, default=1024, metavar="N", help="continuations that may wait; default: 1024"
    )
    # More than may wait and run, so that too many requests get 429 and its Retry-After, and not uvicorn's 503.
    limits.add_argument("--max-connections", type=int, default=2048, metavar="N", help="at a time; default: 2048")
    limits.add_argument("--max-body-size", default="2MiB", metavar="SIZE", help="of a request; default: 2MiB")
    for name, seconds, text in (
        ("request-timeout", 600, "for a request, waiting included"),
        ("step-timeout", 300, "for a step of the engine, after which a rank counts as lost and the server ends"),
        ("shutdown-timeout", 20, "for what runs when the server is told to end (torchrun allows 30 in all)"),
    ):
        limits.add_argument(
            f"--{name}", type=float, default=float(seconds), metavar="S", help=f"seconds {text}; default: {seconds}"
        )
    add_engine(parser.add_argument_group("engine"))


def run(args: argparse.Namespace) -> None:
    """Serve until a signal comes.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    check_engine_options(args)
    _check_packages()
    limits, key = _limits(args), _api_key(args)
    parallel = start_ranks(args)
    if parallel.is_leader and "TORCHELASTIC_RUN_ID" in os.environ and args.shutdown_timeout > _TORCHRUN_WAITS:
        _say(
            f"--shutdown-timeout {args.shutdown_timeout:g} is more than there will be: torchrun kills its processes "
            "30 s after it is told to end"
        )

    from ..parallel.context import on_all_ranks
    from ..serving.server import ignore_signals

    listener = on_all_ranks(parallel, lambda: _listen(args) if parallel.is_leader else None)
    if listener is not None:
        _lead(args, parallel, listener, limits, key)
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
    args: argparse.Namespace, parallel: ParallelContext, listener: socket.socket, limits: Limits, key: str | None
) -> None:
    from ..serving.app import make_app
    from ..serving.async_engine import AsyncEngine, EngineTimeoutError
    from ..serving.metrics import Metrics
    from ..serving.server import Server, url_of
    from . import is_lost_rank

    url = url_of(listener)
    _say(f"loading the model, to be served at {url}")
    if key is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        _say(f"whoever reaches {url} can use it: there is no --api-key")

    layout = f"TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size}"
    name = _names(args)[0]
    async_engine = AsyncEngine(
        lambda: _load(args, parallel), limits, Metrics(name), lambda: _say(f"serving {name} ({layout}) at {url}")
    )
    try:
        Server(async_engine, make_app(async_engine, key), args.max_connections).run([listener])
    except (UserError, SystemExit):
        raise
    except KeyboardInterrupt:
        _end_now("interrupted", 130)
    except BaseException as error:
        if is_lost_rank(error):
            raise
        if not isinstance(error, EngineTimeoutError):
            traceback.print_exception(error)
        # Not by sys.exit: the engine's thread may wait for ever for a rank that is lost in silence.
        _end_now(f"the engine has stopped: {(str(error).splitlines() or [type(error).__name__])[0][:200]}", 1)


def _load(args: argparse.Namespace, parallel: ParallelContext) -> ServedModel:
    # On the leader this is the engine's thread. Its GPU is the first of its host, which is every thread's own.
    from ..serving.served_model import ServedModel

    opt = open_model(args, parallel, engine=engine_options(args))
    print_notices(args, opt)
    return ServedModel(opt.engine, opt.tokenizer, opt.config, _names(args))


def _names(args: argparse.Namespace) -> tuple[str, ...]:
    """What clients call the model: a path's last part, a name as it is."""
    if args.served_model_name:
        return tuple(args.served_model_name)
    if args.load is None:
        return ("story",)
    path = Path(args.load).expanduser()
    return (path.resolve().name if path.exists() else args.load,)


def _limits(args: argparse.Namespace) -> Limits:
    from ..serving.limits import Limits
    from .arguments import size_in_bytes

    for name in ("max_queue_length", "max_connections"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be at least 1")
    for name in ("request_timeout", "step_timeout", "shutdown_timeout"):
        if not (math.isfinite(getattr(args, name)) and getattr(args, name) > 0):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name):g}, but must be above 0")
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port is {args.port}, but ports go from 0 to 65535")
    return Limits(
        queue_length=args.max_queue_length,
        body_bytes=size_in_bytes(args.max_body_size),
        request_seconds=args.request_timeout,
        step_seconds=args.step_timeout,
        drain_seconds=args.shutdown_timeout,
    )


def _allow_connections(connections: int) -> None:
    """Raise the limit on this process's open files to what so many connections need.

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


def _check_packages() -> None:
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} must be installed for serving: pip install -e '.[serve]'")


def _say(text: str) -> None:
    print(f"opt-megatron: {text}", file=sys.stderr, flush=True)


def _end_now(message: str, code: int) -> NoReturn:
    print(f"opt-megatron: error: {message}", file=sys.stderr, flush=True)
    os._exit(code)
