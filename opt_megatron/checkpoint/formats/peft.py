"""Adapters of peft (LoRA): read for `--adapter`, written by `--to peft`.

    adapter_config.json  adapter_model.safetensors        (older: adapter_model.bin)

    base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight  [rank, in]
    base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_B.weight  [out, rank]

peft itself ignores a key that it does not find, and a wrong prefix so gives the base model. Here every key must have
its module, and every module that the config names its keys.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from ...config import OPTConfig
from ...errors import CheckpointError, UserError, shorten
from ..adapter import Adapter
from ..checkpoint import Checkpoint
from ..conversion_options import ConversionOptions
from ..output_files import DtypeOf, OutputFile, StoredTensor
from ..parameter_mapping import canonical_shapes
from ..storage.blocks import whole
from ..storage.lazy_tensor import LazyTensor
from ..storage.lora_weight import LoRAFactors
from ..storage.tensor_file import open_safetensors
from .format import OutputFormat
from .huggingface import pickled_tensors
from .peft_config import CONFIG_FILE, PeftConfig, config_of_adapter

WEIGHTS_FILE = "adapter_model.safetensors"
_OLD_WEIGHTS_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class PeftFormat(OutputFormat):
    """LoRA's factors without the model that they are added to."""

    title = "peft adapter"
    detection_rank = 60  # after Hugging Face's: an adapter may have been saved beside its base model
    file_names = r"adapter_config\.json|adapter_model\.(safetensors|bin)"
    has_tensor_parts = False
    is_whole_model = False

    def detect(self, directory: Path) -> bool:
        """Whether the directory holds an adapter's config."""
        return (directory / CONFIG_FILE).is_file()

    def open(self, path: Path, config: OPTConfig | None = None) -> Checkpoint:
        """Never: there is no model.

        Raises:
            CheckpointError: says so, and how it is loaded.
        """
        base = PeftConfig.read(path / CONFIG_FILE).base_model or "MODEL"
        raise CheckpointError(
            f"{path}: is an adapter of peft and no model: load the model that it was trained on with it, as in "
            f"--load {shorten([base[:100]])} --adapter {path}"
        )

    def content(self, checkpoint: Checkpoint, options: ConversionOptions) -> Checkpoint:
        """The factors under peft's names.

        Raises:
            UserError: the checkpoint has none.
        """
        if checkpoint.adapter is None:
            raise UserError(
                f"{checkpoint.path}: has no LoRA factors to write with --to peft: it must be a run of train "
                "--lora-rank, or be given with --adapter"
            )
        tensors: dict[str, LazyTensor] = {}
        for name, factors in checkpoint.adapter.factors.items():
            a, b = _keys(name)
            tensors |= {a: factors.a, b: factors.b}
        return replace(checkpoint, tensors=tensors)

    def output_files(self, checkpoint: Checkpoint, options: ConversionOptions, dtype_of: DtypeOf) -> list[OutputFile]:
        """One file of safetensors."""
        stored = [
            StoredTensor.of_block(name, name, whole(tensor.shape), dtype_of(name))
            for name, tensor in checkpoint.tensors.items()
        ]
        return [OutputFile(Path(WEIGHTS_FILE), "safetensors", tuple(stored))]

    def text_files(self, checkpoint: Checkpoint, files: list[OutputFile]) -> dict[str, str]:
        """The adapter's config."""
        assert checkpoint.adapter is not None
        return {CONFIG_FILE: json.dumps(config_of_adapter(checkpoint.adapter, checkpoint.config), indent=2) + "\n"}


FORMAT = PeftFormat()


def read_adapter(path: Path, config: OPTConfig) -> Adapter:
    """Open the adapter in a directory, which must fit a model of this config.

    Raises:
        CheckpointError: there is none, it does something that is not supported, or a key finds no place.
    """
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(f"{path}: there is no {CONFIG_FILE}, as peft saves it with an adapter")
    peft_config = PeftConfig.read(path / CONFIG_FILE)
    stored = _stored_tensors(path)
    factors = {}
    shapes = canonical_shapes(config)
    for module, (rank, scale) in peft_config.updates(config).items():
        name = f"{module}.weight"
        a, b = (stored.pop(key, None) for key in _keys(name))
        if a is None or b is None:
            raise CheckpointError(
                f"{path}: {CONFIG_FILE} adapts {module}, but {_keys(name)[a is not None]} is not in the file of "
                f"weights{_other_keys(stored)}"
            )
        _check_factors(f"{path}: {module}", a, b, shapes[name], rank)
        factors[name] = LoRAFactors(a, b, scale)
    if stored or not factors:
        raise CheckpointError(
            f"{path}: {len(stored)} keys belong to no module that {CONFIG_FILE} adapts{_other_keys(stored)}"
        )
    return Adapter(path, factors, peft_config.base_model, peft_config.dropout)


def _keys(name: str) -> tuple[str, str]:
    """The keys of the factors A and B of a canonical weight."""
    module = _PREFIX + name.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _stored_tensors(path: Path) -> dict[str, LazyTensor]:
    if (path / WEIGHTS_FILE).is_file():
        return open_safetensors(path / WEIGHTS_FILE)
    if (path / _OLD_WEIGHTS_FILE).is_file():
        return pickled_tensors(path / _OLD_WEIGHTS_FILE)
    raise CheckpointError(f"{path}: there is neither {WEIGHTS_FILE} nor {_OLD_WEIGHTS_FILE}")


def _other_keys(stored: dict[str, LazyTensor]) -> str:
    """What a message adds about the keys that have no place (yet)."""
    return f"; it has {shorten(list(stored), 2)}" if stored else ""


def _check_factors(what: str, a: LazyTensor, b: LazyTensor, weight_shape: tuple[int, ...], rank: int) -> None:
    rows, columns = weight_shape
    if (a.shape, b.shape) != ((rank, columns), (rows, rank)):
        raise CheckpointError(
            f"{what}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, but {CONFIG_FILE} and the model say "
            f"{[rank, columns]} and {[rows, rank]}"
        )
    strange = {str(tensor.dtype) for tensor in (a, b) if tensor.dtype not in _DTYPES}
    if strange:
        raise CheckpointError(f"{what}: its factors are {', '.join(sorted(strange))}, not floating-point numbers")
