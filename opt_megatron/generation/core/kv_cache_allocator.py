"""Which part of the KV cache belongs to whom: extents of neighbouring tokens, and those that may be reused."""

from __future__ import annotations

from collections.abc import Sequence

from ..step import Extent

_MOST_RETIRED = 64  # ended sequences that are remembered; each is compared with every new prompt


class CacheMemory:
    """Gives out extents of a cache of `tokens` tokens, each a multiple of `block` tokens.

    An extent that is given back with what it holds stays readable until its memory is needed, so that a
    prompt that begins like an earlier one need not be computed again.
    """

    def __init__(self, tokens: int, block: int = 1) -> None:
        self.tokens, self._block = tokens, block
        self._used: list[Extent] = []  # in the order of their starts
        self._retired: dict[Extent, tuple[int, ...]] = {}  # oldest first

    @property
    def used_tokens(self) -> int:
        """Tokens of extents that were given out and not given back."""
        return sum(extent.size for extent in self._used)

    def allocate(self, size: int) -> Extent | None:
        """An extent of at least `size` tokens at the lowest free place, or None where there is none.

        Retired extents give way, oldest first.
        """
        size = round_up(size, self._block)
        while True:
            extent = self._first_fit(size)
            if extent is not None or not self._retired:
                break
            self._retired.pop(next(iter(self._retired)))
        if extent is not None:
            self._used = sorted([*self._used, extent])
        return extent

    def free(self, extent: Extent) -> None:
        """Give back an extent whose contents nobody will want."""
        self._used.remove(extent)

    def retire(self, extent: Extent, contents: Sequence[int]) -> None:
        """Give back an extent that holds the keys and values of `contents`."""
        self.free(extent)
        self._retired[extent] = tuple(contents)
        if len(self._retired) > _MOST_RETIRED:
            self._retired.pop(next(iter(self._retired)))

    def longest_prefix(self, tokens: Sequence[int]) -> tuple[Extent | None, int]:
        """The retired extent that begins most like `tokens`, and how many tokens they share."""
        best, longest = None, 0
        for extent, contents in self._retired.items():
            shared = common_prefix(contents, tokens)
            if shared > longest:
                best, longest = extent, shared
        return best, longest

    def keep(self, extent: Extent) -> None:
        """Mark a retired extent as lately used, so that it gives way last."""
        self._retired[extent] = self._retired.pop(extent)

    def is_retired(self, extent: Extent) -> bool:
        """Whether its contents are still there."""
        return extent in self._retired

    def _first_fit(self, size: int) -> Extent | None:
        begin = 0
        for extent in sorted([*self._used, *self._retired]):
            if extent.start - begin >= size:
                return Extent(begin, size)
            begin = extent.start + extent.size
        return Extent(begin, size) if self.tokens - begin >= size else None


def round_up(size: int, block: int) -> int:
    """The next multiple of `block`."""
    return -(-size // block) * block


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    shared = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        shared += 1
    return shared
