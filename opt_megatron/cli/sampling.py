"""The options of generation as arguments, and as the `options` of a prompt in a file of JSON lines."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import Any

from ..errors import UserError
from ..generation.sampling.sampling_params import SamplingParams

# Set by other means: FlagAI's order of filters, ids that the tokenizer knows.
_NOT_OPTIONS = {"log_probabilities", "banned_tokens", "sentence_end_tokens"}
# Name, kind, help. Defaults are those of SamplingParams.
_NUMBERS = (
    ("max_new_tokens", int, "new tokens at the most; 0 scores the prompt (with --echo)"),
    ("min_new_tokens", int, "no end of sequence before so many"),
    ("temperature", float, "0 is greedy"),
    ("top_k", int, "keep the K best; 0 keeps all"),
    ("top_p", float, "keep the best until their probabilities reach P"),
    ("min_p", float, "drop what is less likely than this share of the best"),
    ("typical_p", float, "locally typical sampling; 1 keeps all"),
    ("repetition_penalty", float, "above 1: against tokens of prompt and output; 1 is none"),
    ("presence_penalty", float, "taken off tokens of the output"),
    ("frequency_penalty", float, "the same for every occurrence"),
    ("prompt_presence_penalty", float, "taken off tokens of the prompt"),
    ("prompt_frequency_penalty", float, "the same for every occurrence"),
    ("omega_bound", float, "factual nucleus: top-p gets no smaller than this"),
    ("lambda_decay", float, "factual nucleus: top-p shrinks by this at every token of a sentence; 1 is off"),
    ("n", int, "continuations of each prompt"),
    ("best_of", int, "draw so many and keep the n likeliest"),
    ("num_beams", int, "beam search with so many beams; 1 is none"),
    ("length_penalty", float, "beams: divide the score by length to this power"),
    ("penalty_alpha", float, "contrastive search among the --top-k best; 0 is none"),
    ("logprobs", int, "report log-probabilities: of the chosen token, and of the N best"),
)
_FLAGS = (
    ("early_stopping", "beams: end as soon as num_beams have ended"),
    ("include_stop", "leave the stop string in the text"),
    ("ignore_eos", "go on after an end-of-sequence token"),
    ("echo", "report the prompt's tokens too, with --logprobs their log-probabilities"),
)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Declare an argument for every option."""
    group = parser.add_argument_group("sampling and search")
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    for name, kind, text in _NUMBERS:
        known = "" if defaults[name] is None else f"; default: {defaults[name]:g}"
        # torchrun takes --n for an abbreviation of its own options, even behind the script's name.
        flags = ("--num-return-sequences", "--n") if name == "n" else (_flag(name),)
        group.add_argument(
            *flags, dest=name, type=kind, default=defaults[name], metavar="N" if kind is int else "X", help=text + known
        )
    for name, text in _FLAGS:
        group.add_argument(_flag(name), action="store_true", help=text)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    group.add_argument(
        "--stop-regex", action="append", default=[], metavar="PATTERN", help="end before a match; repeatable"
    )
    group.add_argument(
        "--stop-token-id", type=int, action="append", default=[], metavar="ID", help="end after this id; repeatable"
    )
    group.add_argument(
        "--logit-bias", action="append", default=[], metavar="ID=X", help="add X to an id's score; repeatable"
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What the arguments say.

    Raises:
        UserError: a value is out of its range, or options contradict each other.
    """
    values = {name: getattr(args, name) for name, *_ in (*_NUMBERS, *_FLAGS)}
    return SamplingParams(
        **values,
        seed=args.seed,
        stop=tuple(args.stop),
        stop_regex=tuple(args.stop_regex),
        stop_token_ids=tuple(args.stop_token_id),
        logit_bias=tuple(_bias(text) for text in args.logit_bias),
    )


def with_options(params: SamplingParams, options: dict[str, Any], where: str) -> SamplingParams:
    """The parameters with a prompt's own options, under SamplingParams' names, in place of the arguments'.

    Raises:
        UserError: an option is unknown, of the wrong kind, or out of its range.
    """
    known = {field.name: field for field in fields(SamplingParams) if field.name not in _NOT_OPTIONS}
    for name in options:
        if name not in known:
            raise UserError(f"{where}: there is no option {name!r}; there are {', '.join(sorted(known))}")
    try:
        return replace(params, **{name: _plain(name, value) for name, value in options.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _plain(name: str, value: Any) -> Any:
    """JSON's objects have strings as keys."""
    if name == "logit_bias" and isinstance(value, dict):
        return tuple(_bias(f"{token}={number}") for token, number in value.items())
    return value


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise UserError(f"logit bias {text!r} is not an id and a number, as in 262=-5") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
