"""More requests than may wait."""

import json

from raw_http import connect, ended, post
from running_server import running

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
