"""The engine's options, which apply to all requests."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import Options, Size, option


@dataclass(frozen=True)
class EngineOptions(Options):
    """Options of `Engine` (`generation/core/engine.py`), with the draft model by name."""

    max_batch_size: int = option(16, help="sequences that run at a time", minimum=1)
    kv_cache_memory: Size | None = option(
        None,
        help="maximum memory of a rank's KV cache, as 2GB",
        metavar="SIZE",
        default_text="what the prompts need, in a server what --max-batch-size of the longest sequences need, but at "
        "most 0.9 of the free memory",
    )
    prefill_chunk_size: int | None = option(
        None, help="prompt tokens per step", minimum=1, default_text="256 on a CPU, 2048 on a GPU"
    )
    draft_model: str | None = option(
        None,
        help="a smaller OPT with the same tokenizer that proposes tokens (speculation)",
        metavar="CHECKPOINT",
        is_path=True,
    )
    prompt_lookup: bool = option(False, help="propose what followed the newest tokens earlier (speculation)")
    cuda_graphs: str = option(
        "auto",
        help="on a GPU, record the kernels of a decode step and launch them together (auto: with one pipeline stage)",
        choices=("auto", "off"),
    )
    kv_cache_dtype: str = option(
        "auto",
        help="dtype of keys and values (int8: with a scale for each token and head; auto: the model's)",
        choices=("auto", "float32", "float16", "bfloat16", "int8"),
    )
    skip_silent_neurons: str = option(
        "auto",
        help="on a CPU, do not read the weights of neurons that ReLU has silenced (auto: where few are active)",
        choices=("auto", "off"),
    )
    num_speculative_tokens: int = option(4, help="tokens proposed at a time", minimum=1)
