"""The scheduler with sequence groups, and a rule instead of the model."""

import pytest
from rule_model import RuleModel

from opt_megatron.generation.core.kv_cache_allocator import KVCacheAllocator
from opt_megatron.generation.core.launched_step import LaunchedStep
from opt_megatron.generation.core.scheduler import Scheduler
from opt_megatron.generation.decoding.beam_search import BeamSearchGroup
from opt_megatron.generation.decoding.sampling_group import SamplingGroup
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.generation.step import StepInput


class Loop:
    """The engine's loop without the engine: every step as the scheduler makes it."""

    def __init__(self, tokens: int, max_batch_size: int = 8, chunk: int = 256) -> None:
        self.model = RuleModel(50)
        self.model.allocate(tokens)
        self.scheduler = Scheduler(KVCacheAllocator(tokens), max_batch_size, chunk)
        self.ended = []

    def add(self, *groups):
        self.scheduler.waiting.extend(groups)

    def step(self) -> list[tuple[int, int]]:
        """(request, tokens computed) of every part of the step."""
        scheduler = self.scheduler
        scheduler.admit(self._copy)
        computed = []
        for part in scheduler.schedule():
            group, sequences, is_restored = part
            computed.append((group.request_id, sum(len(sequence.tokens) for sequence in sequences)))
            step = LaunchedStep([part], self.model.forward(StepInput(tuple(sequences), group.output_kind)))
            group.mark_computed(sequences)
            if not is_restored:
                group.process_outputs(sequences, step.read()[0], self._copy)
        self.ended += [group for group in scheduler.running if group.is_finished]
        scheduler.release_finished()
        return computed

    def run(self) -> list[list[tuple[int, int]]]:
        steps = []
        while self.scheduler.waiting or self.scheduler.running:
            steps.append(self.step())
            assert steps[-1]
        assert self.scheduler.allocator.num_used_tokens == 0
        for group in self.ended:
            if isinstance(group, SamplingGroup):
                new = tuple(group.lead.tokens[len(group.request.prompt) :])
                assert new == self.model.continued(group.request.prompt, group.request.params)
        return steps

    def _copy(self, source, target, begin, end):
        if begin < end:
            self.model.copy(source.blocks, target.blocks, begin, end)


def group_of(number: int, prompt, new: int = 5, client: int = 0, **options) -> SamplingGroup:
    params = SamplingParams(max_new_tokens=new, **({"temperature": 0} | options))
    return SamplingGroup(number, Request(tuple(prompt), params, client=client), ())


def numbered(number: int, length: int, new: int = 5, client: int = 0, **options) -> SamplingGroup:
    """A prompt unlike all others'."""
    return group_of(number, [number, *range(length - 1)], new, client, **options)


def test_requests_begin_in_their_order_and_never_more_than_the_batch_size():
    loop = Loop(1000, max_batch_size=3)
    loop.add(*(numbered(n, 4, new=2 + n % 3) for n in range(9)))
    steps = loop.run()
    assert max(map(len, steps)) == 3
    begun = list(dict.fromkeys(number for step in steps for number, _ in step))
    assert begun == list(range(9))


def test_a_beam_search_counts_with_all_its_rows():
    loop = Loop(1000, max_batch_size=4)
    search = Request((7, 8), SamplingParams(max_new_tokens=4, num_beams=3))
    loop.add(numbered(0, 4, new=3), numbered(1, 4, new=3), BeamSearchGroup(2, search, ()), numbered(3, 4))
    steps = loop.run()
    assert [{number for number, _ in step} for step in steps[:3]] == [{0, 1}] * 3  # 3 waits behind 2
    assert {number for number, _ in steps[3]} == {2, 3}
    assert max(sum(count for _, count in step) for step in steps[4:]) == 4


def test_requests_wait_for_memory():
    loop = Loop(30)  # of 12 tokens each: room for two
    loop.add(*(numbered(n, 8) for n in range(5)))
    steps = loop.run()
    assert max(map(len, steps)) == 2
    assert len(loop.ended) == 5


def test_a_large_request_is_not_passed_by_small_ones_behind_it():
    loop = Loop(30)
    loop.add(numbered(0, 8), numbered(1, 20), numbered(2, 2))
    steps = loop.run()
    assert list(dict.fromkeys(number for step in steps for number, _ in step)) == [0, 1, 2]


def test_prompts_come_in_pieces_while_others_decode():
    loop = Loop(1000, chunk=10)
    loop.add(numbered(0, 3, new=20), numbered(1, 25), numbered(2, 12))
    steps = loop.run()
    assert steps[:4] == [[(0, 3), (1, 7)], [(0, 1), (1, 10)], [(0, 1), (1, 8), (2, 2)], [(0, 1), (1, 1), (2, 10)]]
    assert len([step for step in steps if (0, 1) in step]) == 19  # it is never made to wait


def test_samples_of_one_prompt_compute_it_once():
    loop = Loop(1000, chunk=40)
    loop.add(*(group_of(n, range(100), temperature=1.0, seed=n) for n in range(4)))
    steps = loop.run()
    of_prompt = [step for step in steps if len(step) == 1]
    assert sum(count for step in of_prompt for _, count in step) == 100
    assert steps[3] == [(0, 1), (1, 1), (2, 1), (3, 1)]  # the last token of the prompt, and 0's first new one
    assert loop.model.computed == 100 + 3 * 1 + 4 * 4


def test_one_that_waits_for_a_prefix_lets_others_pass():
    loop = Loop(1000, chunk=20)
    loop.add(group_of(0, range(50)), group_of(1, range(50)), numbered(2, 10))
    first = loop.step()
    assert [number for number, _ in first] == [0]
    assert [g.request_id for g in loop.scheduler.running] == [0, 2]
    assert [g.request_id for g in loop.scheduler.waiting] == [1]
    loop.run()
    assert loop.model.computed == 50 + 1 + 10 + 3 * 4


def test_one_waits_no_longer_than_until_its_prefix_is_computed():
    loop = Loop(1000, chunk=40)
    loop.add(group_of(0, range(100)), group_of(1, [*range(30), 7, 7]))
    assert [loop.step(), loop.step()] == [[(0, 40)], [(0, 40)]]
    assert [g.request_id for g in loop.scheduler.running] == [0, 1]
    loop.run()
    assert loop.model.computed == 100 + 2 + 2 * 4


def test_the_prefix_of_an_ended_request_is_copied_as_long_as_it_is_there():
    loop = Loop(200)
    loop.add(group_of(0, range(60)))
    loop.run()
    begun = loop.model.computed
    loop.add(group_of(1, [*range(40), 3, 3]))
    loop.run()
    assert loop.model.computed - begun == 2 + 4
    loop.add(numbered(2, 190))  # takes all memory
    loop.run()
    begun = loop.model.computed
    loop.add(group_of(3, [*range(40), 3, 3]))
    loop.run()
    assert loop.model.computed - begun == 42 + 4


def test_a_prefix_that_must_give_way_to_its_own_copy_is_computed():
    loop = Loop(70)
    loop.add(group_of(0, range(60)))
    loop.run()
    loop.add(group_of(1, [*range(40), 3, 3]))
    loop.run()
    assert loop.model.computed == 60 + 4 + 42 + 4


def test_short_prefixes_are_computed_and_an_echoed_prompt_too():
    loop = Loop(1000)
    loop.add(group_of(0, range(15)), group_of(1, range(15)))
    assert loop.step() == [(0, 15), (1, 15)]
    loop.run()
    loop.add(group_of(2, range(30)))
    loop.run()
    loop.add(group_of(3, range(30), echo=True))
    assert loop.step() == [(3, 30)]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_removed_requests_leave_no_memory_behind(steps):
    loop = Loop(100, chunk=10)
    loop.add(numbered(0, 8, new=12), group_of(1, range(25)), group_of(1, range(25), seed=3), numbered(2, 60))
    for _ in range(steps):
        loop.step()
    assert [g.request_id for g in loop.scheduler.remove(1)] == [1, 1]
    assert not any(g.request_id == 1 for g in [*loop.scheduler.waiting, *loop.scheduler.running])
    assert loop.scheduler.allocator.num_used_tokens == sum(g.max_length for g in loop.scheduler.running)
    assert loop.scheduler.remove(1) == []
    loop.run()
    assert sorted(g.request_id for g in loop.ended) == [0, 2]


def test_a_step_asks_for_logits_only_where_a_token_is_chosen():
    loop = Loop(100, chunk=10)
    loop.add(numbered(0, 25))
    num_logits = []
    while loop.scheduler.waiting or loop.scheduler.running:
        loop.scheduler.admit(loop._copy)
        num_logits.append(loop.scheduler.schedule()[0].sequences[0].num_logits)
        loop.step()
    assert num_logits == [0, 0, 1, 1, 1, 1, 1]


def clients(groups) -> list[int]:
    return sorted(group.request.client for group in groups)


@pytest.mark.parametrize("tokens", [1000, 4 * 35])  # rows or memory are short
def test_a_client_with_many_requests_does_not_keep_another_waiting(tokens):
    loop = Loop(tokens, max_batch_size=4 if tokens == 1000 else 8)
    loop.add(*(numbered(n, 4, new=30 + n) for n in range(10)))
    for _ in range(5):
        loop.step()
    loop.add(numbered(10, 4, new=2, client=1))
    assert (10, 4) in loop.step() and (10, 1) in loop.step()
    assert [group.request_id for group in loop.ended] == [10]
    loop.run()  # also those that were preempted end with the right tokens
    assert len(loop.ended) == 11
    assert loop.model.computed <= 10 * 4 + sum(range(29, 39)) + 4 + 1 + 4 + 6


def test_clients_get_equal_shares_and_nobody_is_preempted_for_less():
    loop = Loop(1000, max_batch_size=6)
    loop.add(*(numbered(n, 4, new=30) for n in range(8)))
    loop.step()
    loop.add(*(numbered(n, 4, new=30, client=1) for n in range(10, 18)), numbered(20, 4, new=30, client=2))
    loop.step()
    assert clients(loop.scheduler.running) == [0, 0, 0, 1, 1, 2]
    running = list(loop.scheduler.running)
    for _ in range(10):
        loop.step()
    assert loop.scheduler.running == running
    loop.add(numbered(30, 4, client=3))  # one of each client's at least goes on
    loop.step()
    assert clients(loop.scheduler.running) == [0, 0, 1, 1, 2, 3]


def test_a_clients_only_group_is_not_preempted():
    loop = Loop(1000, max_batch_size=4)
    search = Request((7, 8), SamplingParams(max_new_tokens=8, num_beams=4))
    loop.add(BeamSearchGroup(0, search, ()), numbered(1, 4, client=1))
    assert {number for step in loop.run()[:8] for number, _ in step} == {0}


def test_long_prompts_of_one_client_leave_others_their_share_of_a_step():
    loop = Loop(2000, max_batch_size=8, chunk=20)
    loop.add(*(numbered(n, 100) for n in range(4)))
    assert loop.step() == [(0, 20)]
    loop.add(numbered(4, 8, client=1), numbered(5, 30, client=2))
    assert loop.step() == [(4, 7), (5, 7), (0, 6)]
    assert loop.step() == [(4, 1), (5, 10), (0, 10)]  # the last token of a prompt comes with those that decode
    loop.run()
