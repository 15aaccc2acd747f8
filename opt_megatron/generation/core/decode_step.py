"""Steps in which every sequence decodes one token: their state stays on the device from one step to the next.

For the same sequences as in the step before, nothing is sent to the device and nothing waits for it: each row's newest
token, position and random number are there. When the sequences change, all of them are described in one transfer.
Between two changes the steps of a batch are the same operations on the same memory, so that CUDA graphs can replay them
(`cuda_graphs.py`); for that, batches are filled up to a few sizes with rows that write into a block of no sequence.

B = rows, K = blocks of the longest sequence, both of the chosen size; V = vocabulary, H = hidden size.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...model.incremental_forward import IncrementalForward
from ...parallel.context import ParallelContext
from ..sampling.batch_sampler import GREEDY, SamplingRow, SamplingTensors, green_bits_of_rows
from ..step import BLOCK_SIZE, NEWEST, ScheduledSequence, StepInput, sampling_numbers
from .cuda_graphs import CudaGraphs
from .packed_upload import upload, upload_tensor
from .paged_kv_cache import PagedKVCache
from .stage_transfer import StageTransfer
from .token_chooser import TokenChooser

MAX_ROWS = 1024  # of a step whose state is kept; one row takes some 600 bytes
_SIZES = (
    *(1, 2, 4, 8),
    *range(16, 64, 8),
    *range(64, 128, 16),
    *range(128, 256, 32),
    *range(256, 512, 64),
    *range(512, MAX_ROWS, 128),
    MAX_ROWS,
)
_NUMBERS = 64  # random numbers of a row that are made at a time
_FIELDS = 4 + len(SamplingRow._fields)  # first block, position, token, increment, and the options


class DecodeState:
    """What a step needs to know about its rows; the same on every rank.

    Args:
        unused_block: of the cache, where rows without a sequence write.
        chooses: the next tokens are chosen on this rank.

    Attributes:
        first_blocks, positions, increments: [MAX_ROWS] int64; a row without a sequence stays at position 0.
        sampling: [MAX_ROWS] each; has no meaning if all rows are greedy.
        has_sampled: some row is not greedy.
        has_watermark: some row has a watermark; its newest token must be known to the leader (`SamplingGroup`).
    """

    def __init__(self, unused_block: int, vocab_size: int, device: torch.device, *, chooses: bool) -> None:
        self._chooses = chooses
        self._device, self._unused_block, self._vocab_size = device, unused_block, vocab_size
        self._fields = torch.zeros(_FIELDS, MAX_ROWS, dtype=torch.int64, device=device)
        self.first_blocks, self.positions, self._given, self.increments = self._fields[:4]
        self.sampling = SamplingTensors.of(self._fields[4:], vocab_size)
        self.has_sampled = self.has_watermark = False
        self._green = torch.zeros(0, -(-vocab_size // 8), dtype=torch.uint8, device=device)
        self._offsets = torch.arange(1, _NUMBERS + 1, device=device)
        self._numbers = torch.zeros(MAX_ROWS, _NUMBERS, dtype=torch.float64, device=device)
        self._next_number = torch.zeros(1, dtype=torch.int64, device=device)
        self._num_numbers_left = 0

    def prepare(self, step: StepInput, previous: StepInput | None, num_rows: int, newest: Tensor) -> None:
        """Describe the rows of `step`, unless they are those of `previous`, one token later.

        Args:
            num_rows: B.
            newest: the token of each sequence, at its first block; those that the step brings are written into it.
        """
        if not step.continues(previous):
            self._describe(step.sequences, num_rows, newest)
        if self.has_sampled and self._num_numbers_left == 0:
            self._make_numbers(num_rows)
        self._num_numbers_left -= 1

    def _describe(self, sequences: tuple[ScheduledSequence, ...], num_rows: int, newest: Tensor) -> None:
        options = [GREEDY if sequence.sampling is None else sequence.sampling for sequence in sequences]
        self.has_sampled = any(row != GREEDY for row in options)
        rows = [
            [sequence.blocks.start // BLOCK_SIZE, sequence.position, sequence.tokens[0], 1, *sampling_numbers(row)]
            for sequence, row in zip(sequences, options, strict=True)
        ]
        rows += [[self._unused_block, 0, 0, 0, *sampling_numbers(GREEDY)]] * (num_rows - len(rows))
        (packed,) = upload(self._device, [number for row in rows for number in row])
        self._fields[:, :num_rows] = packed.view(num_rows, _FIELDS).T
        if self.has_sampled:
            given_options = SamplingTensors.of(self._fields[4:, :num_rows], self._vocab_size)
            for values, given in zip(self.sampling.first(num_rows), given_options, strict=True):
                values.copy_(given)
        self._describe_green_lists(options, [sequence.tokens[0] for sequence in sequences])
        first_blocks, given = self.first_blocks[:num_rows], self._given[:num_rows]
        newest[first_blocks] = torch.where(given == NEWEST, newest[first_blocks], given)
        self._num_numbers_left = 0

    def _describe_green_lists(self, rows: list[SamplingRow], newest: list[int]) -> None:
        if not self._chooses:
            return
        green = green_bits_of_rows(rows, newest, self._vocab_size)
        self.has_watermark = green is not None
        if green is not None:
            if not len(self._green):  # 6 MB for OPT, which most programs do not need
                self._green = self._green.new_zeros(MAX_ROWS, self._green.size(1))
            self._green[: len(rows)] = upload_tensor(self._device, green)

    def green(self, num_rows: int) -> Tensor | None:
        """The green lists of this step, [B, ceil(V / 8)] uint8, where there is a watermark."""
        return self._green[:num_rows] if self.has_watermark else None

    def _make_numbers(self, num_rows: int) -> None:
        positions = self.positions[:num_rows, None] + self._offsets
        self._numbers[:num_rows] = self.sampling.first(num_rows).numbers(positions)
        self._next_number.zero_()
        self._num_numbers_left = _NUMBERS

    def numbers(self, num_rows: int) -> Tensor:
        """The random numbers of this step, [B] float64."""
        return self._numbers[:num_rows].index_select(1, self._next_number).squeeze(1)

    def advance(self, num_rows: int) -> None:
        """Go on to the next token of every row."""
        self.positions[:num_rows] += self.increments[:num_rows]
        if self.has_sampled:
            self._next_number += 1


class DecodeStep:
    """Runs steps that `StepInput.is_decoding`, of at most MAX_ROWS rows.

    Args:
        newest: [blocks + 1] int64, each sequence's newest token at its first block.
        graphs: None to run every step as it is.
    """

    def __init__(
        self,
        model: IncrementalForward,
        cache: PagedKVCache,
        newest: Tensor,
        chooser: TokenChooser,
        transfer: StageTransfer,
        parallel: ParallelContext,
        graphs: CudaGraphs | None,
    ) -> None:
        self._model, self._cache, self._newest = model, cache, newest
        self._chooser, self._transfer, self._parallel = chooser, transfer, parallel
        self._graphs = graphs
        self._state = DecodeState(
            cache.scratch_block, chooser.vocab_size, parallel.device, chooses=parallel.is_last_stage
        )
        self._previous: StepInput | None = None  # the last step, if it was run here

    def forget(self) -> None:
        """Another kind of step has been run."""
        self._previous = None

    def forward(self, step: StepInput) -> Tensor:
        """The next token of every sequence, [sequences] int64; on ranks that do not get them without meaning."""
        num_rows, num_blocks = self._sizes(step.sequences)
        self._state.prepare(step, self._previous, num_rows, self._newest)
        self._previous = step
        run = partial(self._run, num_rows, num_blocks)
        if self._graphs is None:
            tokens = run()
        else:
            tokens = self._graphs.run((num_rows, num_blocks, self._state.has_sampled, self._state.has_watermark), run)
        return tokens[: len(step.sequences)]

    def _sizes(self, sequences: tuple[ScheduledSequence, ...]) -> tuple[int, int]:
        """B and K; for graphs the next larger ones of a few."""
        num_rows = len(sequences)
        num_blocks = max([sequence.position for sequence in sequences]) // BLOCK_SIZE + 1
        if self._graphs is None:
            return num_rows, num_blocks
        most = min(self._cache.scratch_block + 1, 1 << (num_blocks - 1).bit_length())
        return next(size for size in _SIZES if size >= num_rows), most

    def _run(self, num_rows: int, num_blocks: int) -> Tensor:
        state = self._state
        first_blocks, positions = state.first_blocks[:num_rows], state.positions[:num_rows]
        self._cache.prepare_decode(first_blocks, positions, num_blocks)
        if self._parallel.is_first_stage:
            hidden = self._model.embed(self._newest.index_select(0, first_blocks), positions)
        else:
            hidden = self._transfer.receive_hidden(num_rows)
        hidden = self._model.run_layers(hidden, self._cache)
        if self._parallel.is_last_stage:
            tokens = self._choose(self._model.logits(hidden), num_rows)
            self._transfer.send_tokens(tokens)
        else:
            self._transfer.send_hidden(hidden)
            tokens = self._transfer.receive_tokens(num_rows)
        if self._parallel.is_first_stage:
            self._newest.index_copy_(0, first_blocks, tokens)
        state.advance(num_rows)
        return tokens

    def _choose(self, local: Tensor, num_rows: int) -> Tensor:
        state = self._state
        if not state.has_sampled:
            return self._chooser.greedy(local)
        sampling = state.sampling.first(num_rows)
        return self._chooser.sampled(local, sampling, state.numbers(num_rows), state.green(num_rows))
