"""The cache's memory against a map of its tokens."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from opt_megatron.generation.core.kv_cache_allocator import CacheMemory, common_prefix

TOKENS = 40
CONTENTS = st.lists(st.integers(0, 2), max_size=6).map(tuple)


def longest_gap(extents) -> int:
    """The longest run of tokens that are in none of the extents."""
    taken = {token for extent in extents for token in range(extent.start, extent.start + extent.size)}
    marks = "".join("x" if token in taken else "." for token in range(TOKENS))
    return max(map(len, marks.split("x")))


class Memory(RuleBasedStateMachine):
    @initialize(block=st.sampled_from([1, 4]))
    def begin(self, block):
        self.memory, self.block = CacheMemory(TOKENS, block), block
        self.used = []
        self.retired = {}  # oldest first

    @rule(size=st.integers(1, 15))
    def allocate(self, size):
        whole = -(-size // self.block) * self.block
        before = list(self.retired)
        extent = self.memory.allocate(size)
        left = [old for old in before if self.memory.is_retired(old)]
        gone = before[: len(before) - len(left)]
        assert left == before[len(gone) :]  # the oldest gave way, and no more of them than had to
        if gone:
            assert longest_gap([*self.used, gone[-1], *left]) < whole
        if extent is None:
            assert not left and longest_gap(self.used) < whole
        else:
            assert extent.size == whole and extent.start % self.block == 0
            self.used.append(extent)
        self.retired = {old: self.retired[old] for old in left}

    @precondition(lambda self: self.used)
    @rule(data=st.data(), contents=st.none() | CONTENTS)
    def give_back(self, data, contents):
        extent = data.draw(st.sampled_from(self.used))
        self.used.remove(extent)
        if contents is None:
            self.memory.free(extent)
        else:
            self.memory.retire(extent, contents)
            self.retired[extent] = contents

    @precondition(lambda self: self.retired)
    @rule(data=st.data())
    def keep(self, data):
        extent = data.draw(st.sampled_from(list(self.retired)))
        self.memory.keep(extent)
        self.retired[extent] = self.retired.pop(extent)

    @rule(tokens=CONTENTS)
    def longest_prefix(self, tokens):
        extent, shared = self.memory.longest_prefix(tokens)
        assert shared == max((common_prefix(held, tokens) for held in self.retired.values()), default=0)
        if extent is None:
            assert shared == 0
        else:
            assert self.retired[extent][:shared] == tokens[:shared]

    @invariant()
    def nothing_overlaps_or_passes_the_end(self):
        tokens = [t for e in [*self.used, *self.retired] for t in range(e.start, e.start + e.size)]
        assert len(tokens) == len(set(tokens)) and set(tokens) <= set(range(TOKENS))
        assert self.memory.used_tokens == sum(extent.size for extent in self.used)


Memory.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMemory = Memory.TestCase


def test_of_many_ended_sequences_the_latest_are_remembered():
    memory = CacheMemory(100)
    extents = [memory.allocate(1) for _ in range(100)]
    for number, extent in enumerate(extents):
        memory.retire(extent, (number,))
    found = [memory.longest_prefix((number,))[1] for number in range(100)]
    assert found == [0] * 36 + [1] * 64
