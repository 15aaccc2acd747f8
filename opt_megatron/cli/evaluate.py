"""opt-megatron evaluate: how good a model is, by perplexity or by lm-eval's tasks."""

from __future__ import annotations

import argparse

from . import evaluate_lm_eval, evaluate_perplexity

HELP = "evaluate a model: the perplexity of texts, or lm-eval's tasks; on one process or under torchrun"
EXAMPLE = "opt-megatron evaluate perplexity --load opt-125m --data valid.jsonl"

_KINDS = {"perplexity": evaluate_perplexity, "lm-eval": evaluate_lm_eval}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's own subcommands."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, module in _KINDS.items():
        kind = kinds.add_parser(name, help=module.HELP, description=module.HELP, example=module.EXAMPLE)
        module.add_arguments(kind)


def run(args: argparse.Namespace) -> None:
    """Run the chosen evaluation.

    Raises:
        UserError: of any kind; the same one on every rank.
    """
    _KINDS[args.kind].run(args)
