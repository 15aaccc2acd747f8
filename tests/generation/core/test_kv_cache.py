"""Attention over the cache against a plain softmax over each sequence's own keys and values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_megatron.generation.core.kv_cache import cache_bytes_per_token, make_kv_cache
from opt_megatron.generation.core.paged_kv_cache import PagedKVCache
from opt_megatron.generation.step import BLOCK_SIZE, KVCacheBlocks, ScheduledSequence

LAYERS, CPU = 2, torch.device("cpu")
SIZES = [BLOCK_SIZE, 3 * BLOCK_SIZE, BLOCK_SIZE, 2 * BLOCK_SIZE, 5 * BLOCK_SIZE]
COUNTS = [1, 1, 2, 5, 8, 9, 16, 17, 60, 130]  # on both sides of where another way of computing begins
BLOCKS = [KVCacheBlocks(sum(SIZES[:n]), size) for n, size in enumerate(SIZES)]


CACHES = [
    (torch.float32, make_kv_cache),  # a CPU's
    (torch.bfloat16, make_kv_cache),
    (torch.float32, PagedKVCache),
    (torch.bfloat16, PagedKVCache),
]


class Reference:
    """Sequences as lists of keys and values, one for each layer, beside the cache."""

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype, make=make_kv_cache) -> None:
        self.heads, self.head_dim, self.dtype = heads, head_dim, dtype
        self.cache = make(LAYERS, heads, head_dim, sum(SIZES), dtype=dtype, device=CPU)
        # Whatever is read before it was written shows.
        self.cache._memory.fill_(1e4 if isinstance(self.cache, PagedKVCache) else torch.nan)
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
            tolerance = 2e-5 if self.dtype == torch.float32 else 0.03
            assert (output - torch.stack(expected)).abs().max() <= tolerance

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


def test_bytes():
    options = {"dtype": torch.bfloat16, "device": CPU}
    cache = make_kv_cache(3, 4, 8, 2 * BLOCK_SIZE, **options)
    assert cache._memory.nbytes == 2 * BLOCK_SIZE * cache_bytes_per_token(3, 4, 8, **options)
