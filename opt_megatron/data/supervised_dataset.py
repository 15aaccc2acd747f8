"""Examples for supervised fine-tuning, packed into rows: JSON lines with `src` and `tgt`, or with `text`.

    example        </s> src ... tgt ... </s>           loss on tgt and the last </s>
    row (s = 8)    tokens     </s> a b C  D    </s> e F     segment_ids  1 1 1 1 1 2 2 2
                   labels     a    b C D  </s> e    F </s>  position_ids 0 1 2 3 4 0 1 2
                   loss_mask  0    0 1 1  1    0    1 1

`src` and `tgt` are tokenised separately and concatenated, so that the ids of `src` are those of a prompt when the
model is used; a space between them belongs to the beginning of `tgt`. White space at the end of `tgt` and `text`
is removed, as in pre-training.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import xxhash

from ..errors import UserError
from ..parallel.context import check_seed
from ..tokenizer import OPTTokenizer
from .fast_encoder import FastEncoder
from .jsonl import BadLines, check_inputs, get_string, get_text, parse_lines, parse_object

_OPEN_ROWS = 64  # rows that an example can still be added to
_PAD_TOKEN, _DEFAULT_PAD = "<pad>", 1


class SupervisedDataset(torch.utils.data.Dataset):
    """Rows by number: tokens, labels, position_ids, segment_ids (int64) and loss_mask (float32), each [s].

    Segments are numbered from 1 in each row, and 0 is padding; attention must stay inside a segment, and
    positions start at 0 in each. Each epoch shuffles the examples, by seed and epoch alone, and packs them: an
    example is added to the first open row with room for it; if there is none, a new row is opened, and the fullest
    is closed when more than 64 are open. The rows of an epoch are shuffled, too.

    Examples that are too long: `src` loses its beginning (after the first `</s>`); if `tgt` alone does not fit, the
    example is skipped; a `text` is split into several examples.

    Args:
        num_samples: rows of the whole run, over as many epochs as that takes; default: one epoch.
        pack: False gives each example a separate row.
        strict: a bad line is an error; otherwise it is skipped.

    Attributes:
        num_examples: number of examples in all files.
        num_truncated, num_skipped: number of examples whose `src` was cut, and that were skipped, for their length.
        num_split: number of texts that became several examples.
        bad: the lines that hold no example.

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
        pack: bool = True,
        *,
        strict: bool = False,
    ) -> None:
        check_seed(seed)
        check_inputs(paths)
        if seq_length < 2:
            raise UserError(f"--seq-length is {seq_length}, but an example needs at least 2")
        self._seq_length, self._seed, self._pack = seq_length, seed, pack
        self._pad = tokenizer.get_vocab().get(_PAD_TOKEN, _DEFAULT_PAD)
        reader = _ExampleReader(tokenizer, seq_length)
        self.bad = BadLines()
        self._examples = reader.read(paths, self.bad, strict)
        self.num_examples = len(self._examples.lengths)
        self.num_truncated, self.num_skipped = reader.num_truncated, reader.num_skipped
        self.num_split = reader.num_split
        if not self.num_examples:
            raise UserError("; ".join(["there is no example to train on", *self.report()]))
        self._starts = [0]  # number of the first row of each epoch packed so far, and of the next epoch
        self._epoch, self._rows = -1, [np.zeros(0, np.int64)]
        self._length = len(self._rows_of(0)) if num_samples is None else num_samples

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        while self._starts[-1] <= index:  # epochs differ in length, so each must be packed once
            self._rows_of(len(self._starts) - 1)
        epoch = bisect_right(self._starts, index) - 1
        return self._row(self._rows_of(epoch)[index - self._starts[epoch]])

    def identity(self) -> str:
        """A hash of all examples, as ids."""
        digest = xxhash.xxh3_128(self._examples.ids.data)
        digest.update(self._examples.starts.data)
        digest.update(self._examples.prompts.data)
        return digest.hexdigest()

    def report(self) -> list[str]:
        """Lines for the user on what was skipped or cut; an empty list if nothing was."""
        lines = self.bad.report()
        if self.num_truncated:
            lines.append(f"src was cut at its beginning in {self.num_truncated} examples, to {self._seq_length} tokens")
        if self.num_split:
            lines.append(f"{self.num_split} texts were split into examples of {self._seq_length} tokens")
        if self.num_skipped:
            lines.append(
                f"{self.num_skipped} examples were skipped: tgt alone is longer than {self._seq_length} tokens"
            )
        return lines

    def _rows_of(self, epoch: int) -> list[np.ndarray]:
        """The numbers of the examples in each row of an epoch."""
        if epoch != self._epoch:
            # RandomState, because numpy guarantees that its sequences never change.
            random = np.random.RandomState([self._seed, epoch])
            order = random.permutation(self.num_examples)
            rows = first_fit(order, self._examples.lengths, self._seq_length) if self._pack else list(order[:, None])
            self._epoch, self._rows = epoch, [rows[n] for n in random.permutation(len(rows))]
            if epoch == len(self._starts) - 1:
                self._starts.append(self._starts[-1] + len(rows))
        return self._rows

    def _row(self, numbers: np.ndarray) -> dict[str, torch.Tensor]:
        size = self._seq_length
        tokens, labels = np.full(size, self._pad), np.full(size, self._pad)
        positions, segments = np.zeros(size, np.int64), np.zeros(size, np.int64)
        loss = np.zeros(size, np.float32)
        begin = 0
        for segment, number in enumerate(numbers, 1):
            ids, prompt = self._examples[number]
            end = begin + len(ids) - 1
            tokens[begin:end], labels[begin:end] = ids[:-1], ids[1:]
            positions[begin:end], segments[begin:end] = np.arange(end - begin), segment
            loss[begin + prompt : end] = 1
            begin = end
        arrays = (tokens, labels, loss, positions, segments)
        names = ("tokens", "labels", "loss_mask", "position_ids", "segment_ids")
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def first_fit(order: np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Pack examples into rows: each, in this order, into the first open row with room (see SupervisedDataset).

    Args:
        order: numbers of the examples.
        lengths: number of positions of each example, at most `capacity`.

    Returns:
        For each row the numbers of its examples, whose lengths add up to at most `capacity`.
    """
    rows: list[list[int]] = []
    opened: list[int] = []  # numbers of the open rows, oldest first
    room = np.zeros(0, np.int64)  # positions left in each of them
    for example in order:
        fitting = np.flatnonzero(room >= lengths[example])
        if len(fitting):
            row = fitting[0]
        else:
            if len(opened) == _OPEN_ROWS:
                fullest = int(room.argmin())
                del opened[fullest]
                room = np.delete(room, fullest)
            row = len(opened)
            opened.append(len(rows))
            room = np.append(room, capacity)
            rows.append([])
        rows[opened[row]].append(example)
        room[row] -= lengths[example]
    return [np.array(row) for row in rows]


@dataclass(frozen=True)
class _Examples:
    ids: np.ndarray  # int32, all examples concatenated, each with BOS and the last label
    starts: np.ndarray  # int64 [n + 1]
    prompts: np.ndarray  # int64 [n], number of labels without loss at the beginning of each

    @property
    def lengths(self) -> np.ndarray:
        """Number of positions of each example in a row; its last id is only a label."""
        return np.diff(self.starts) - 1

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        return self.ids[self.starts[number] : self.starts[number + 1]], int(self.prompts[number])


class _ExampleReader:
    """Turns lines into examples of at most `seq_length` positions."""

    def __init__(self, tokenizer: OPTTokenizer, seq_length: int) -> None:
        self.num_truncated = self.num_skipped = self.num_split = 0
        self._encode = FastEncoder(tokenizer).encode
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._seq_length = seq_length

    def read(self, paths: Sequence[str], bad: BadLines, strict: bool) -> _Examples:
        ids, ends, prompts = [np.zeros(0, np.int32)], [0], []
        for examples in parse_lines(paths, self._examples_of_line, bad, strict=strict):
            for example, prompt in examples:
                ids.append(np.array(example, np.int32))
                ends.append(ends[-1] + len(example))
                prompts.append(prompt)
        return _Examples(np.concatenate(ids), np.array(ends), np.array(prompts, np.int64))

    def _examples_of_line(self, line: bytes) -> list[tuple[list[int], int]]:
        return list(self._examples_of(parse_object(line)))

    def _examples_of(self, value: dict[str, Any]) -> Iterator[tuple[list[int], int]]:
        if "src" in value or "tgt" in value:
            source, target = get_string(value, "src"), get_text(value, "tgt")
            yield from self._pair(self._encode(source), [*self._encode(target), self._eos])
        elif "text" in value:
            yield from self._pieces([*self._encode(get_text(value, "text")), self._eos])
        else:
            raise ValueError("has neither 'src' and 'tgt' nor 'text'")

    def _pair(self, source: list[int], target: list[int]) -> Iterator[tuple[list[int], int]]:
        room = self._seq_length - len(target)  # for src: BOS takes a position, the last </s> is only a label
        if room < 0:
            self.num_skipped += 1
            return
        if len(source) > room:
            self.num_truncated += 1
            source = source[len(source) - room :]
        yield [self._bos, *source, *target], len(source)

    def _pieces(self, labels: list[int]) -> Iterator[tuple[list[int], int]]:
        self.num_split += len(labels) > self._seq_length
        remaining = iter(labels)
        while piece := list(islice(remaining, self._seq_length)):
            yield [self._bos, *piece], 0
