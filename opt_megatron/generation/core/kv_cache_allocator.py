"""Which blocks of the KV cache belong to which sequence, and which still hold a reusable prefix."""

from __future__ import annotations

from collections.abc import Sequence

from ..decoding.sequences import common_prefix_length
from ..step import KVCacheBlocks

_MAX_EVICTABLE = 64  # ended sequences that are remembered; each is compared with every new prompt


class KVCacheAllocator:
    """Allocates consecutive blocks of a cache of `num_tokens` tokens.

    Blocks that are freed with their contents stay readable until they are evicted, so that a prompt with the same
    prefix as an earlier one need not be computed again. Eviction is in the order of last use.

    Args:
        block_size: tokens.
    """

    def __init__(self, num_tokens: int, block_size: int = 1) -> None:
        self.num_tokens, self._block_size = num_tokens, block_size
        self._used: list[KVCacheBlocks] = []  # in the order of their starts
        self._evictable: dict[KVCacheBlocks, tuple[int, ...]] = {}  # least recently used first

    @property
    def num_used_tokens(self) -> int:
        """Tokens of blocks that are allocated and not freed."""
        return sum(blocks.size for blocks in self._used)

    def allocate(self, num_tokens: int) -> KVCacheBlocks | None:
        """Blocks for at least `num_tokens` tokens at the lowest free position, after as many evictions as needed.

        Returns:
            None if there is no room even after all evictions.
        """
        size = round_up(num_tokens, self._block_size)
        while True:
            blocks = self._first_fit(size)
            if blocks is not None or not self._evictable:
                break
            self._evict_oldest()
        if blocks is not None:
            self._used = sorted([*self._used, blocks])
        return blocks

    def free(self, blocks: KVCacheBlocks, contents: Sequence[int] = ()) -> None:
        """Free blocks; `contents` are the tokens whose keys and values they hold, if these may be reused."""
        self._used.remove(blocks)
        if contents:
            self._evictable[blocks] = tuple(contents)
            if len(self._evictable) > _MAX_EVICTABLE:
                self._evict_oldest()

    def longest_prefix(self, tokens: Sequence[int]) -> tuple[KVCacheBlocks | None, int]:
        """The evictable blocks with the longest common prefix with `tokens`, and its length; None where it is 0."""
        best, longest = None, 0
        for blocks, contents in self._evictable.items():
            shared = common_prefix_length(contents, tokens)
            if shared > longest:
                best, longest = blocks, shared
        return best, longest

    def touch(self, blocks: KVCacheBlocks) -> None:
        """Mark evictable blocks as used just now, so that they are evicted last."""
        self._evictable[blocks] = self._evictable.pop(blocks)

    def is_evictable(self, blocks: KVCacheBlocks) -> bool:
        """Whether blocks are free and still hold their contents."""
        return blocks in self._evictable

    def _evict_oldest(self) -> None:
        self._evictable.pop(next(iter(self._evictable)))

    def _first_fit(self, size: int) -> KVCacheBlocks | None:
        begin = 0
        for blocks in sorted([*self._used, *self._evictable]):
            if blocks.start - begin >= size:
                return KVCacheBlocks(begin, size)
            begin = blocks.start + blocks.size
        return KVCacheBlocks(begin, size) if self.num_tokens - begin >= size else None


def round_up(size: int, block_size: int) -> int:
    """The smallest multiple of `block_size` that is at least `size`."""
    return -(-size // block_size) * block_size
