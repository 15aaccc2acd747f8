"""A model's weights as whole tensors under Hugging Face's names, whatever the layout.

    opt.weights["model.decoder.layers.0.fc1.weight"]             a copy, whole, on every rank
    opt.weights["model.decoder.layers.0.fc1.weight"] = tensor    each rank keeps its slice

Reading and writing are collective: every rank does it, for the same names in the same order, and a written tensor
must be the same on each. Names, `len` and `in` need no other rank. Both work before and after an engine has packed
the weights (`model/linear_methods/`), as long as the linear method keeps the float values.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from .checkpoint.parameter_mapping import (
    EMBEDDING,
    ParameterMapping,
    Split,
    block_view,
    canonical_shapes,
    even_stage_parameters,
    rank_block,
)
from .checkpoint.storage.blocks import Block
from .errors import UserError, shorten
from .model.embedding import OPTEmbedding
from .model.linear import PackableLinear
from .model.opt_model import OPTModel
from .parallel.context import ParallelContext, on_all_ranks

TIED_HEAD = "lm_head.weight"  # another name of the embedding


class UnknownWeightError(UserError, KeyError):
    """There is no weight of this name. A KeyError too, as mappings raise it."""

    __str__ = UserError.__str__  # KeyError's puts quotes around the message


class _Location(NamedTuple):
    """Where a canonical tensor is: component number `component` of a parameter of a pipeline stage."""

    stage: int
    parameter: ParameterMapping
    component: int


class Weights(Mapping[str, Tensor]):
    """The canonical tensors of a model, by Hugging Face's names; `lm_head.weight` is the embedding too.

    Args:
        model: this rank's part.
    """

    def __init__(self, model: OPTModel, parallel: ParallelContext) -> None:
        self._model = model
        self._config = model.opt_config
        self._parallel = parallel
        self._shapes = canonical_shapes(self._config)
        self._locations: dict[str, list[_Location]] = {name: [] for name in self._shapes}
        for stage in range(parallel.pipeline_model_parallel_size):
            for parameter in even_stage_parameters(self._config, parallel.pipeline_model_parallel_size, stage):
                for component, name in enumerate(parameter.canonical):
                    self._locations[name].append(_Location(stage, parameter, component))

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the model; no `lm_head.weight`."""
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes or name == TIED_HEAD

    # A mapping's own comparison would gather every tensor, and compare tensors as if they were numbers.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Weights({len(self)} tensors, {self.dtype})"

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it.

        Raises:
            UnknownWeightError: there is no such weight.
        """
        return self._shapes[self._canonical(name)]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every tensor."""
        return self._model.params_dtype

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor, a new one on the model's device; called on every rank.

        Raises:
            UnknownWeightError: there is no such weight; the message names similar ones.
            UserError: the weight is quantised.
        """
        name = self._canonical(name)
        self._check_float(name)
        location, whole = self._locations[name][0], None
        ranks = self._ranks_with_a_part(location.parameter)
        for rank in range(ranks):
            block = rank_block(self._shapes[name], location.parameter.split, rank, ranks)
            part = self._broadcast_part(location, block, rank)
            if ranks == 1:
                return part
            whole = part.new_empty(self._shapes[name]) if whole is None else whole
            whole[block] = part
        assert whole is not None
        return whole

    @torch.no_grad()
    def __setitem__(self, name: str, value: Tensor) -> None:
        """Replace a tensor; called on every rank with the same value, which is cast to the model's dtype.

        Raises:
            UnknownWeightError: there is no such weight; the message names similar ones.
            UserError: the weight is quantised, or the value has another shape, is not of floating-point numbers, is
                not finite in the model's dtype, or is not the same on every rank. Nothing is changed then.
        """
        name = self._canonical(name)
        self._check_float(name)
        value = on_all_ranks(self._parallel, lambda: _checked(name, value, self._shapes[name], self.dtype))
        self._check_same_on_all_ranks(name, value)
        for location in self._locations[name]:  # the embedding may be on two stages
            if location.stage == self._parallel.pipeline_model_parallel_rank:
                self._write(location, value)

    def check_all_float(self) -> None:
        """Raise UserError if any weight is quantised."""
        for name in self:
            self._check_float(name)

    def _canonical(self, name: str) -> str:
        if name == TIED_HEAD:
            return EMBEDDING
        if name not in self._shapes:
            similar = difflib.get_close_matches(str(name), self._shapes, n=3) or list(self._shapes)[:3]
            raise UnknownWeightError(f"there is no weight {name!r}; there are {shorten(similar)}, for example")
        return name

    def _check_float(self, name: str) -> None:
        """Raise UserError if the weight is quantised. Depends on the name alone: all ranks raise, or none."""
        parameter = self._locations[name][0].parameter
        is_linear = parameter.split is not Split.REPLICATED and parameter.megatron.endswith(".weight")
        if self._model.quantization is not None and is_linear:
            raise UserError(
                f"{name} is quantised to {self._model.quantization}, and its float values were not kept: load the "
                "model without quantization to read, edit or save its weights"
            )

    def _ranks_with_a_part(self, parameter: ParameterMapping) -> int:
        return 1 if parameter.split is Split.REPLICATED else self._parallel.tensor_model_parallel_size

    def _broadcast_part(self, location: _Location, block: Block, rank: int) -> Tensor:
        """The block that tensor parallel rank `rank` of the stage holds, on every rank."""
        source = location.stage * self._parallel.pipeline_stride + rank
        shape = [part.stop - part.start for part in block]
        if self._parallel.rank == source:
            weight = _float_weight(self._model, location.parameter.megatron)
            part = self._view(location, weight, block).reshape(shape).clone(memory_format=torch.contiguous_format)
        else:
            part = torch.empty(shape, dtype=self.dtype, device=self._parallel.device)
        if self._parallel.world_size > 1 and part.numel():
            dist.broadcast(part, src=source)
        return part

    def _write(self, location: _Location, value: Tensor) -> None:
        """Copy this rank's slice of the whole value into the parameter."""
        split = location.parameter.split
        ranks, rank = self._parallel.tensor_model_parallel_size, self._parallel.tensor_model_parallel_rank
        weight = _float_weight(self._model, location.parameter.megatron)
        block = rank_block(tuple(value.shape), split, rank, ranks)
        view = self._view(location, weight, block)
        view.copy_(value[block].reshape(view.shape))
        _store(self._model, location.parameter.megatron, weight)

    def _view(self, location: _Location, weight: Tensor, block: Block) -> Tensor:
        count = len(location.parameter.canonical)
        return block_view(weight, location.component, count, self._config.head_dim, block)

    def _check_same_on_all_ranks(self, name: str, value: Tensor) -> None:
        if self._parallel.world_size == 1:
            return
        content = value.cpu().contiguous().flatten().view(torch.uint8).numpy()
        digests = self._parallel.gather_objects(xxhash.xxh3_64_intdigest(content.data))
        other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
        if other is not None:
            raise UserError(f"{name}: rank {other} writes other values than rank 0; every rank must write the same")


def _checked(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The value in the model's dtype."""
    if not isinstance(value, Tensor):
        raise UserError(f"{name} must be a tensor {list(shape)}, not {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise UserError(f"{name} has the shape {list(shape)}, but was given {list(value.shape)}")
    if not value.is_floating_point():
        raise UserError(f"{name} must be of floating-point numbers, not {value.dtype}")
    if value.is_meta or value.layout is not torch.strided:
        kind = "without values (on the meta device)" if value.is_meta else str(value.layout).removeprefix("torch.")
        raise UserError(f"{name} must be a dense tensor, not one that is {kind}")
    cast = value.detach().to(dtype)
    finite = cast.isfinite()
    if not finite.all():
        raise UserError(f"{name}: {int((~finite).sum()):,} of the values are not finite in {dtype}")
    return cast


def _float_weight(model: OPTModel, name: str) -> Tensor:
    """A parameter of this rank: the tensor itself, or what a linear method has packed, in the model's dtype."""
    module, kind = _module_of(model, name)
    parameter = getattr(module, kind)
    if parameter is not None and not parameter.is_meta:
        return parameter.detach()
    assert isinstance(module, PackableLinear | OPTEmbedding) and module.packed is not None
    stored = module.packed.unpack() if isinstance(module, PackableLinear) else module.packed.table()
    return stored.to(model.params_dtype)


def _store(model: OPTModel, name: str, weight: Tensor) -> None:
    """After `weight` of `_float_weight` has been written into: pack it again where it was packed."""
    module, kind = _module_of(model, name)
    head = model.output_layer if model.post_process else None
    layers: list[nn.Module | None] = [module] if kind == "weight" else []
    if name == "embedding.word_embeddings.weight":
        layers.append(head)  # tied: made from the embedding
    for layer in layers:
        if isinstance(layer, PackableLinear | OPTEmbedding) and layer.packed is not None:
            layer.packed = type(layer.packed)(_as_stored(weight, layer.method.weight_dtype))


def _as_stored(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The weight in the dtype that its layer stores, if no value changes; else as it is: edits are never rounded."""
    if dtype is None or dtype == weight.dtype:
        return weight
    stored = weight.to(dtype)
    return stored if torch.equal(stored.to(weight.dtype), weight) else weight


def _module_of(model: OPTModel, name: str) -> tuple[nn.Module, str]:
    path, _, kind = name.rpartition(".")
    return model.get_submodule(path), kind
