"""Requests that arrive, and are cancelled, while others run; with a rule instead of the model."""

import threading
from collections import defaultdict

import pytest
import rank_jobs
from rule_model import RuleModel, rule_engine

from opt_megatron.checkpoint.load import load_model
from opt_megatron.generation.core import engine as engine_module
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.core.request_queue import RequestQueue
from opt_megatron.generation.decoding.sampling_group import SamplingGroup
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling import sampler
from opt_megatron.generation.sampling.sampler import choose_token
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.generation.step import BLOCK_SIZE
from opt_megatron.parallel.command_loop import KEEP_ALIVE, STOP

VOCABULARY = 12


@pytest.fixture(scope="module")
def model(models, alone):
    return load_model(models["pre-norm"][0], None, alone)


@pytest.fixture
def engine(model, alone):
    return rule_engine(Engine(model, alone, max_batch_size=3), RuleModel(VOCABULARY))


def request(number: int, new: int = 10, **options) -> Request:
    params = SamplingParams(max_new_tokens=new, ignore_eos=True, **({"temperature": 0} | options))
    return Request((number % VOCABULARY, 3, 5), params)


def tokens_of(events) -> dict[int, tuple[int, ...]]:
    tokens = defaultdict(tuple)
    for event in events:
        tokens[event.request] += (event.token,)
    return tokens


def wanted(one: Request) -> tuple[int, ...]:
    return RuleModel(VOCABULARY).continued(one.prompt, one.params)


def used(engine: Engine) -> int:
    return engine._scheduler.allocator.num_used_tokens


def test_another_thread_puts_requests_while_the_engine_runs(engine):
    queue, requests = RequestQueue(), [request(n, new=1 + n % 7) for n in range(30)]

    def put():
        numbers = [queue.put(one) for one in requests]
        assert numbers == list(range(30))
        queue.close()

    thread = threading.Thread(target=put)
    thread.start()
    events = list(engine.generate(queue))
    thread.join()
    assert tokens_of(events) == {n: wanted(one) for n, one in enumerate(requests)}
    assert used(engine) == 0


def test_a_new_request_joins_those_that_run(engine):
    queue, seen = RequestQueue([request(0)]), []
    for event in engine.generate(queue):
        seen.append(event)
        if len(seen) == 4:
            assert queue.put(request(1)) == 1
            queue.close()
    assert [event.request for event in seen[:8]] == [0, 0, 0, 0, 0, 1, 0, 1]
    assert tokens_of(seen) == {0: wanted(request(0)), 1: wanted(request(1))}
    with pytest.raises(RuntimeError, match="the queue is closed"):
        queue.put(request(2))


def test_cancelled_requests_end_and_leave_the_others_alone(engine):
    events, requests = [], [request(n) for n in range(5)]
    for event in engine.generate(requests):
        events.append(event)
        if len(events) == 6:
            engine.cancel(1)  # runs
            engine.cancel(4)  # waits
            engine.cancel(99)  # is none
    ends = {event.request: event.finish_reason for event in events if event.finish_reason}
    assert ends == {0: "length", 1: "cancelled", 2: "length", 3: "length", 4: "cancelled"}
    tokens = tokens_of(events)
    assert tokens[1] == (*wanted(requests[1])[:2], None) and tokens[4] == (None,)
    assert all(tokens[n] == wanted(requests[n]) for n in (0, 2, 3))
    begun = [event.request for event in events].index(3)
    assert begun < 12  # in the place of 1
    assert used(engine) == 0
    engine.cancel(0)  # nothing runs any more


def test_what_a_cancelled_request_held_is_free_at_the_next_step(model, alone):
    per_token = Engine(model, alone)._runners[0].cache_bytes_per_token
    engine = Engine(model, alone, kv_cache_memory=BLOCK_SIZE * per_token)
    rule_engine(engine, RuleModel(VOCABULARY))
    queue, events = RequestQueue([request(0, new=50), request(1, new=50)]), []
    for event in engine.generate(queue):
        events.append(event)
        if len(events) == 3:
            assert used(engine) == BLOCK_SIZE and {e.request for e in events} == {0}
            queue.cancel(0)
            queue.close()
    assert [event.request for event in events] == [0] * 4 + [1] * 50
    assert tokens_of(events)[1] == wanted(request(1, new=50))


@pytest.mark.parametrize(
    ("options", "choices"),
    [
        ({"temperature": 1, "n": 3}, [0, 1, 2]),
        ({"temperature": 1, "n": 2, "best_of": 3}, [0, 1]),
        ({"num_beams": 3, "n": 2}, [0, 1]),
        ({"temperature": 1, "penalty_alpha": 0.5, "top_k": 3}, [0]),
    ],
)
def test_each_continuation_of_a_cancelled_request_ends_once(engine, options, choices):
    queue = RequestQueue([request(0, new=5), request(1, new=30, **options)])
    events = engine.generate(queue)
    seen = [next(events) for _ in range(2)]
    queue.cancel(1)
    queue.close()
    seen += events
    assert sorted(e.choice for e in seen if e.finish_reason == "cancelled" and e.request == 1) == choices
    assert tokens_of(e for e in seen if e.request == 0)[0] == wanted(request(0, new=5))
    assert used(engine) == 0 and not engine._outputs.best_of


def test_best_of_forgets_what_has_ended(engine):
    queue = RequestQueue([request(0, temperature=1, best_of=2), request(1)])
    queue.close()
    events = list(engine.generate(queue))
    assert len(events) == 20 and not engine._outputs.best_of


def test_a_request_that_cannot_run_is_refused_and_the_others_go_on(engine):
    impossible = {"banned_tokens": tuple(range(VOCABULARY))}
    queue = RequestQueue([request(0), Request((2,) * 300), request(2, **impossible), request(3)])
    queue.close()
    events = list(engine.generate(queue))
    refused = [event for event in events if event.finish_reason == "refused"]
    assert sorted(event.request for event in refused) == [1, 2]
    assert {event.token for event in refused} == {None}
    assert "has 300 tokens" in refused[0].text and "no token is possible" in refused[1].text
    tokens = tokens_of(event for event in events if event not in refused)
    assert tokens == {0: wanted(request(0)), 3: wanted(request(3))}
    assert used(engine) == 0


def test_while_nothing_comes_the_followers_hear_so(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "_KEEP_ALIVE_SECONDS", 0.01)
    queue, heard, sent = RequestQueue(), threading.Event(), []

    def send(command, numbers=()):
        sent.append(command)
        if command is KEEP_ALIVE:
            heard.set()

    engine._executor.commands.send = send

    def put():
        assert heard.wait(30)
        queue.put(request(0))
        queue.close()

    thread = threading.Thread(target=put)
    thread.start()
    assert tokens_of(engine.generate(queue)) == {0: wanted(request(0))}
    thread.join()
    assert KEEP_ALIVE in sent and sent[-1] is STOP


def test_two_ranks_serve_a_queue(models, ranks):
    leader, follower = ranks(2).run(rank_jobs.served_from_a_queue, models["pre-norm"][0], 2)
    assert leader == {0: "length", 1: "cancelled", 2: "refused", 3: "length"}
    assert follower == {}


def test_a_request_that_fails_through_our_own_error_ends_alone(engine, monkeypatch):
    """Wherever it happens: when the group is made, when its token is chosen, when its text is scanned."""
    accept, made = SamplingGroup.accept_token, SamplingGroup.__init__

    def failing_init(group, request_id, *arguments, **options):
        if request_id == 1:
            raise ZeroDivisionError("made")
        made(group, request_id, *arguments, **options)

    def failing_accept(group, token, logits=None):
        if group.request_id == 2 and group.history.output:
            raise ZeroDivisionError("accepted")
        return accept(group, token, logits)

    monkeypatch.setattr(SamplingGroup, "__init__", failing_init)
    monkeypatch.setattr(SamplingGroup, "accept_token", failing_accept)
    queue = RequestQueue([request(0), request(1), request(2, temperature=1), request(3)])
    queue.close()
    events = list(engine.generate(queue))
    failed = {event.request: event.text for event in events if event.finish_reason == "failed"}
    assert failed == {1: "ZeroDivisionError: made", 2: "ZeroDivisionError: accepted"}
    tokens = tokens_of(event for event in events if event.request in (0, 3))
    assert tokens == {0: wanted(request(0)), 3: wanted(request(3))}
    assert used(engine) == 0


def test_an_error_of_one_sampled_request_leaves_the_others_their_numbers(engine, monkeypatch):
    def failing(logits, state):
        if state.chain.params.seed == 7:
            raise ZeroDivisionError("chosen")
        return choose_token(logits, state)

    requests = [request(n, temperature=1, seed=seed) for n, seed in enumerate((5, 7, 9))]
    expected = tokens_of(engine.generate([requests[0], requests[2]]))
    monkeypatch.setattr(sampler, "choose_token", failing)
    queue = RequestQueue(requests)
    queue.close()
    tokens = tokens_of(engine.generate(queue))
    assert (tokens[0], tokens[1], tokens[2]) == (expected[0], (None,), expected[1])
