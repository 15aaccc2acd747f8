"""`SamplingParams`: how one request is continued, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from ...errors import UserError
from ..decoding.stop_strings import compile_pattern

MOST_LOGPROBS = 100
MOST_CONTINUATIONS = 100_000  # of one request
MOST_ROWS = 1024  # beams or candidates of one request, which run at the same time


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued. What each filter does, and in which order, stands in `sampling.py`.

    Attributes:
        max_new_tokens: at most this many tokens are generated; 0, which only scores the prompt, needs `echo`.
        temperature: divides the scores; 0 means greedy.
        top_k: keep the k best tokens, and those that tie with the last of them; 0 keeps all.
        top_p: keep the best tokens until their probabilities reach p, the one that crosses it included.
        repetition_penalty: above 1 makes tokens of the prompt and the continuation less likely.
        seed: of this request's own generator; equal seeds and prompts give equal text.
        stop: strings that end the continuation and are cut off it.
        ignore_eos: go on after an end-of-sequence token.
        log_probabilities: apply the filters to log-probabilities, as FlagAI does, instead of to logits.
        banned_tokens: ids that are never chosen.
        min_p: drop tokens less likely than this share of the best one's probability; 0 keeps all.
        typical_p: keep the tokens whose surprise is nearest to the expected one, until their probabilities reach
            this; 1 keeps all.
        presence_penalty: taken off the score of every token of the output so far.
        frequency_penalty: the same, once for every time that the token stands in the output.
        prompt_presence_penalty, prompt_frequency_penalty: the same two for the tokens of the prompt.
        lambda_decay: below 1 turns top_p into the factual nucleus, which shrinks by this factor at every token of
            a sentence.
        omega_bound: the factual nucleus gets no smaller than this.
        sentence_end_tokens: ids after which the factual nucleus is as large as `top_p` again (those of . ? !).
        min_new_tokens: the end-of-sequence token and `stop_token_ids` are impossible before so many.
        stop_regex: regular expressions (of the `regex` module) that end the continuation as `stop` does.
        stop_token_ids: ids that end the continuation as the end-of-sequence token does.
        include_stop: leave the stop string in the text.
        logit_bias: (id, what is added to its score).
        n: continuations that are returned.
        best_of: continuations that are drawn, of which the n best are returned; None draws n.
        num_beams: above 1 makes it a beam search of this width.
        length_penalty: a beam's log-probability is divided by its length to this power.
        early_stopping: a beam search ends as soon as `num_beams` beams have ended.
        penalty_alpha: above 0 makes it a contrastive search among the `top_k` best tokens; the weight of the
            penalty for being like what stands before.
        logprobs: report the chosen token's log-probability, and those of so many best tokens; None reports none.
        echo: report the prompt as well.

    Values may be of numpy, tuples may be given as lists, one string as itself, and `logit_bias` as a dict.

    Raises:
        UserError: a value is of the wrong kind or out of its range, or options contradict each other.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 1234
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    log_probabilities: bool = False
    banned_tokens: tuple[int, ...] = ()
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    prompt_presence_penalty: float = 0.0
    prompt_frequency_penalty: float = 0.0
    omega_bound: float = 0.0
    lambda_decay: float = 1.0
    sentence_end_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 0
    stop_regex: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    n: int = 1
    best_of: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    penalty_alpha: float = 0.0
    logprobs: int | None = None
    echo: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _KINDS[field.type](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        _check_lengths(self)
        _check_filters(self)
        _check_penalties(self)
        _check_tokens(self)
        _check_stops(self)
        _check_search(self)
        if self.num_beams > 1:
            _refuse_all(self, "num_beams", "beam search", _FOREIGN_TO_BEAMS)
        elif self.penalty_alpha > 0:
            _check_contrastive(self)
        elif self.temperature == 0:
            _check_greedy(self)

    @property
    def is_plain_greedy(self) -> bool:
        """The choice is the best logit, with nothing applied before and nothing else to report."""
        return (
            self.temperature == 0
            and self.num_beams == 1
            and self.penalty_alpha == 0
            and self.logprobs is None
            and not self.changes_scores
        )

    @property
    def changes_scores(self) -> bool:
        """Something besides temperature and the choice of candidates works on the scores."""
        return bool(
            self.logit_bias
            or self.banned_tokens
            or self.min_new_tokens
            or self.repetition_penalty != 1
            or self.counts_output
            or self.counts_prompt
        )

    @property
    def num_drawn(self) -> int:
        """Continuations that are generated, of which `n` are returned."""
        return self.n if self.best_of is None else self.best_of

    @property
    def counts_output(self) -> bool:
        """The output's presence or frequency penalty is in use."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def counts_prompt(self) -> bool:
        """The prompt's presence or frequency penalty is in use."""
        return self.prompt_presence_penalty != 0 or self.prompt_frequency_penalty != 0

    @property
    def needs_history(self) -> bool:
        """The distribution depends on the tokens so far other than through the logits."""
        return bool(
            self.repetition_penalty != 1
            or self.counts_output
            or self.counts_prompt
            or self.min_new_tokens
            or self.lambda_decay < 1
        )


# Options of sampling that are refused where nothing is sampled: name -> the value that leaves it out.
_OF_SAMPLING = {"top_p": 1, "min_p": 0, "typical_p": 1, "lambda_decay": 1, "best_of": None, "echo": False}
_FOREIGN_TO_BEAMS = {"top_k": 0, "penalty_alpha": 0, "logprobs": None, **_OF_SAMPLING}
_FOREIGN_TO_CONTRASTIVE = {"temperature": 1, "n": 1, **_OF_SAMPLING}


def _whole(name: str, value: Any) -> int:
    _check_kind(_is_whole(value), name, value, "a whole number")
    return int(value)


def _whole_or_none(name: str, value: Any) -> int | None:
    return None if value is None else _whole(name, value)


def _number(name: str, value: Any) -> float:
    _check_kind(isinstance(value, Real) and not isinstance(value, bool), name, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        raise UserError(f"{name} is {_shown(value)}, which is more than a number can be") from None
    return value if isinstance(value, int) else number


def _flag(name: str, value: Any) -> bool:
    _check_kind(isinstance(value, bool), name, value, "true or false")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    good = isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
    _check_kind(good, name, value, "a string or a list of strings")
    return tuple(texts)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    good = isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(map(_is_whole, value))
    _check_kind(good, name, value, "a list of ids")
    return tuple(map(int, value))


def _biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        return tuple((_whole(name, token), _number(name, bias)) for token, bias in pairs)
    except (TypeError, ValueError, UserError):
        raise UserError(f"{name} is {_shown(value)}, but must be ids with a number each") from None


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_kind(good: bool, name: str, value: Any, wanted: str) -> None:
    if not good:  # before anything of the value is written: every request makes these checks
        _check(good, name, _shown(value), wanted)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


# By the annotation of a field of SamplingParams: what checks a value and gives it its own type.
_KINDS: dict[str, Callable[[str, Any], Any]] = {
    "int": _whole,
    "int | None": _whole_or_none,
    "float": _number,
    "bool": _flag,
    "tuple[str, ...]": _texts,
    "tuple[int, ...]": _ids,
    "tuple[tuple[int, float], ...]": _biases,
}


def _check_lengths(params: SamplingParams) -> None:
    least = 0 if params.echo else 1
    _check(params.max_new_tokens >= least, "max_new_tokens", params.max_new_tokens, f"at least {least}")
    if params.max_new_tokens == 0:
        for name in ("n", "best_of"):
            value = getattr(params, name)
            _check(value in (None, 1), name, value, "1 where max_new_tokens is 0 and the prompt alone is scored")
    good = 0 <= params.min_new_tokens <= params.max_new_tokens
    wanted = f"from 0 to max_new_tokens, which is {params.max_new_tokens}"
    _check(good, "min_new_tokens", params.min_new_tokens, wanted)
    good = params.logprobs is None or 0 <= params.logprobs <= MOST_LOGPROBS
    _check(good, "logprobs", params.logprobs, f"none, or from 0 (the chosen token's only) to {MOST_LOGPROBS}")


def _check_filters(params: SamplingParams) -> None:
    finite = math.isfinite(params.temperature)
    _check(finite and params.temperature >= 0, "temperature", params.temperature, "0 (greedy) or above")
    _check(params.top_k >= 0, "top_k", params.top_k, "0 (all tokens) or above")
    _check(0 < params.top_p <= 1, "top_p", params.top_p, "above 0 and at most 1")
    _check(0 <= params.min_p <= 1, "min_p", params.min_p, "from 0 (all tokens) to 1")
    _check(0 < params.typical_p <= 1, "typical_p", params.typical_p, "above 0 and at most 1")
    _check(0 <= params.omega_bound <= 1, "omega_bound", params.omega_bound, "from 0 to 1")
    _check(0 < params.lambda_decay <= 1, "lambda_decay", params.lambda_decay, "above 0 and at most 1 (no decay)")


def _check_penalties(params: SamplingParams) -> None:
    finite = math.isfinite(params.repetition_penalty)
    _check(finite and params.repetition_penalty > 0, "repetition_penalty", params.repetition_penalty, "above 0")
    for name in (
        "presence_penalty",
        "frequency_penalty",
        "prompt_presence_penalty",
        "prompt_frequency_penalty",
        "length_penalty",
    ):
        value = getattr(params, name)
        _check(math.isfinite(value), name, value, "a finite number")
    good = 0 <= params.penalty_alpha <= 1
    _check(good, "penalty_alpha", params.penalty_alpha, "from 0 (no contrastive search) to 1")


def _check_tokens(params: SamplingParams) -> None:
    for name in ("banned_tokens", "sentence_end_tokens", "stop_token_ids"):
        tokens = getattr(params, name)
        _check(all(token >= 0 for token in tokens), name, tokens, "made of ids, which are 0 or above")
    biased = [token for token, _ in params.logit_bias]
    good = len(set(biased)) == len(biased) and all(token >= 0 for token in biased)
    _check(good, "logit_bias", params.logit_bias, "made of different ids, which are 0 or above, with a number each")
    good = all(math.isfinite(bias) for _, bias in params.logit_bias)
    _check(good, "logit_bias", params.logit_bias, "made of finite numbers (use banned_tokens to rule a token out)")


def _check_stops(params: SamplingParams) -> None:
    _check(0 <= params.seed < 2**63, "seed", params.seed, "from 0 to 2**63 - 1")
    _check(all(params.stop), "stop", params.stop, "made of strings that are not empty")
    for pattern in params.stop_regex:
        compile_pattern(pattern)


def _check_search(params: SamplingParams) -> None:
    _check(1 <= params.num_beams <= MOST_ROWS, "num_beams", params.num_beams, f"from 1 to {MOST_ROWS}")
    _check(1 <= params.n <= MOST_CONTINUATIONS, "n", params.n, f"from 1 to {MOST_CONTINUATIONS}")
    _check(params.num_drawn >= params.n, "best_of", params.best_of, f"at least n, which is {params.n}")
    _check(params.num_drawn <= MOST_CONTINUATIONS, "best_of", params.best_of, f"at most {MOST_CONTINUATIONS}")
    # So that the longest sequence to this power is still a number.
    _check(-20 <= params.length_penalty <= 20, "length_penalty", params.length_penalty, "from -20 to 20")
    if params.num_beams > 1:
        good = params.n <= params.num_beams
        _check(good, "n", params.n, f"at most num_beams, which is {params.num_beams}, in a beam search")
        good = params.temperature in (0, 1)
        _check(good, "temperature", params.temperature, "0 or 1 in a beam search (num_beams above 1)")


def _check_contrastive(params: SamplingParams) -> None:
    wanted = f"from 2 to {MOST_ROWS} in a contrastive search (penalty_alpha above 0), which chooses among so many"
    _check(2 <= params.top_k <= MOST_ROWS, "top_k", params.top_k, wanted)
    _refuse_all(params, "penalty_alpha", "contrastive search", _FOREIGN_TO_CONTRASTIVE)


def _check_greedy(params: SamplingParams) -> None:
    for name in ("n", "best_of"):
        value = getattr(params, name)
        wanted = "1 at temperature 0, where all samples are equal: raise the temperature"
        _check(value in (None, 1), name, value, wanted)


def _refuse_all(params: SamplingParams, cause: str, what: str, without: dict[str, float | None]) -> None:
    """Options that have no meaning for `what`, which the option `cause` has turned on."""
    for name, value in without.items():
        found = getattr(params, name)
        if found != value:
            raise UserError(
                f"{name} is {found}, but has no meaning in a {what} ({cause} is {getattr(params, cause)}): leave it out"
            )


def _check(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise UserError(f"{name} is {value}, but must be {wanted}")
