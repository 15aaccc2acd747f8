"""Quiet imports of Megatron-core. Imports neither torch nor Megatron-core."""

from __future__ import annotations

import logging
import warnings

# Warnings of Megatron-core, and of torch about Megatron-core, that a user of this project can do nothing about.
_MESSAGES = (
    # Core's own default for cuda_graph_scope triggers its own deprecation warning, once per config.
    "full scope is deprecated",
    # Core calls collectives under a name that torch is about to drop.
    ".*(all_gather_into_tensor|reduce_scatter_tensor). is deprecated",
    # Advice for overlapping communication on a GPU, given once per process in training.
    ".*CUDA_DEVICE_MAX_CONNECTIONS.*",
)


def silence_core() -> None:
    """Hide the warnings that Megatron-core gives when it is imported.

    It warns that apex and TransformerEngine are absent and that its own fallbacks are used. That is the intended
    state on a CPU. The packages whose modules import Megatron-core call this before those modules are imported.
    """
    # Advice to developers of Megatron-core (0.19: that GPTModel will be replaced, how to spell specs), and a
    # remark of torch's on CUDA_HOME where there is a toolkit and no GPU.
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
