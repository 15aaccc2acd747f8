"""Prompts with their answers, one example at a time: JSON lines with `src` and `tgt`, and for classification
`candidates`, one of which is `tgt`.

    {"src": "A fine film. It was", "tgt": " great", "candidates": [" great", " terrible"]}

`src` and each answer are tokenised separately and concatenated, as in supervised fine-tuning (`supervised_dataset.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ..errors import UserError
from ..parallel.context import check_seed
from ..tokenizer import OPTTokenizer
from .fast_encoder import FastEncoder
from .jsonl import BadLines, check_inputs, get_string, get_text, parse_lines, parse_object


class PromptExample(NamedTuple):
    """One example, as ids.

    Attributes:
        prompt: the beginning-of-sequence token and `src`.
        answers: `tgt` with the end-of-sequence token; for classification the candidates, without.
        label: which of the answers is `tgt`.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    label: int


class PromptDataset:
    """Examples by number, shuffled anew in each epoch by seed and epoch alone.

    Where `src` and the longest answer do not fit into `seq_length`, `src` loses its beginning; if the answer alone does
    not fit, the example is skipped.

    Args:
        num_samples: examples of the whole run, over as many epochs as that takes; None: each once, in the files' order.
        has_candidates: read `candidates`; otherwise the one answer is `tgt`.

    Attributes:
        num_examples: number of examples in all files.

    Raises:
        UserError: a file cannot be read, or there is no example that fits.
    """

    def __init__(
        self,
        paths: Sequence[str],
        tokenizer: OPTTokenizer,
        seq_length: int,
        seed: int,
        num_samples: int | None = None,
        *,
        has_candidates: bool = False,
    ) -> None:
        check_seed(seed)
        check_inputs(paths)
        self._encode, self._seq_length = FastEncoder(tokenizer).encode, seq_length
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._num_truncated = self._num_skipped = 0
        self._bad = BadLines()
        parse = self._classification_example if has_candidates else self._example
        self._examples = [example for example in parse_lines(paths, parse, self._bad) if example is not None]
        self.num_examples = len(self._examples)
        if not self._examples:
            raise UserError("; ".join(["there is no example to train on", *self.report()]))
        self._seed, self._is_shuffled = seed, num_samples is not None
        self._length = self.num_examples if num_samples is None else num_samples
        self._epoch, self._order = -1, np.arange(self.num_examples)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> PromptExample:
        if not 0 <= index < self._length:
            raise IndexError(f"example {index} of {self._length}")
        epoch, number = divmod(index, self.num_examples)
        if self._is_shuffled and epoch != self._epoch:
            # RandomState, because numpy guarantees that its sequences never change.
            self._epoch, self._order = epoch, np.random.RandomState([self._seed, epoch]).permutation(self.num_examples)
        return self._examples[self._order[number]]

    def identity(self) -> str:
        """A hash of all examples, as ids."""
        return xxhash.xxh3_128_hexdigest(repr(self._examples).encode())

    def report(self) -> list[str]:
        """Lines for the user on what was skipped or cut; an empty list if nothing was."""
        lines, size = self._bad.report(), self._seq_length
        if self._num_truncated:
            lines.append(f"src was cut at its beginning in {self._num_truncated} examples, to {size} tokens")
        if self._num_skipped:
            lines.append(f"{self._num_skipped} examples were skipped: an answer alone is longer than {size} tokens")
        return lines

    def _example(self, line: bytes) -> PromptExample | None:
        value = parse_object(line)
        source, target = get_string(value, "src"), get_text(value, "tgt")
        return self._fitted(self._encode(source), [[*self._encode(target), self._eos]], 0)

    def _classification_example(self, line: bytes) -> PromptExample | None:
        value = parse_object(line)
        source, target, candidates = get_string(value, "src"), get_text(value, "tgt"), _candidates(value)
        if target not in candidates:
            raise ValueError("'tgt' is none of the 'candidates'")
        answers = [self._encode(candidate) for candidate in candidates]
        return self._fitted(self._encode(source), answers, candidates.index(target))

    def _fitted(self, source: Sequence[int], answers: list[list[int]], label: int) -> PromptExample | None:
        """The example; None if it is too long. The last id of an answer takes no position, the first one BOS takes."""
        room = self._seq_length - max(map(len, answers))
        if room < 0:
            self._num_skipped += 1
            return None
        self._num_truncated += len(source) > room
        kept = source[max(0, len(source) - room) :]
        return PromptExample((self._bos, *kept), tuple(map(tuple, answers)), label)


def _candidates(value: dict[str, Any]) -> list[str]:
    """The texts under `candidates`, without white space at their ends.

    Raises:
        ValueError: they are not two or more different texts.
    """
    candidates = value.get("candidates")
    if not isinstance(candidates, list) or len(candidates) < 2:
        raise ValueError("has no 'candidates', a list of two or more texts")
    texts = [get_text({"candidates": text}, "candidates") for text in candidates]
    if len(set(texts)) < len(texts):
        raise ValueError("has the same text twice in 'candidates'")
    return texts
