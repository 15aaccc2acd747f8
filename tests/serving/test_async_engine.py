"""From loading to the end: health, an orderly shutdown, an engine that fails."""

import signal
import threading
import time

from running_server import SECONDS, in_thread, running

from opt_megatron.errors import UserError
from opt_megatron.generation.decoding.sampling_group import SamplingGroup
from opt_megatron.serving.async_engine import EngineTimeoutError
from opt_megatron.serving.limits import Limits

LONG = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


def health(server):
    answer = server.request("GET", "/health")
    return answer.status, answer.json["status"]


def test_it_is_healthy_when_the_model_is_ready(alone):
    go = threading.Event()
    with running(alone, before_ready=lambda: go.wait(SECONDS)) as server:
        assert health(server) == (503, "loading")
        answer = server.complete(prompt="Once")
        assert answer.status == 503 and "being loaded" in answer.json["error"]["message"]
        assert server.request("GET", "/v1/models").status == 503
        assert server.request("GET", "/").status == 200
        go.set()
        server.wait_for(lambda: health(server) == (200, "ready"))


def test_a_signal_lets_running_requests_finish_and_takes_no_more(alone):
    with running(alone) as server:
        server.wait_for(lambda: health(server)[0] == 200)
        server.brake.on()
        result = in_thread(lambda: server.complete(**LONG))
        server.wait_for(lambda: bool(server.async_engine._requests))
        server.server.handle_exit(signal.SIGTERM, None)
        server.wait_for(lambda: health(server) == (503, "shutting down"))
        assert server.complete(prompt="Once").status == 503
        server.brake.off()
        answer = result()
        assert answer.status == 200 and answer.json["usage"]["completion_tokens"] == 400
        server.thread.join(SECONDS)
        assert not server.thread.is_alive() and server.server.raised is None


def test_what_takes_too_long_at_the_end_is_cancelled(alone):
    with running(alone, Limits(drain_seconds=0.2)) as server:
        server.wait_for(lambda: health(server)[0] == 200)
        server.brake.on()
        results = [in_thread(lambda s=s: server.complete(**LONG, stream=s)) for s in (False, True)]
        server.wait_for(lambda: len(server.async_engine._requests) == 2)
        server.server.handle_exit(signal.SIGTERM, None)
        whole, streamed = (result() for result in results)
        assert whole.status == 503 and streamed.events[-1]["error"]["message"] == "the server is shutting down"
        server.brake.off()
        server.thread.join(SECONDS)
        assert not server.thread.is_alive() and server.server.raised is None


def test_an_engine_that_fails_ends_everything_with_its_error(alone):
    with running(alone) as server:
        server.wait_for(lambda: health(server)[0] == 200)
        server.brake.on()
        server.brake.error = RuntimeError("Connection closed by peer")
        results = [in_thread(lambda s=s: server.complete(**LONG, stream=s)) for s in (False, True)]
        server.wait_for(lambda: len(server.async_engine._requests) == 2)
        server.brake.off()
        whole, streamed = (result() for result in results)
        assert whole.status == 503 and whole.json["error"]["message"] == "the engine has stopped"
        assert streamed.events[-1]["error"]["message"] == "the engine has stopped"
        server.thread.join(SECONDS)
        assert str(server.server.raised) == "Connection closed by peer"


def test_a_step_that_never_ends_is_a_lost_rank(alone):
    with running(alone, Limits(step_seconds=0.5)) as server:
        server.wait_for(lambda: health(server)[0] == 200)
        time.sleep(1.2)  # waiting for requests is no step
        assert server.complete(prompt="Once", max_tokens=2).status == 200
        server.brake.on()
        assert server.complete(**LONG).status == 503
        server.thread.join(SECONDS)
        assert isinstance(server.server.raised, EngineTimeoutError)


def test_a_rank_without_a_sign_of_life_ends_an_idle_server(alone):
    with running(alone, Limits(step_seconds=0.5)) as server:
        server.wait_for(lambda: health(server)[0] == 200)
        server.async_engine.lose_rank("rank 1 is lost")
        server.thread.join(SECONDS)
        assert str(server.server.raised) == "rank 1 is lost"


def test_a_model_that_cannot_be_loaded_ends_the_server(alone):
    def fail():
        raise UserError("there is no such model")

    with running(alone, before_ready=fail) as server:
        server.thread.join(SECONDS)
        assert str(server.server.raised) == "there is no such model"


def test_an_error_of_one_request_is_500_for_it_alone(alone, monkeypatch):
    made = SamplingGroup.accept_token

    def accept(group, token, logits=None):
        if group.request.params.seed == 13:
            raise ZeroDivisionError("thirteen")
        return made(group, token, logits)

    monkeypatch.setattr(SamplingGroup, "accept_token", accept)
    with running(alone) as server:
        server.wait_for(lambda: health(server)[0] == 200)
        answer = server.complete(prompt="Once", seed=13)
        assert answer.status == 500 and "thirteen" in answer.json["error"]["message"]
        (event,) = server.complete(prompt="Once", seed=13, stream=True).events
        assert event["error"]["code"] == "internal_error"
        assert server.complete(prompt="Once", seed=14).status == 200
        assert server.metric("vllm:request_success_total", finished_reason="error") == 2
        assert server.request("HEAD", "/health").status == 200
