"""Keys and values of a batch whose rows have their own lengths.

A row of the batch is a slot of the cache. Rows are always the first slots, so that a step reads the cache
without gathering: a row that ends is replaced by the last one (`move`). One rule serves prefill and decode,
alone and in a batch: the query at position p sees the keys at positions 0 to p. What a padded prefill
writes behind a short row is overwritten by that row's next tokens before any query can see it.

L = layers of this pipeline stage, n = attention heads of this tensor parallel rank, d = head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Step


class KVCache:
    """The cache, passed through GPTModel as `inference_context`, which hands it to every layer.

    It answers what core asks of its own contexts and leaves storing to `update`, which OPTSelfAttention
    calls. Not a subclass of core's: so that this package needs no Megatron-core.

    Args:
        num_layers: L; first_layer: Megatron's number of the stage's first layer (they count from 1).
        slots: rows at the most; length: tokens of a row at the most.
    """

    def __init__(
        self,
        num_layers: int,
        first_layer: int,
        slots: int,
        num_heads: int,
        length: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, slots, num_heads, length, head_dim)
        # Zeros: memory that nobody wrote may hold NaN, and a masked NaN is still a NaN.
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._first_layer = first_layer
        self._device = device

    materialize_only_last_token_logits = True

    def is_static_batching(self) -> bool:
        """Core's other kind needs flash-attention on CUDA."""
        return True

    def is_dynamic_batching(self) -> bool:
        """The other kind."""
        return False

    def is_decode_only(self) -> bool:
        """Core asks before it takes CUDA paths that are not used here."""
        return self._columns == 1

    def begin(self, step: Step) -> None:
        """Prepare what all layers share in a step: slots, positions, mask."""
        starts = torch.tensor(step.starts, device=self._device)  # [b]
        self._columns = len(step.tokens[0])
        self._slots = slice(step.first_slot, step.first_slot + len(step.starts))
        self._start = step.starts[0] if len(set(step.starts)) == 1 else None  # common to all rows, or None
        self._end = max(step.starts) + self._columns
        self._last = torch.tensor(step.counts, device=self._device) - 1  # [b]
        self.position_ids = starts[:, None] + torch.arange(self._columns, device=self._device)  # [b, s]
        self.attention_mask = self._mask()

    def _mask(self) -> Tensor | None:
        """[b, 1, s, t], True where a query may look; None where plain causal or full attention does the same."""
        if self._start is not None and (self._start == 0 or self._columns == 1):
            return None
        keys = torch.arange(self._end, device=self._device)
        return keys <= self.position_ids[:, None, :, None]

    def update(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store this step's keys and values, and return all that the step may look at.

        Args:
            layer_number: Megatron's, counted from 1 over the whole model.
            key, value: [s, b, n, d]

        Returns:
            key and value as views [t, b, n, d] of the cache.
        """
        layer = layer_number - self._first_layer
        return self._store(self._keys[layer], key), self._store(self._values[layer], value)

    def _store(self, memory: Tensor, new: Tensor) -> Tensor:
        rows = memory[self._slots]  # [b, n, length, d]
        if self._start is not None:
            rows[:, :, self._start : self._start + self._columns] = new.permute(1, 2, 0, 3)
        else:
            index = torch.arange(rows.size(0), device=self._device)[:, None]
            rows.transpose(1, 2)[index, self.position_ids] = new.transpose(0, 1)  # [b, s, n, d]
        return rows[:, :, : self._end].permute(2, 0, 1, 3)

    def select_last(self, hidden_states: Tensor) -> Tensor:
        """Each row's last token of this step: [s, b, h] -> [1, b, h]."""
        rows = torch.arange(hidden_states.size(1), device=hidden_states.device)
        return hidden_states[self._last, rows][None]

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        self._keys[:, target] = self._keys[:, source]
        self._values[:, target] = self._values[:, source]
