"""The options of generation as arguments, and as the `options` of a prompt in a file of JSON lines."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..generation.sampling.sampling_params import SamplingParams
from ..options import options_of

if TYPE_CHECKING:
    from ..generation.generation_config import GenerationConfig


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that the command line or its file of options gives, by SamplingParams' names."""
    declared = {name: one.argument for name, one in options_of(SamplingParams).items() if one.cli}
    return {name: getattr(args, argument) for name, argument in declared.items() if argument in args.given}


def sampling_params(
    given: dict[str, Any], options: dict[str, Any], config: GenerationConfig, where: str
) -> SamplingParams:
    """The parameters of a prompt: its own options first, then those that the command was given, then the model's.

    Raises:
        UserError: an option is unknown, of the wrong kind, or out of its range.
    """
    known = sorted(name for name, declared in options_of(SamplingParams).items() if declared.cli)
    for name in options:
        if name not in known:
            raise UserError(f"{where}: there is no option {name!r}; there are {', '.join(known)}")
    try:
        return SamplingParams(**config.with_defaults(given | options))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
