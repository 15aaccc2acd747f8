"""Attention over the cache against a plain softmax over each sequence's own keys and values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_megatron.errors import UserError
from opt_megatron.generation.core import kv_cache
from opt_megatron.generation.core.kv_cache import cache_bytes_per_token, cache_dtype, make_kv_cache
from opt_megatron.generation.core.paged_kv_cache import PagedKVCache
from opt_megatron.generation.step import BLOCK_SIZE, KVCacheBlocks, ScheduledSequence

LAYERS, CPU = 2, torch.device("cpu")
SIZES = [BLOCK_SIZE, 3 * BLOCK_SIZE, BLOCK_SIZE, 2 * BLOCK_SIZE, 5 * BLOCK_SIZE]
COUNTS = [1, 1, 2, 5, 8, 9, 16, 17, 60, 130]  # on both sides of where another way of computing begins
BLOCKS = [KVCacheBlocks(sum(SIZES[:n]), size) for n, size in enumerate(SIZES)]


# The model's dtype, the cache's, and whether it is a CPU's.
CACHES = [
    (torch.float32, torch.float32, make_kv_cache),
    (torch.float32, torch.float16, make_kv_cache),
    (torch.bfloat16, torch.bfloat16, make_kv_cache),
    (torch.float32, torch.int8, make_kv_cache),
    (torch.float32, torch.float32, PagedKVCache),
    (torch.bfloat16, torch.bfloat16, PagedKVCache),
]
TOLERANCES = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 0.03, torch.int8: 0.05}


def memory_of(cache) -> list[torch.Tensor]:
    if isinstance(cache, PagedKVCache):
        return [cache._memory]
    return [memory for memory in (cache._blocks._numbers, cache._blocks._scales) if memory is not None]


class Reference:
    """Sequences as lists of keys and values, one for each layer, beside the cache."""

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype, cache_dtype=None, make=make_kv_cache) -> None:
        self.heads, self.head_dim, self.dtype = heads, head_dim, dtype
        cache_dtype = cache_dtype or dtype
        self.tolerance = TOLERANCES[cache_dtype]
        self.cache = make(LAYERS, heads, head_dim, sum(SIZES), dtype=cache_dtype, device=CPU)
        for memory in memory_of(self.cache):  # whatever is read before it was written shows
            memory.fill_(
                1e4 if isinstance(self.cache, PagedKVCache) else torch.nan if memory.is_floating_point() else 99
            )
        self.held = [[torch.empty(0, 2, heads, head_dim, dtype=dtype) for _ in SIZES] for _ in range(LAYERS)]
        self.generator = torch.Generator().manual_seed(1)

    def length(self, sequence: int) -> int:
        return len(self.held[0][sequence])

    def step(self, parts: list[tuple[int, int, int]]) -> None:
        """(sequence, position, tokens) of every sequence."""
        scheduled = tuple(ScheduledSequence(BLOCKS[s], position, (0,) * count, 0) for s, position, count in parts)
        positions = self.cache.prepare_step(scheduled)
        assert positions.tolist() == [p + i for _, p, count in parts for i in range(count)]
        for layer in range(LAYERS):
            shape = (len(positions), self.heads, 3, self.head_dim)
            qkv = torch.randn(shape, generator=self.generator).to(self.dtype)
            output = self.cache.attend(layer, qkv)
            expected, first = [], 0
            for sequence, position, count in parts:
                fresh = qkv[first : first + count]
                before = self.held[layer][sequence][:position]
                self.held[layer][sequence] = torch.cat((before, fresh[:, :, 1:].transpose(1, 2)))
                expected += [self._attention(layer, sequence, q, position + i) for i, q in enumerate(fresh[:, :, 0])]
                first += count
            assert output.shape == (len(positions), self.heads * self.head_dim) and output.dtype is self.dtype
            assert (output - torch.stack(expected)).abs().max() <= self.tolerance

    def _attention(self, layer: int, sequence: int, query: torch.Tensor, position: int) -> torch.Tensor:
        keys, values = self.held[layer][sequence][: position + 1].double().unbind(1)  # [t, n, d]
        scores = torch.einsum("nd,tnd->nt", query.double(), keys) * self.head_dim**-0.5
        return torch.einsum("nt,tnd->nd", scores.softmax(-1), values).flatten()

    def copy(self, source: int, target: int, begin: int, end: int) -> None:
        self.cache.copy(BLOCKS[source], BLOCKS[target], begin, end)
        for held in self.held:
            held[target] = torch.cat((held[target][:begin], held[source][begin:end]))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([(12, 4), (3, 20), (2, 64)]), st.sampled_from(CACHES), st.data())
def test_every_token_sees_its_own_sequence_and_no_more(heads, cache, data):
    reference = Reference(*heads, *cache)
    for _ in range(data.draw(st.integers(1, 5))):
        chosen = data.draw(st.lists(st.sampled_from(range(len(SIZES))), min_size=1, unique=True))
        parts = []
        for sequence in chosen:
            length = reference.length(sequence)
            back = data.draw(st.integers(0, min(length, 6)))  # what was proposed and not accepted
            position = min(length - back, SIZES[sequence] - 1)
            most = SIZES[sequence] - position
            parts.append((sequence, position, min(most, data.draw(st.sampled_from(COUNTS)))))
        reference.step(parts)
        source, target = data.draw(st.permutations(range(len(SIZES))))[:2]
        shared = min(reference.length(source), SIZES[target])
        if shared:
            begin = data.draw(st.integers(0, min(shared - 1, reference.length(target))))
            reference.copy(source, target, begin, shared)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_many_sequences_alike_and_unlike(count):
    """Decoding: sequences of one length and of others, in the order of their blocks and not."""
    reference = Reference(3, 20, torch.float32)
    reference.step([(n, 0, 20) for n in range(5)])
    reference.step([(n, 20, count) for n in (4, 2, 0, 1, 3)])
    reference.step([(0, 20 + count, 1), (3, 5, 1), (1, 20 + count, 1), (2, 0, 1)])


def test_a_sequence_fills_its_blocks():
    reference = Reference(2, 64, torch.float32)
    reference.step([(n, 0, size - 1) for n, size in enumerate(SIZES)])
    reference.step([(n, size - 1, 1) for n, size in enumerate(SIZES)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_bytes(dtype):
    cache = make_kv_cache(3, 4, 8, 2 * BLOCK_SIZE, dtype=dtype, device=CPU)
    assert sum(memory.nbytes for memory in memory_of(cache)) == 2 * BLOCK_SIZE * cache_bytes_per_token(3, 4, 8, dtype)


def test_the_choice_of_a_dtype(monkeypatch):
    assert cache_dtype("auto", torch.bfloat16, torch.device("cuda")) is torch.bfloat16
    with pytest.raises(UserError, match=r"on a GPU the cache has the model's dtype, torch.float16; give auto"):
        cache_dtype("int8", torch.float16, torch.device("cuda"))
    monkeypatch.setattr(kv_cache, "library", lambda: None)
    assert cache_dtype("auto", torch.bfloat16, CPU) is torch.float32
    with pytest.raises(UserError, match="int8 needs the CPU kernels, which are not there: give auto or float32"):
        cache_dtype("int8", torch.float32, CPU)
