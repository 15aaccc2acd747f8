"""The engine's options: how it runs, whatever is asked of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineOptions:
    """Options of `Engine` (`generation/core/engine.py`), with the draft model by name.

    Attributes:
        max_batch_size: sequences that run at the same time.
        kv_cache_memory: bytes of a rank's cache at most; None for what the requests need.
        prefill_chunk_size: tokens of prompts in a step.
        draft_model: a smaller OPT with the same tokenizer, for speculative decoding.
        prompt_lookup: speculate with what followed the newest tokens earlier in the sequence.
        num_speculative_tokens: proposed at a time.
    """

    max_batch_size: int = 16
    kv_cache_memory: int | None = None
    prefill_chunk_size: int = 256
    draft_model: str | None = None
    prompt_lookup: bool = False
    num_speculative_tokens: int = 4
