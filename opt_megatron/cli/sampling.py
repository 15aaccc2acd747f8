"""The options of generation as arguments, and as the `options` of a prompt in a file of JSON lines."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from ..errors import UserError
from ..generation.sampling.sampling_params import SamplingParams
from ..options import from_arguments, options_of


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters that the arguments give.

    Raises:
        UserError: a value is out of its range, or options contradict each other.
    """
    return from_arguments(SamplingParams, args)


def with_options(params: SamplingParams, options: dict[str, Any], where: str) -> SamplingParams:
    """The parameters with a prompt's own options, under SamplingParams' names, in place of the arguments'.

    Raises:
        UserError: an option is unknown, of the wrong kind, or out of its range.
    """
    known = sorted(name for name, declared in options_of(SamplingParams).items() if declared.cli)
    for name in options:
        if name not in known:
            raise UserError(f"{where}: there is no option {name!r}; there are {', '.join(known)}")
    try:
        return replace(params, **options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
