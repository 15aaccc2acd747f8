"""Options declared once: arguments, kinds and ranges are made from a dataclass's fields."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from opt_megatron.cli.option_groups import add_groups, complete
from opt_megatron.errors import UserError
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.options import Options, Size, from_arguments, option, options_of


@dataclass(frozen=True)
class Command(Options):
    """One option of each sort."""

    count: int = option(3, help="how many", minimum=1)
    share: float = option(0.5, help="100% is 1", above=0, below=1)
    names: tuple[str, ...] | None = option(None, help="files", nargs="+", metavar="FILE")
    ids: tuple[int, ...] = option((), help="ids", minimum=0)
    memory: Size | None = option(None, help="at the most", default_text="what is needed")
    style: str = option("a", help="one of two", choices=("a", "b"))
    loud: bool = option(False, help="say more")
    rank: int = option(0, help="of the factors", minimum=0, argument="lora_rank", must="not be negative")
    made: int = option(7, help="set by the package", cli=False)


def parse(*words: str) -> Command:
    """The options of a command line."""
    parser = argparse.ArgumentParser()
    add_groups(parser, {"": (Command,)})
    return from_arguments(Command, complete(parser.parse_args(words)))


def test_a_command_line_gives_the_dataclass() -> None:
    assert parse() == Command()
    words = "--count 4 --share 0.25 --names a b --ids 1 --ids 2 --memory 2GB --style b --loud --lora-rank 8"
    assert parse(*words.split()) == Command(4, 0.25, ("a", "b"), (1, 2), 2_000_000_000, "b", True, 8)


def test_help_has_metavars_and_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_groups(parser, {"": (Command,)})
    text = " ".join(parser.format_help().split())
    for part in ("--count N how many; default: 3", "100% is 1; default: 0.5", "at the most; default: what is needed"):
        assert part in text
    assert "--loud say more" in text and "--made" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count is 0, but must be at least 1"),
        ({"count": 1.5}, "count is 1.5, but must be a whole number"),
        ({"count": None}, "count is None, but must be a whole number"),
        ({"share": 1.0}, "share is 1.0, but must be above 0 and below 1"),
        ({"share": float("nan")}, "share is nan"),
        ({"ids": [3, -1]}, "ids is (3, -1), but must be at least 0"),
        ({"memory": "2 parsecs"}, "'2 parsecs' is not a size"),
        ({"memory": True}, "memory is True, but must be a size"),
        ({"style": "c"}, "style is c, but must be one of a, b"),
        ({"rank": -1}, "rank is -1, but must not be negative"),
        ({"loud": 1}, "loud is 1, but must be true or false"),
    ],
)
def test_kinds_and_ranges_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Command(**options)
    assert message in str(caught.value)


def test_bounds_are_named_as_pydantic_names_them() -> None:
    declared = options_of(SamplingParams)
    assert declared["typical_p"].bounds() == {"gt": 0, "le": 1}
    assert declared["top_k"].bounds() == {"ge": 0} and declared["top_k"].bounds(api=True) == {"ge": -1}
    assert declared["max_new_tokens"].api_name == "max_tokens"
    assert declared["repetition_penalty"].bounds(api=True) == {"gt": 0, "le": 100}


def test_declaring_options_imports_no_torch() -> None:
    code = "import sys, opt_megatron.cli.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
