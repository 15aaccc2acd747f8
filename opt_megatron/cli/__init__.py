"""The `opt-megatron` command: its subcommands, and how errors are reported.

A user's mistake is one line on stderr and exit code 2, a lost rank one line and exit code 1. Heavy modules are
imported only after the arguments have been parsed, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import LaunchError, UserError, first_line, printable
from ..version import __version__
from .option_groups import complete

# Each is a module of this package (with _ for -) with HELP, EXAMPLE, add_arguments and run.
COMMANDS = (
    "generate", "serve", "evaluate", "detect", "logit-lens", "compress", "convert", "inspect", "verify", "plan",
    "preprocess", "train-tokenizer", "train", "plot-training",
)  # fmt: skip
_SECONDS_FOR_THE_LEADER = 10
_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "TCPStore")


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, as other mistakes are, and takes no abbreviations.

    An abbreviation would change its meaning, or end to have one, when an option is added.

    Args:
        example: a command line that --help shows.
    """

    def __init__(self, *, example: str | None = None, **words: Any) -> None:
        if example is not None:
            words |= {"epilog": f"example:\n  {example}", "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**words, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise a UserError, where argparse would print the usage on every rank."""
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a subcommand and end the process with its exit code."""

    def run() -> None:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        arguments.run(arguments)

    run_and_exit("opt-megatron", run)


def run_and_exit(program: str, action: Callable[[], None]) -> NoReturn:
    """Run the action and exit: with code 0, or with one line about the error and its code.

    Args:
        program: the line's first word.
    """
    try:
        action()
        sys.stdout.flush()
        code = 0
    except LaunchError as error:
        code = _report(program, str(error), 2, is_of_this_rank=True)
    except UserError as error:
        code = _report(program, str(error), 2)
    except KeyboardInterrupt:
        code = _report(program, "interrupted", 130)
    except RecursionError:
        code = _report(program, "the input is nested too deeply", 2)
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        code = _report(program, _out_of_memory(error) or f"{name}{error.strerror or error}", 2)
    except (MemoryError, RuntimeError) as error:
        message = _out_of_memory(error)
        if message is None and not is_lost_rank(error):
            raise
        if message is None:
            exit_now(f"rank {_rank()} lost the connection to another rank and stops: {_without_source(error)}", 1)
        code = _report(program, message, 2)
    sys.exit(code)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="opt-megatron", description="Meta's OPT language models on Megatron-core.")
    parser.add_argument("--version", action="version", version=f"opt-megatron {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP, example=module.EXAMPLE)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return complete(parser.parse_args(argv))


def _report(program: str, message: str, code: int, *, is_of_this_rank: bool = False) -> int:
    """Print an error and return the code.

    Args:
        is_of_this_rank: other ranks do not report it. Otherwise all ranks find the same mistake, and the leader reports
            it; another rank only if it finds itself alone with the mistake.
    """
    rank = _rank()
    if rank and not is_of_this_rank and ("torch" in sys.modules or code == 2):
        # torchrun ends all ranks as soon as one fails, so the others must not exit before the leader has printed.
        time.sleep(_SECONDS_FOR_THE_LEADER)
        # Ranks that are connected raise an error on all. Under torchrun this one would have been ended with the leader.
        if _has_other_ranks() and "TORCHELASTIC_RUN_ID" not in os.environ:
            return code
    print(f"{program}: error: {f'rank {rank}: ' if rank else ''}{printable(message)}", file=sys.stderr, flush=True)
    return code


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error means that another rank has ended, which `run_and_exit` reports in one line."""
    is_possible = isinstance(error, RuntimeError) and _has_other_ranks()
    return is_possible and any(sign in str(error) for sign in _LOST_RANK)


def _has_other_ranks() -> bool:
    """Whether this process is connected to other ranks."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1


def exit_now(message: str, code: int) -> NoReturn:
    """Print an error and end the process at once, whatever its threads wait for.

    `sys.exit` would join them: those of a process group that has lost a member may never end.
    """
    print(f"opt-megatron: error: {printable(message)}", file=sys.stderr, flush=True)
    os._exit(code)


def _out_of_memory(error: BaseException) -> str | None:
    from ..parallel.memory import out_of_memory_message

    return out_of_memory_message(error)


def _without_source(error: BaseException) -> str:
    return re.sub(r"^\[[^\]]*\] ", "", first_line(error, 400))[:160]  # without the file and line of gloo's sources


def _rank() -> int:
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0
