"""More requests than may wait, and the shares of those that wait."""

import json

import pytest
from raw_http import connect, ended, post
from running_server import in_thread, running

from opt_megatron.serving.admission import AdmissionQueue
from opt_megatron.serving.errors import ApiError
from opt_megatron.serving.limits import Limits

LONG = {"prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": True, "temperature": 0}


def test_beyond_the_queue_is_429_and_nothing_else_fails(alone):
    with running(alone, Limits(queue_length=3), max_batch_size=1) as server:
        server.wait_for(lambda: server.request("GET", "/health").status == 200)
        bodies = [json.dumps({**LONG, "max_tokens": new}).encode() for new in (400, 5, 5, 5)]
        connections = [connect(server) for _ in bodies]
        connections[0].sendall(post("/v1/completions", bodies[0], "Connection: close"))
        server.wait_for(lambda: server.metric("vllm:num_requests_running") == 1)
        server.brake.on()
        for connection, body in zip(connections[1:], bodies[1:], strict=True):
            connection.sendall(post("/v1/completions", body, "Connection: close"))
        server.wait_for(lambda: server.metric("vllm:num_requests_waiting") == 3)
        refused = server.complete(prompt="x")
        assert refused.status == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json["error"]["code"] == "queue_full" and "3 may" in refused.json["error"]["message"]
        assert server.complete(prompt=["x", "y"], n=2).status == 400  # would never fit
        assert server.complete(prompt="x", best_of=4).status == 400  # as what is drawn counts
        server.brake.off()
        assert all(b" 200 OK" in ended(connection) for connection in connections)
        assert server.complete(prompt="x").status == 200


def test_one_large_request_leaves_others_a_share_of_the_queue():
    queue = AdmissionQueue(100)
    queue.check(100)
    queue.add(1, 100)
    queue.check(50)
    with pytest.raises(ApiError, match="100 continuations wait and 100 may"):
        queue.check(51)
    queue.add(2, 50)
    queue.check(33)
    queue.start(1, 100)
    queue.check(50)
    queue.start(2, 50)
    queue.check(100)
    for client in range(100):
        queue.add(client, 1)
    with pytest.raises(ApiError, match="100 continuations wait"):
        queue.check(1)


def test_a_small_request_is_answered_while_a_large_one_runs(alone):
    with running(alone, max_batch_size=4) as server:
        server.wait_for(lambda: server.request("GET", "/health").status == 200)
        with connect(server) as large:
            large.sendall(post("/v1/completions", json.dumps({**LONG, "n": 16, "temperature": 1}).encode()))
            server.wait_for(lambda: server.metric("vllm:num_requests_running") == 1)
            server.brake.on()
            small = in_thread(lambda: server.complete(prompt="Hi", max_tokens=2))
            server.wait_for(lambda: len(server.async_engine._requests) == 2)
            steps = server.brake.steps
            server.brake.off()
            assert small().json["usage"]["completion_tokens"] == 2
            assert server.brake.steps - steps < 1000  # the large one takes 2000
            assert server.metric("vllm:num_requests_running") == 1
