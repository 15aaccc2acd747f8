"""The CPU kernels of csrc/, called through ctypes on the memory of tensors.

The library is compiled when the package is installed, where there is a C++ compiler. Without it `library` is None, and
everything is computed by torch. It uses torch's OpenMP, so torch.set_num_threads holds for it too. The environment
variable OPT_MEGATRON_CPU_KERNELS chooses an instruction set (base, avx2, avx512), or torch alone (off).

T = tokens, O = outputs, I = inputs; a tile is 64 outputs.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import re
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError

_logger = logging.getLogger(__name__)

TILE = 64
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
INT8, INT4 = 3, 4
_CACHE_FORMATS = FORMATS | {torch.int8: INT8}
_VARIABLE = "OPT_MEGATRON_CPU_KERNELS"
_HUGE_PAGE = 2**21  # bytes
_INTERFACE = 4  # of csrc/library.cpp
_OPENMP = re.compile(r"(/.*/lib[gi]?omp[^/\n]*)$", re.MULTILINE)  # GNU's, Intel's, LLVM's


class _Weight(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("format", "outputs", "inputs", "group")),
        *((name, c_void_p) for name in ("values", "scales", "zeros", "factors")),
    )


class _Linear(Structure):
    _fields_ = (
        ("weight", POINTER(_Weight)),
        *((name, c_int32) for name in ("tokens", "relu", "skip_zeros")),
        *((name, c_void_p) for name in ("x", "bias", "residual", "y")),
    )


class _Attention(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("format", "queries", "heads", "dim")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("query_key_value", "first_blocks", "positions")),
        *((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales", "output")),
    )


class _NormalNumbers(Structure):
    _fields_ = (
        ("seeds", c_void_p),
        ("name", c_uint64),
        ("seeds_count", c_int32),
        *((name, c_int64) for name in ("first_row", "rows", "first_column", "columns")),
        ("output", c_void_p),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class TiledWeight:
    """A weight [O, I] in the library's tiles, on which `multiply` computes.

    Args:
        format: of FORMATS, or INT8 or INT4.
        shape: O and I.
        values, scales, zeros, factors: as csrc/kernels.h says.
        group: inputs with a scale of their own.
    """

    def __init__(
        self,
        format: int,
        shape: tuple[int, int],
        values: Tensor,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
        factors: Tensor | None = None,
        group: int = 0,
    ) -> None:
        self.shape, self.values, self._kept = shape, values, (scales, zeros, factors)
        pointers = map(_pointer, (values, *self._kept))
        self._weight = _Weight(format, *shape, group, *pointers)
        self._address = ctypes.pointer(self._weight)
        self._library = library()

    def multiply(
        self,
        x: Tensor,
        bias: Tensor | None,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
        skip_zeros: bool = False,
    ) -> Tensor:
        """x W^T + bias, with ReLU or the residual [T, O]: [T, I] -> [T, O], computed in float32.

        Args:
            skip_zeros: weights of inputs that are zero in every token are not read, where that pays.
        """
        assert self._library is not None
        if x.dtype != torch.float32:  # of a model that was cast after its weights were loaded
            bias, residual = (None if tensor is None else tensor.float() for tensor in (bias, residual))
            return self.multiply(x.float(), bias, relu=relu, residual=residual, skip_zeros=skip_zeros).to(x.dtype)
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        output = x.new_empty(len(x), self.shape[0])
        self._library.linear(
            _Linear(
                self._address,
                len(x),
                relu,
                skip_zeros,
                x.data_ptr(),
                _pointer(bias),
                _pointer(residual),
                output.data_ptr(),
            )
        )
        return output


def in_tiles(rows: Tensor, padding: float = 0) -> Tensor:
    """[O, ...] -> [tiles, 64, ...], a copy, with `padding` in the rows that the last tile lacks."""
    tiles = -(-len(rows) // TILE)
    padded = rows.new_full((tiles * TILE, *rows.shape[1:]), padding)
    padded[: len(rows)] = rows
    return padded.unflatten(0, (tiles, TILE))


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU, not initialised, for which pages of 2 MiB are asked: weights are read faster from them."""
    kernels, size = library(), math.prod(shape) * dtype.itemsize
    if kernels is None or size < _HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)
    memory = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8)  # what is not written takes no memory
    begin = -memory.data_ptr() % _HUGE_PAGE
    aligned = memory[begin : begin + size]
    kernels.ask_for_huge_pages(aligned)
    return aligned.view(dtype).view(shape)


class CachedKeysValues(NamedTuple):
    """A layer's keys and values in blocks of 64 tokens.

    Attributes:
        keys: [..., n, d, 64] in a dtype of FORMATS, or int8.
        values: [..., n, 64, d] in the same dtype.
        key_scales, value_scales: float32 [..., n, 64] of int8: each number stands for itself times its token's scale.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


class CPUKernels:
    """The loaded library.

    Attributes:
        instruction_set: base, avx2 or avx512: the best that the processor has.
    """

    def __init__(self, path: Path) -> None:
        _share_openmp()
        self._library = ctypes.CDLL(str(path))
        if self._library.opt_interface() != _INTERFACE:
            raise UserError(f"{path} was compiled from other sources than this version's: install the package again")
        self._library.opt_instruction_set.restype = c_char_p
        self._library.opt_ask_for_huge_pages.argtypes = (c_void_p, c_uint64)

    @property
    def instruction_set(self) -> str:
        """Of the kernels that are called."""
        return str(self._library.opt_instruction_set().decode())

    def use_instruction_set(self, name: str | None) -> bool:
        """Call the kernels of another instruction set, None for the best; False where the processor lacks it."""
        return self._library.opt_use_instruction_set(None if name is None else name.encode()) == 0

    def linear(self, call: Structure) -> None:
        """The product that the structure describes."""
        if self._library.opt_linear(ctypes.byref(call)):
            raise MemoryError("no memory for the sums of a product")

    def attend(
        self,
        query_key_value: Tensor,
        cache: CachedKeysValues,
        first_blocks: Tensor,
        positions: Tensor,
        scale: float,
    ) -> Tensor:
        """Store each query's key and value, and attend over its sequence so far.

        Args:
            query_key_value: float32 [Q, n, 3, d]
            first_blocks: int64 [Q], the block where the query's sequence begins.
            positions: int64 [Q], in its sequence.

        Returns:
            softmax(q scale k^T) v, [Q, n * d]
        """
        query_key_value = query_key_value.contiguous()
        count, heads, _, dim = query_key_value.shape
        output = query_key_value.new_empty(count, heads * dim)
        call = _Attention(
            _CACHE_FORMATS[cache.keys.dtype],
            count,
            heads,
            dim,
            scale,
            query_key_value.data_ptr(),
            first_blocks.data_ptr(),
            positions.data_ptr(),
            *map(_pointer, cache),
            output.data_ptr(),
        )
        if self._library.opt_attention(ctypes.byref(call)):
            raise MemoryError("no memory for the scores of attention")
        return output

    def normal_numbers(self, seeds: Sequence[int], name: int, rows: slice, columns: slice) -> Tensor:
        """Normal numbers (`checkpoint/mezo/normal_numbers.py`) of a block for each seed: [seeds, rows, columns].

        Args:
            name: the hash of the tensor's name, 64 bits, as the seeds have.
        """
        output = torch.empty(len(seeds), rows.stop - rows.start, columns.stop - columns.start)
        own_seeds = (c_uint64 * len(seeds))(*seeds)
        call = _NormalNumbers(
            ctypes.addressof(own_seeds),
            name,
            len(seeds),
            rows.start,
            output.shape[1],
            columns.start,
            output.shape[2],
            output.data_ptr(),
        )
        self._library.opt_normal_numbers(ctypes.byref(call))
        return output

    def ask_for_huge_pages(self, tensor: Tensor) -> None:
        """Ask for pages of 2 MiB for the tensor's memory, which has not been written yet."""
        self._library.opt_ask_for_huge_pages(tensor.data_ptr(), tensor.nbytes)


def _share_openmp() -> None:
    """Give libraries that are loaded later the functions of the OpenMP that torch uses."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        for path in set(_OPENMP.findall(maps.read_text(encoding="utf-8", errors="replace"))):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


@functools.cache
def library() -> CPUKernels | None:
    """The library; None where it was not compiled or cannot be loaded, or is switched off.

    Raises:
        UserError: OPT_MEGATRON_CPU_KERNELS is not an instruction set of this processor.
    """
    wanted = os.environ.get(_VARIABLE, "")
    paths = [Path(__file__).with_name(f"_cpu_kernels{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None or wanted == "off":
        return None
    try:
        kernels = CPUKernels(path)
    except OSError as error:  # no OpenMP of torch's that it could use
        _logger.warning("the CPU kernels cannot be loaded, torch's own products are used instead: %s", error)
        return None
    if wanted and not kernels.use_instruction_set(wanted):
        raise UserError(f"{_VARIABLE}={wanted}: give base, avx2 or avx512, as far as this processor has them, or off")
    return kernels
