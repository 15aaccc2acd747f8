"""The engine's options from the arguments."""

from __future__ import annotations

import argparse

from ..errors import UserError
from ..generation.engine_options import EngineOptions
from ..options import from_arguments


def check_engine_options(args: argparse.Namespace) -> None:
    """Check what needs no model.

    Raises:
        UserError: an option is out of its range, or two exclude each other.
    """
    from ..config import check_dtype

    if args.dtype != "auto":
        check_dtype(args.dtype)
    options = engine_options(args)
    if options.draft_model is not None and options.prompt_lookup:
        raise UserError("--draft-model and --prompt-lookup are given; use one of them")


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """The options that the arguments give.

    Raises:
        UserError: one is out of its range.
    """
    return from_arguments(EngineOptions, args)
