"""Detection of a watermark: whether a text has more green tokens than chance gives it.

Of T scored tokens, G are green; without a watermark a share `gamma` is expected (Kirchenbauer et al. 2023,
arXiv:2301.10226, equation 3):

    z = (G - gamma T) / sqrt(T gamma (1 - gamma)),    p = P(Z > z) of a normal distribution

The counts and values are those of transformers' `WatermarkDetector`. What is scored are n-grams: the tokens that decide
whether the last of them is green. A text that repeats itself repeats their colours, and would get a high z by chance;
so each different n-gram counts once, unless it is asked for otherwise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import UserError
from .green_lists import GreenLists
from .watermark_options import DetectionOptions


@dataclass(frozen=True)
class WatermarkDetection:
    """What a detector finds in one text.

    Attributes:
        num_scored: T, the n-grams that count.
        num_green: G, those whose last token is green.
        z_score: standard deviations that G is above what chance gives.
        p_value: the probability of such a z, or a higher one, without a watermark.
        is_watermarked: z is above the threshold.
    """

    num_scored: int
    num_green: int
    z_score: float
    p_value: float
    is_watermarked: bool

    @property
    def green_fraction(self) -> float:
        """G / T."""
        return self.num_green / self.num_scored


class WatermarkDetector:
    """Looks for the watermark of one key.

    Args:
        vocab_size: the model's rows.
        bos_token_id: is not scored at the beginning of a text, where generation puts it.

    Raises:
        UserError: the options do not fit the model's ids.
    """

    def __init__(self, options: DetectionOptions, vocab_size: int, bos_token_id: int) -> None:
        options.check_lists(vocab_size)
        self._options, self._bos_token_id = options, bos_token_id
        self._lists = GreenLists(options, vocab_size)

    def detect(self, tokens: Sequence[int], what: str = "the text") -> WatermarkDetection:
        """Score the ids of one text.

        Args:
            what: how messages call it.

        Raises:
            UserError: it has too few tokens.
        """
        tokens = tuple(tokens[1:] if tokens and tokens[0] == self._bos_token_id else tokens)
        size = self._lists.ngram_size
        counts = Counter(tokens[begin : begin + size] for begin in range(len(tokens) - size + 1))
        if not counts:
            raise UserError(
                f"{what} is too short: of {size} tokens, the last can be scored, and it has {len(tokens)} after BOS"
            )
        green = {ngram: count for ngram, count in counts.items() if self._lists.is_green(ngram)}
        if self._options.ignore_repeated_ngrams:
            return self._result(len(counts), len(green))
        return self._result(counts.total(), sum(green.values()))

    def _result(self, num_scored: int, num_green: int) -> WatermarkDetection:
        gamma = self._options.watermark_gamma
        z = (num_green - gamma * num_scored) / math.sqrt(num_scored * gamma * (1 - gamma))
        p = 0.5 * math.erfc(z / math.sqrt(2))
        return WatermarkDetection(num_scored, num_green, z, p, z > self._options.z_threshold)
