"""`SamplingParams`: how one request is continued, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import UserError
from ...options import check_ranges, convert_kinds, option
from .stop_regex import compile_stop_regex
from .watermark_options import WatermarkOptions

MOST_LOGPROBS = 100
MOST_CONTINUATIONS = 100_000  # of one request
MOST_ROWS = 1024  # beams or candidates of one request, which run at the same time


@dataclass(frozen=True)
class SamplingParams(WatermarkOptions):
    """How one request is continued. The processors and their order are in `logits_processors.py`.

    Values may be of numpy, tuples may be given as lists, one string as itself, and `logit_bias` as a dict.

    Raises:
        UserError: a value is of the wrong kind or out of its range, or options contradict each other.
    """

    max_new_tokens: int = option(
        64,
        help="maximum number of new tokens; 0 only scores the prompt (with --echo or --prompt-logprobs)",
        minimum=0,
        api_name="max_tokens",
    )
    min_new_tokens: int = option(
        0,
        help="no end of sequence, no stop token id and no stop string ends the text before it has this many new tokens",
        minimum=0,
        api_name="min_tokens",
    )
    temperature: float = option(
        1.0,
        help="divides the logits; 0 is greedy",
        minimum=0,
        must="be 0 (greedy) or above",
        api_name="temperature",
        api_maximum=100,
    )
    top_k: int = option(
        0,
        help="keep the K most likely tokens, and those tied with the last of them; 0 keeps all",
        minimum=0,
        must="be 0 (all tokens) or above",
        api_name="top_k",
        api_minimum=-1,
    )
    top_p: float = option(
        1.0,
        help="keep the most likely tokens until their probabilities reach P, the one that crosses it included; "
        "0 is greedy",
        minimum=0,
        maximum=1,
        must="be from 0 (greedy) to 1 (all tokens)",
        api_name="top_p",
    )
    min_p: float = option(
        0.0,
        help="drop tokens less likely than this share of the most likely one's probability; 0 keeps all",
        minimum=0,
        maximum=1,
        must="be from 0 (all tokens) to 1",
        api_name="min_p",
    )
    typical_p: float = option(
        1.0,
        help="locally typical sampling: keep the tokens whose surprise is nearest to the expected one, until their "
        "probabilities reach this; 1 keeps all",
        above=0,
        maximum=1,
    )
    repetition_penalty: float = option(
        1.0,
        help="above 1 makes tokens of the prompt and the output less likely; 1 is off",
        above=0,
        api_name="repetition_penalty",
        api_maximum=100,
    )
    presence_penalty: float = option(
        0.0,
        help="subtracted from the score of every token that occurs in the output so far",
        api_name="presence_penalty",
        api_minimum=-2,
        api_maximum=2,
    )
    frequency_penalty: float = option(
        0.0,
        help="subtracted from a token's score once for every time it occurs in the output so far",
        api_name="frequency_penalty",
        api_minimum=-2,
        api_maximum=2,
    )
    prompt_presence_penalty: float = option(
        0.0, help="subtracted from the score of every token that occurs in the prompt", api_minimum=-2, api_maximum=2
    )
    prompt_frequency_penalty: float = option(
        0.0,
        help="subtracted from a token's score once for every time it occurs in the prompt",
        api_minimum=-2,
        api_maximum=2,
    )
    omega_bound: float = option(
        0.0, help="factual nucleus: the smallest value that top-p decays to", minimum=0, maximum=1
    )
    lambda_decay: float = option(
        1.0,
        help="factual nucleus: top-p is multiplied by this at every token of a sentence; 1 is off",
        above=0,
        maximum=1,
        must="be above 0 and at most 1 (no decay)",
    )
    n: int = option(
        1,
        help="continuations per prompt",
        minimum=1,
        maximum=MOST_CONTINUATIONS,
        # torchrun takes --n for an abbreviation of its own options, even behind the script's name.
        flags=("--num-return-sequences", "--n"),
        api_name="n",
        api_maximum=128,
    )
    best_of: int | None = option(
        None,
        help="draw this many continuations and return the n most likely",
        default_text="n",
        maximum=MOST_CONTINUATIONS,
        api_name="best_of",
        api_minimum=0,
        api_maximum=128,
    )
    num_beams: int = option(1, help="beam search with this many beams; 1 is off", minimum=1, maximum=MOST_ROWS)
    # The range is one in which the longest sequence to this power is still a number.
    length_penalty: float = option(
        1.0,
        help="beam search: divide a beam's log-probability by its length to this power",
        minimum=-20,
        maximum=20,
        api_name="length_penalty",
    )
    early_stopping: bool = option(
        False, help="beam search: end as soon as num_beams beams have ended", api_name="early_stopping"
    )
    penalty_alpha: float = option(
        0.0,
        help="contrastive search among the --top-k best: weight of the penalty for similarity to the text so far; "
        "0 is off",
        minimum=0,
        maximum=1,
        must="be from 0 (no contrastive search) to 1",
    )
    logprobs: int | None = option(
        None,
        help="report log-probabilities of the chosen token and of the N most likely ones",
        minimum=0,
        maximum=MOST_LOGPROBS,
        must=f"be none, or from 0 (the chosen token's only) to {MOST_LOGPROBS}",
        api_name="logprobs",
        api_maximum=20,
    )
    logprob_token_ids: tuple[int, ...] = option(
        (),
        help="with --logprobs: report the log-probability of this id instead of those of the most likely ones; "
        "repeatable",
        minimum=0,
        must="be made of ids, which are 0 or above",
        metavar="ID",
        flags=("--logprob-token-id",),
        api_name="logprob_token_ids",
    )
    prompt_logprobs: int | None = option(
        None,
        help="report the prompt's tokens with their log-probabilities, and those of the N most likely ones",
        minimum=0,
        maximum=MOST_LOGPROBS,
        must=f"be none, or from 0 (the prompt's tokens only) to {MOST_LOGPROBS}",
        api_name="prompt_logprobs",
        api_maximum=20,
    )
    echo: bool = option(
        False, help="report the prompt's tokens too, with --logprobs their log-probabilities", api_name="echo"
    )
    seed: int = option(
        1234,
        help="of the request's random numbers: equal seeds and prompts give equal text",
        minimum=-(2**63),
        maximum=2**63 - 1,
        must="be from -2**63 to 2**63 - 1",
        api_name="seed",
    )
    stop: tuple[str, ...] = option((), help="end before TEXT; repeatable", metavar="TEXT", api_name="stop")
    stop_regex: tuple[str, ...] = option(
        (), help="end before a match of PATTERN (of the regex module); repeatable", metavar="PATTERN"
    )
    stop_token_ids: tuple[int, ...] = option(
        (),
        help="end after this id; repeatable",
        minimum=0,
        must="be made of ids, which are 0 or above",
        metavar="ID",
        flags=("--stop-token-id",),
        api_name="stop_token_ids",
    )
    include_stop: bool = option(False, help="leave the stop string in the text", api_name="include_stop_str_in_output")
    ignore_eos: bool = option(False, help="go on after an end-of-sequence token", api_name="ignore_eos")
    skip_special_tokens: bool = option(
        True,
        help="leave special tokens such as </s> out of the text (--no-skip-special-tokens shows them)",
        api_name="skip_special_tokens",
    )
    logit_bias: tuple[tuple[int, float], ...] = option(
        (), help="add X to an id's score; repeatable", metavar="ID=X", api_name="logit_bias"
    )
    allowed_token_ids: tuple[int, ...] = option(
        (),
        help="choose no other id than this; repeatable",
        minimum=0,
        must="be made of ids, which are 0 or above",
        metavar="ID",
        flags=("--allowed-token-id",),
        api_name="allowed_token_ids",
    )
    bad_words: tuple[str, ...] = option(
        (),
        help="do not write TEXT, neither as it is nor with a space before it; repeatable",
        metavar="TEXT",
        flags=("--bad-word",),
        api_name="bad_words",
    )
    # Set by the package: FlagAI's order of filters, and ids that the tokenizer knows.
    log_probabilities: bool = option(
        False, help="apply the filters to log-probabilities, as FlagAI does, instead of to logits", cli=False
    )
    banned_tokens: tuple[int, ...] = option(
        (), help="ids that are never chosen", minimum=0, must="be made of ids, which are 0 or above", cli=False
    )
    bad_word_ids: tuple[tuple[int, ...], ...] = option(
        (), help="sequences of ids whose last one is not chosen after the others (those of bad_words)", cli=False
    )
    begin_suppress_tokens: tuple[int, ...] = option(
        (),
        help="ids that are not chosen as the first new token",
        minimum=0,
        must="be made of ids, which are 0 or above",
        cli=False,
    )
    sentence_end_tokens: tuple[int, ...] = option(
        (),
        help="ids after which the factual nucleus is as large as top-p again (those of . ? !)",
        minimum=0,
        must="be made of ids, which are 0 or above",
        cli=False,
    )

    def __post_init__(self) -> None:
        convert_kinds(self)
        check_ranges(self)
        _check_lengths(self)
        _check_continuations(self)
        _check_biases(self)
        _check_texts(self)
        self.check_is_marked()
        if self.logprob_token_ids:
            _check(self.logprobs is not None, "logprobs", None, "given with logprob_token_ids")
        if self.num_beams > 1:
            _check_beams(self)
        elif self.penalty_alpha > 0:
            _check_contrastive(self)

    @property
    def num_sampled(self) -> int:
        """Continuations that are sampled, of which the `n` best are returned."""
        return self.n if self.best_of is None else self.best_of

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is always chosen, so that several continuations are equal."""
        return self.temperature == 0 or self.top_p == 0

    @property
    def num_prompt_logprobs(self) -> int | None:
        """How many alternatives are reported with every token of the prompt; None where it is not reported."""
        if self.prompt_logprobs is not None:
            return self.prompt_logprobs
        return (self.logprobs or 0) if self.echo else None


# Options of sampling that are refused where nothing is sampled: name -> the value that leaves it out.
_OF_SAMPLING: dict[str, float | None] = {
    "top_p": 1,
    "min_p": 0,
    "typical_p": 1,
    "lambda_decay": 1,
    "best_of": None,
    "echo": False,
    "prompt_logprobs": None,
}
_FOREIGN_TO_BEAMS: dict[str, float | None] = {"top_k": 0, "penalty_alpha": 0, "logprobs": None, **_OF_SAMPLING}
_FOREIGN_TO_CONTRASTIVE: dict[str, float | None] = {"temperature": 1, "n": 1, **_OF_SAMPLING}


def _check_lengths(params: SamplingParams) -> None:
    good = 0 <= params.min_new_tokens <= params.max_new_tokens
    wanted = f"from 0 to max_new_tokens, which is {params.max_new_tokens}"
    _check(good, "min_new_tokens", params.min_new_tokens, wanted)


def _check_continuations(params: SamplingParams) -> None:
    _check(params.num_sampled >= params.n, "best_of", params.best_of, f"at least n, which is {params.n}")


def _check_biases(params: SamplingParams) -> None:
    biased = [token for token, _ in params.logit_bias]
    good = len(set(biased)) == len(biased) and all(token >= 0 for token in biased)
    _check(good, "logit_bias", params.logit_bias, "made of different ids, which are 0 or above, with a number each")
    good = all(math.isfinite(bias) for _, bias in params.logit_bias)
    _check(good, "logit_bias", params.logit_bias, "made of finite numbers (use banned_tokens to rule a token out)")


def _check_texts(params: SamplingParams) -> None:
    for name in ("stop", "bad_words"):
        texts = getattr(params, name)
        _check(all(texts), name, texts, "made of strings that are not empty")
    for pattern in params.stop_regex:
        compile_stop_regex(pattern)


def _check_beams(params: SamplingParams) -> None:
    good = params.n <= params.num_beams
    _check(good, "n", params.n, f"at most num_beams, which is {params.num_beams}, in a beam search")
    good = params.temperature in (0, 1)
    _check(good, "temperature", params.temperature, "0 or 1 in a beam search (num_beams above 1)")
    _check(params.max_new_tokens > 0, "max_new_tokens", 0, "at least 1 in a beam search")
    _refuse_all(params, "num_beams", "beam search", _FOREIGN_TO_BEAMS)


def _check_contrastive(params: SamplingParams) -> None:
    wanted = f"from 2 to {MOST_ROWS} in a contrastive search (penalty_alpha above 0), which chooses among so many"
    _check(2 <= params.top_k <= MOST_ROWS, "top_k", params.top_k, wanted)
    _check(params.max_new_tokens > 0, "max_new_tokens", 0, "at least 1 in a contrastive search")
    _refuse_all(params, "penalty_alpha", "contrastive search", _FOREIGN_TO_CONTRASTIVE)


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
