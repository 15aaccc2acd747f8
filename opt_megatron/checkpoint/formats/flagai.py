"""Reader of FlagAI's model-parallel files, pytorch_model_00.bin to pytorch_model_{N-1}.bin.

Each holds {"module": {Hugging Face's name: this rank's slice}}, and every name may stand beside it once
more with the value None. `lm_head.weight` is whole in every file. One file that is called
pytorch_model.bin is read as Hugging Face's.
"""

from __future__ import annotations

import re
from pathlib import Path

from ...config import OPTConfig
from ...errors import CheckpointError, shorten
from ..checkpoint import Checkpoint
from ..parameter_mapping import EMBEDDING, canonical_shapes
from ..storage.lazy_tensor import LazyTensor, Replicated, Tied
from .huggingface import canonical_names, pickled_tensors
from .model_parallel_parts import join_parts, missing_from_grid

_PART = re.compile(r"pytorch_model_(\d+)\.bin")


def is_flagai(directory: Path) -> bool:
    """Whether the directory holds FlagAI's numbered files."""
    return any(_PART.fullmatch(file.name) for file in directory.glob("pytorch_model_*.bin"))


def open_flagai(directory: Path, config: OPTConfig | None = None) -> Checkpoint:
    """Open a directory lazily.

    Raises:
        CheckpointError: a part is missing, the parts do not fit each other, or biases were cut wrongly.
    """
    config = config or OPTConfig.from_directory(directory)
    files = _files(directory)
    stored = [pickled_tensors(file) for file in files]
    heads = [_pop_head(part) for part in stored]
    tensors = join_parts([canonical_names(directory, part) for part in stored], directory)
    _check_complete(directory, tensors, config, len(files))
    if None not in heads:  # the head is whole in every file, and repeats the embedding that is sliced
        head = Replicated(heads, "lm_head.weight")
        what = f"{directory}: embed_tokens.weight and lm_head.weight"
        tensors[EMBEDDING] = Tied(tensors[EMBEDDING], head, what) if EMBEDDING in tensors else head
    return Checkpoint(directory, f"FlagAI parts, {len(files)}", config, tensors, [])


def _files(directory: Path) -> list[Path]:
    found: dict[int, Path] = {}
    for file in sorted(directory.glob("pytorch_model_*.bin")):
        match = _PART.fullmatch(file.name)
        if match and int(match[1]) in found:
            raise CheckpointError(f"{directory}: {found[int(match[1])].name} and {file.name} are the same part")
        if match:
            found[int(match[1])] = file
    _, count, missing = missing_from_grid([(0, number) for number in found])
    if missing:
        names = shorten([f"pytorch_model_{number:02d}.bin" for _, number in missing])
        raise CheckpointError(f"{directory}: {len(found)} parts are here, {count - len(found)} are missing: {names}")
    return [found[number] for number in range(len(found))]


def _pop_head(part: dict[str, LazyTensor]) -> LazyTensor | None:
    names = [name for name in part if name.removeprefix("model.") == "lm_head.weight"]
    return part.pop(names[0]) if names else None


def _check_complete(directory: Path, tensors: dict[str, LazyTensor], config: OPTConfig, parts: int) -> None:
    wanted = canonical_shapes(config)
    wrong = [name for name, source in tensors.items() if name in wanted and source.shape != wanted[name]]
    if not wrong:
        return
    if all(name.endswith("bias") for name in wrong):
        raise CheckpointError(
            f"{directory}: {len(wrong)} biases have wrong shapes ({shorten(wrong, 3)}), as FlagAI's converter cuts "
            "them when its source lists biases before weights: convert from the original files instead"
        )
    embedding = next((s for name, s in tensors.items() if name.endswith("embed_tokens.weight")), None)
    if embedding is not None and embedding.shape[0] < config.vocab_size:
        raise CheckpointError(
            f"{directory}: the {parts} parts that are here hold {embedding.shape[0]} of {config.vocab_size} "
            "vocabulary rows: parts are missing"
        )
