"""The options of watermarks: how green lists are made, which generation and detection must agree on, and the mark."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import UserError
from ...options import check_ranges, convert_kinds, option, options_of

LEFT_HASH, SELF_HASH = "lefthash", "selfhash"


@dataclass(frozen=True, kw_only=True)
class GreenListOptions:
    """Which ids are green after which tokens (`green_lists.py`).

    Raises:
        UserError: a value is of the wrong kind or out of its range.
    """

    watermark_gamma: float = option(
        0.25,
        help="watermark: the share of the ids that is green after a token",
        above=0,
        below=1,
        api_name="watermark_gamma",
    )
    watermark_key: int = option(
        15485863,
        help="watermark: the secret that green lists are made of; an odd number of its own for each purpose, of which "
        "the lowest 32 bits count; the default is public",
        minimum=1,
        maximum=2**63 - 1,
        must="be from 1 to 2**63 - 1",
        api_name="watermark_key",
    )
    watermark_scheme: str = option(
        LEFT_HASH,
        help="watermark: a list depends on the token before (lefthash), or on the chosen token and those before "
        "(selfhash: 40 lists a token, harder to forge)",
        choices=(LEFT_HASH, SELF_HASH),
        api_name="watermark_scheme",
    )
    watermark_context_width: int = option(
        1,
        help="watermark: tokens that selfhash looks at, the chosen one included; with lefthash, the tokens that must "
        "stand before one that is marked",
        minimum=1,
        maximum=64,
        api_name="watermark_context_width",
    )
    watermark_vocab_size: int | None = option(
        None,
        help="watermark: ids that lists are drawn from, 0 up to this; with another number all lists are others",
        minimum=2,
        default_text="the model's rows, as in transformers; 50265, the tokens of OPT, in the authors' code",
        api_name="watermark_vocab_size",
    )

    def __post_init__(self) -> None:
        convert_kinds(self)
        check_ranges(self)

    def num_listed(self, vocab_size: int) -> int:
        """The ids that lists are drawn from.

        Args:
            vocab_size: the model's rows.
        """
        return self.watermark_vocab_size or vocab_size

    def check_lists(self, vocab_size: int, what: str = "") -> None:
        """Raise UserError unless green lists can be drawn from the ids of a model.

        Args:
            vocab_size: the model's rows.
            what: the first words of the message ("prompt 3: ").
        """
        listed = self.num_listed(vocab_size)
        if listed > vocab_size:
            raise UserError(
                f"{what}watermark_vocab_size is {listed}, but the model has {vocab_size} ids: give at most that"
            )
        if int(listed * self.watermark_gamma) == 0:
            raise UserError(
                f"{what}watermark_gamma is {self.watermark_gamma}, and none of {listed} ids is green: give at least "
                f"{1 / listed:.1g}"
            )


@dataclass(frozen=True, kw_only=True)
class WatermarkOptions(GreenListOptions):
    """A watermark of generated text."""

    watermark_delta: float | None = option(
        None,
        help="watermark: added to the logits of green ids before they are filtered; 0 is off, 2 the usual value",
        minimum=0,
        maximum=100,
        default_text="0",
        must="be from 0 (no watermark) to 100",
        api_name="watermark_delta",
    )

    @property
    def mark(self) -> float:
        """What is added to the logits of green ids; 0 without a watermark."""
        return self.watermark_delta or 0.0

    def check_is_marked(self) -> None:
        """Raise UserError where options of a watermark are given without a delta, so that nothing would be marked."""
        for name, declared in options_of(WatermarkOptions).items():
            value = getattr(self, name)
            if self.watermark_delta is None and value != declared.default:
                raise UserError(
                    f"{name} is {value}, but nothing is marked without watermark_delta: set it too (0 is off)"
                )

    def watermark(self) -> dict[str, object]:
        """The options of the watermark alone, by name."""
        return {name: getattr(self, name) for name in options_of(WatermarkOptions)}


@dataclass(frozen=True, kw_only=True)
class DetectionOptions(GreenListOptions):
    """How a watermark is looked for (`watermark_detector.py`)."""

    ignore_repeated_ngrams: bool = option(
        True,
        help="count each different n-gram once (--no-ignore-repeated-ngrams counts all): text that repeats itself is "
        "otherwise taken for marked",
    )
    z_threshold: float = option(4.0, help="a text counts as marked if its z-score is above this")
