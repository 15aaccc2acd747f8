"""The model runner: one step of this rank's part of the model, from the previous pipeline stage to the next.

T = tokens of the step, R = tokens with an output, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...model.incremental_forward import IncrementalForward
from ...model.opt_model import OPTModel
from ...parallel.context import ParallelContext
from ..sampling.batch_sampler import GREEDY, SamplingRow, SamplingTensors, green_bits_of_rows
from ..step import (
    BLOCK_SIZE,
    NEWEST,
    KVCacheBlocks,
    OutputKind,
    ScheduledSequence,
    StepInput,
    StepOutput,
    sampling_numbers,
)
from .cuda_graphs import CudaGraphs
from .decode_step import MAX_ROWS, DecodeStep
from .kv_cache import KVCache, cache_bytes_per_token, cache_dtype, make_kv_cache
from .packed_upload import upload, upload_tensor
from .paged_kv_cache import PagedKVCache
from .stage_transfer import StageTransfer
from .token_chooser import TokenChooser


class ModelRunner:
    """Runs this rank's part of a model, and owns its cache; the same on every rank, and the leader gets the output.

    Args:
        model: is prepared for inference (`IncrementalForward`).
        suppressed: [ids] int64 that are never chosen in a step.
        kv_cache_dtype: of --kv-cache-dtype.
        skips_silent_neurons: see `IncrementalForward`.
        uses_cuda_graphs: decode steps are captured and replayed, where there is one pipeline stage on GPUs.
    """

    def __init__(
        self,
        model: OPTModel,
        parallel: ParallelContext,
        suppressed: Tensor,
        *,
        kv_cache_dtype: str = "auto",
        skips_silent_neurons: bool = True,
        uses_cuda_graphs: bool = False,
    ) -> None:
        self._dtype = model.params_dtype
        self._cache_dtype = cache_dtype(kv_cache_dtype, self._dtype, parallel.device)
        self._model = IncrementalForward(model, parallel, skip_silent_neurons=skips_silent_neurons)
        self._parallel = parallel
        self._config = model.opt_config
        self._chooser = TokenChooser(self._config, parallel, self._model.collectives, suppressed)
        self._num_heads = self._config.num_attention_heads // parallel.tensor_model_parallel_size
        self.keeps_tokens = keeps_tokens(parallel.device)
        self._transfer = StageTransfer(parallel, self._config.hidden_size, self._dtype, self.keeps_tokens)
        self._uses_cuda_graphs = (
            uses_cuda_graphs and parallel.device.type == "cuda" and parallel.pipeline_model_parallel_size == 1
        )
        self._no_tokens = torch.empty(0, dtype=torch.int64, device=parallel.device)
        self._no_rows = torch.empty(0, self._config.vocab_size, device=parallel.device)
        self._allocate(0)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of this rank's cache for one token."""
        return cache_bytes_per_token(self._model.num_layers, self._num_heads, self._config.head_dim, self._cache_dtype)

    def allocate(self, num_tokens: int) -> None:
        """Allocate a cache of at least `num_tokens` tokens, unless the present one is as large."""
        if self._cache.num_tokens < num_tokens:
            self._allocate(0)  # release the old one before the new one is allocated
            self._allocate(num_tokens)

    def _allocate(self, num_tokens: int) -> None:
        self._cache = self._make_cache(num_tokens)
        # The newest token of each sequence, at its first block; a block more for those that need none.
        self._newest = torch.zeros(num_tokens // BLOCK_SIZE + 1, dtype=torch.int64, device=self._parallel.device)
        self._decode_step: DecodeStep | None = None
        if self.keeps_tokens and isinstance(self._cache, PagedKVCache):
            self._decode_step = DecodeStep(
                self._model,
                self._cache,
                self._newest,
                self._chooser,
                self._transfer,
                self._parallel,
                CudaGraphs() if self._uses_cuda_graphs else None,
            )

    def _make_cache(self, num_tokens: int) -> KVCache:
        return make_kv_cache(
            self._model.num_layers,
            self._num_heads,
            self._config.head_dim,
            num_tokens,
            dtype=self._cache_dtype,
            device=self._parallel.device,
        )

    def copy(self, source: KVCacheBlocks, target: KVCacheBlocks, begin: int, end: int) -> None:
        """Copy the tokens [begin, end) of one sequence's blocks to another's."""
        self._cache.copy(source, target, begin, end)

    @torch.inference_mode()
    def forward(self, step: StepInput) -> StepOutput:
        """One pass through this rank's stage; the output is the leader's, and has no meaning on other ranks."""
        if self._decode_step is not None:
            if step.is_decoding and len(step.sequences) <= MAX_ROWS:
                return StepOutput(self._decode_step.forward(step), self._no_rows)
            self._decode_step.forget()
        positions = self._cache.prepare_step(step.sequences)
        hidden = self._model.run_layers(self._stage_input(step, positions), self._cache)
        if not self._parallel.is_last_stage:
            self._transfer.send_hidden(hidden)
            output = self._receive_output(step)
        else:
            if any(sequence.num_logits != len(sequence.tokens) for sequence in step.sequences):
                hidden = hidden[_output_indices(step.sequences, self._parallel.device)]
            output = self._output(hidden, step)
            self._transfer.send_tokens(output.tokens)
            self._transfer.send_rows(output.rows)
        if self._parallel.is_first_stage:
            self._keep_tokens(step, output.tokens)
        return output

    def _stage_input(self, step: StepInput, positions: Tensor) -> Tensor:
        """[T, H]: embeddings on the first stage, elsewhere the previous stage's hidden states."""
        if self._parallel.is_first_stage:
            return self._model.embed(self._tokens(step), positions)
        return self._transfer.receive_hidden(len(positions))

    def _tokens(self, step: StepInput) -> Tensor:
        """[T], with the tokens that are kept here in the places of NEWEST."""
        tokens = [token for sequence in step.sequences for token in sequence.tokens]
        if not self.keeps_tokens or NEWEST not in tokens:
            return upload(self._parallel.device, tokens)[0]
        blocks = [sequence.blocks.start // BLOCK_SIZE for sequence in step.sequences for _ in sequence.tokens]
        given, first_blocks = upload(self._parallel.device, tokens, blocks)
        return torch.where(given == NEWEST, self._newest[first_blocks], given)

    def _output(self, hidden: Tensor, step: StepInput) -> StepOutput:
        """The output for hidden states [R, H]."""
        chosen = [sequence.sampling is not None for sequence in step.sequences for _ in range(sequence.num_logits)]
        if len(hidden) == 0:  # pieces of prompts whose logits are not needed: the head is not computed
            return StepOutput(self._no_tokens, self._no_rows)
        local = self._model.logits(hidden)
        if all(chosen):
            return StepOutput(self._choose(local, step.sequences), self._no_rows)
        if not any(chosen):
            return StepOutput(self._no_tokens, self._rows(local, hidden, step.output_kind))
        indices = upload(
            self._parallel.device,
            [index for index, is_chosen in enumerate(chosen) if is_chosen],
            [index for index, is_chosen in enumerate(chosen) if not is_chosen],
        )
        tokens = self._choose(local[indices[0]], step.sequences)
        return StepOutput(tokens, self._rows(local[indices[1]], hidden[indices[1]], step.output_kind))

    def _choose(self, local: Tensor, sequences: Sequence[ScheduledSequence]) -> Tensor:
        """The next tokens [chosen] of the sequences with `sampling`, from this rank's part of their logits."""
        if all(sequence.sampling in (None, GREEDY) for sequence in sequences):
            return self._chooser.greedy(local)
        rows: list[SamplingRow] = []
        options: list[int] = []
        newest: list[int] = []
        for sequence in sequences:
            if sequence.sampling is not None:
                end = sequence.position + len(sequence.tokens)
                rows += [sequence.sampling] * sequence.num_logits
                newest += sequence.tokens[len(sequence.tokens) - sequence.num_logits :]
                for position in range(end - sequence.num_logits + 1, end + 1):
                    options += (*sampling_numbers(sequence.sampling), position)
        device = self._parallel.device
        fields = upload(device, options)[0].view(-1, len(SamplingRow._fields) + 1).T
        sampling = SamplingTensors.of(fields[:-1], self._config.vocab_size)
        green = green_bits_of_rows(rows, newest, self._config.vocab_size)
        if green is not None:
            green = upload_tensor(device, green)
        return self._chooser.sampled(local, sampling, sampling.numbers(fields[-1]), green)

    def _rows(self, local: Tensor, hidden: Tensor, kind: OutputKind) -> Tensor:
        logits = self._chooser.gather(local)
        return torch.cat((logits, hidden.float()), dim=-1) if kind is OutputKind.HIDDEN_STATES else logits

    def _keep_tokens(self, step: StepInput, tokens: Tensor) -> None:
        """Remember each sequence's newest token, for a step that is started before the leader has read it."""
        if self.keeps_tokens and len(tokens):
            self._newest[upload(self._parallel.device, _blocks_of_chosen(step, len(self._newest) - 1))[0]] = tokens

    def _receive_output(self, step: StepInput) -> StepOutput:
        num_tokens, num_rows = (
            sum(sequence.num_logits for sequence in step.sequences if (sequence.sampling is None) is is_row)
            for is_row in (False, True)
        )
        width = self._config.vocab_size
        if step.output_kind is OutputKind.HIDDEN_STATES:
            width += self._config.hidden_size
        return StepOutput(self._transfer.receive_tokens(num_tokens), self._transfer.receive_rows(num_rows, width))


def keeps_tokens(device: torch.device) -> bool:
    """Whether chosen tokens stay on the device: where it computes while the host goes on."""
    return device.type == "cuda"


def _blocks_of_chosen(step: StepInput, unused: int) -> list[int]:
    """The first block of the sequence of each chosen token; `unused` for those that a draft's proposals need."""
    return [
        sequence.blocks.start // BLOCK_SIZE if sequence.num_logits == 1 else unused
        for sequence in step.sequences
        if sequence.sampling is not None
        for _ in range(sequence.num_logits)
    ]


def _output_indices(sequences: tuple[ScheduledSequence, ...], device: torch.device) -> Tensor:
    """Indices [R] of the step's tokens that have an output."""
    indices: list[int] = []
    end = 0
    for sequence in sequences:
        end += len(sequence.tokens)
        indices += range(end - sequence.num_logits, end)
    return upload(device, indices)[0]
