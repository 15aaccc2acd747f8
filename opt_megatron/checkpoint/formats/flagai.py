"""FlagAI's files: model-parallel parts pytorch_model_00.bin to pytorch_model_{N-1}.bin, or one pytorch_model.bin.

A part holds {"module": {Hugging Face's name: this part's slice}}, and every name may occur a second time
beside "module" with the value None. `lm_head.weight` is whole in every part. The one file pytorch_model.bin is
recognised and read as Hugging Face's format.
"""

from __future__ import annotations

import re
from pathlib import Path

from ...config import OPTConfig
from ...errors import CheckpointError, UserError, shorten
from ..checkpoint import Checkpoint
from ..conversion_options import ConversionOptions
from ..output_files import DtypeOf, OutputFile, StoredTensor
from ..parameter_mapping import EMBEDDING, Split, canonical_shapes, rank_block, split_of
from ..storage.blocks import whole
from ..storage.lazy_tensor import LazyTensor, Replicated, Tied
from .format import OutputFormat
from .huggingface import canonical_names, pickled_tensors
from .model_parallel_parts import join_parts, missing_from_grid

_PART = re.compile(r"pytorch_model_(\d+)\.bin")


class FlagAIFormat(OutputFormat):
    """Hugging Face's names, with the tensors split into model-parallel parts."""

    title = "FlagAI"
    detection_rank = 30  # before Hugging Face's, whose pytorch_model.bin may be there too
    file_names = r"pytorch_model[^/]*\.bin"

    def detect(self, directory: Path) -> bool:
        """Whether the directory holds numbered parts."""
        return any(_PART.fullmatch(file.name) for file in directory.glob("pytorch_model_*.bin"))

    def open(self, path: Path, config: OPTConfig | None = None) -> Checkpoint:
        """Open a directory lazily.

        Raises:
            CheckpointError: a part is missing, the parts do not fit each other, or biases were split wrongly.
        """
        config = config or OPTConfig.from_directory(path)
        parts = [pickled_tensors(file) for file in _part_files(path)]
        heads = [head for part in parts if (head := _pop_head(part)) is not None]
        tensors = join_parts([canonical_names(path, part) for part in parts], path)
        _check_complete(path, tensors, config, len(parts))
        if len(heads) == len(parts):  # the head is whole in every part, and repeats the embedding, which is split
            head = Replicated(heads, "lm_head.weight")
            what = f"{path}: embed_tokens.weight and lm_head.weight"
            tensors[EMBEDDING] = Tied(tensors[EMBEDDING], head, what) if EMBEDDING in tensors else head
        return Checkpoint(path, f"FlagAI parts, {len(parts)}", config, tensors, [])

    def output_files(self, checkpoint: Checkpoint, options: ConversionOptions, dtype_of: DtypeOf) -> list[OutputFile]:
        """pytorch_model.bin, or a numbered file for each part, with the whole output head in every file.

        Raises:
            UserError: the vocabulary does not divide by the parts.
        """
        config, parts = checkpoint.config, options.tensor_model_parallel_size
        if config.vocab_size % parts:  # FlagAI's mpu.VocabUtility: ensure_divisibility
            raise UserError(
                f"{parts} parts do not divide the model's {config.vocab_size} vocabulary rows, and FlagAI has no "
                "padding of them: ask for 1 part, or another number"
            )
        if parts == 1:
            return [OutputFile(Path("pytorch_model.bin"), "torch", _part_tensors(config, dtype_of, 0, 1))]
        return [
            OutputFile(
                Path(f"pytorch_model_{part:02d}.bin"),
                "torch",
                _part_tensors(config, dtype_of, part, parts),
                wrap=lambda tensors: {"module": tensors},
            )
            for part in range(parts)
        ]


FORMAT = FlagAIFormat()


def _part_tensors(config: OPTConfig, dtype_of: DtypeOf, part: int, parts: int) -> tuple[StoredTensor, ...]:
    tensors, shapes = [], canonical_shapes(config)
    for name in _in_flagais_order(list(shapes)):
        block = rank_block(shapes[name], split_of(name) if parts > 1 else Split.REPLICATED, part, parts)
        tensors.append(StoredTensor.of_block(name, name, block, dtype_of(name)))
    head = whole(shapes[EMBEDDING])
    tensors.append(StoredTensor.of_block("lm_head.weight", EMBEDDING, head, dtype_of(EMBEDDING)))
    return tuple(tensors)


def _in_flagais_order(names: list[str]) -> list[str]:
    """k and v before q, since FlagAI joins the three when it meets q (flagai/model/opt_model.py, transpose_weight).

    And each bias after its own weight, from which FlagAI's script that cuts a file takes the length of its parts.
    """
    ordered: list[str] = []
    for name in names:
        attention, is_input, _ = name.partition("q_proj.weight")
        if is_input:
            ordered += [f"{attention}{letter}_proj.{kind}" for letter in "kvq" for kind in ("weight", "bias")]
        elif not name.removesuffix(".weight").removesuffix(".bias").endswith(("q_proj", "k_proj", "v_proj")):
            ordered.append(name)
    return ordered


def _part_files(directory: Path) -> list[Path]:
    """The parts in their order, with none missing."""
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
    wrong = [name for name, tensor in tensors.items() if name in wanted and tensor.shape != wanted[name]]
    if not wrong:
        return
    if all(name.endswith("bias") for name in wrong):
        raise CheckpointError(
            f"{directory}: {len(wrong)} biases have wrong shapes ({shorten(wrong, 3)}), as FlagAI's converter cuts "
            "them when its source lists biases before weights: convert from the original files instead"
        )
    embedding = next((t for name, t in tensors.items() if name.endswith("embed_tokens.weight")), None)
    if embedding is not None and embedding.shape[0] < config.vocab_size:
        raise CheckpointError(
            f"{directory}: the {parts} parts that are here hold {embedding.shape[0]} of {config.vocab_size} "
            "vocabulary rows: parts are missing"
        )
