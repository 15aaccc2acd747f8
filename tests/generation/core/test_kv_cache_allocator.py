"""The allocator of the cache against a map of its tokens."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from opt_megatron.generation.core.kv_cache_allocator import KVCacheAllocator
from opt_megatron.generation.decoding.sequences import common_prefix_length

TOKENS = 40
CONTENTS = st.lists(st.integers(0, 2), max_size=6).map(tuple)


def longest_gap(every) -> int:
    """The longest run of tokens that are in none of the blocks."""
    taken = {token for blocks in every for token in range(blocks.start, blocks.start + blocks.size)}
    marks = "".join("x" if token in taken else "." for token in range(TOKENS))
    return max(map(len, marks.split("x")))


class Allocator(RuleBasedStateMachine):
    @initialize(block_size=st.sampled_from([1, 4]))
    def begin(self, block_size):
        self.allocator, self.block_size = KVCacheAllocator(TOKENS, block_size), block_size
        self.used = []
        self.evictable = {}  # oldest first

    @rule(size=st.integers(1, 15))
    def allocate(self, size):
        whole = -(-size // self.block_size) * self.block_size
        before = list(self.evictable)
        blocks = self.allocator.allocate(size)
        left = [old for old in before if self.allocator.is_evictable(old)]
        gone = before[: len(before) - len(left)]
        assert left == before[len(gone) :]  # the oldest were evicted, and no more of them than necessary
        if gone:
            assert longest_gap([*self.used, gone[-1], *left]) < whole
        if blocks is None:
            assert not left and longest_gap(self.used) < whole
        else:
            assert blocks.size == whole and blocks.start % self.block_size == 0
            self.used.append(blocks)
        self.evictable = {old: self.evictable[old] for old in left}

    @precondition(lambda self: self.used)
    @rule(data=st.data(), contents=CONTENTS)
    def give_back(self, data, contents):
        blocks = data.draw(st.sampled_from(self.used))
        self.used.remove(blocks)
        self.allocator.free(blocks, contents)
        if contents:
            self.evictable[blocks] = contents

    @precondition(lambda self: self.evictable)
    @rule(data=st.data())
    def touch(self, data):
        blocks = data.draw(st.sampled_from(list(self.evictable)))
        self.allocator.touch(blocks)
        self.evictable[blocks] = self.evictable.pop(blocks)

    @rule(tokens=CONTENTS)
    def longest_prefix(self, tokens):
        blocks, shared = self.allocator.longest_prefix(tokens)
        assert shared == max((common_prefix_length(held, tokens) for held in self.evictable.values()), default=0)
        if blocks is None:
            assert shared == 0
        else:
            assert self.evictable[blocks][:shared] == tokens[:shared]

    @invariant()
    def nothing_overlaps_or_passes_the_end(self):
        tokens = [t for e in [*self.used, *self.evictable] for t in range(e.start, e.start + e.size)]
        assert len(tokens) == len(set(tokens)) and set(tokens) <= set(range(TOKENS))
        assert self.allocator.num_used_tokens == sum(blocks.size for blocks in self.used)


Allocator.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAllocator = Allocator.TestCase


def test_of_many_ended_sequences_the_latest_are_remembered():
    allocator = KVCacheAllocator(100)
    allocated = [allocator.allocate(1) for _ in range(100)]
    for number, blocks in enumerate(allocated):
        allocator.free(blocks, (number,))
    found = [allocator.longest_prefix((number,))[1] for number in range(100)]
    assert found == [0] * 36 + [1] * 64
