"""Clients that ask for too much, go away, are slow, or mean harm: the others notice nothing."""

import http.client
import json
import socket
import time

import pytest
from running_server import SECONDS, running
from test_protocol import HOSTILE

from opt_megatron.serving.connection import BoundedConnection
from opt_megatron.serving.limits import Limits

LONG = {"prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": True, "temperature": 0}


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def connect(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS)


def ended(connection: socket.socket) -> bytes:
    """What is received until the server closes the connection."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def aborted(server) -> float:
    return server.metric("vllm:request_success_total", finished_reason="abort")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request(server, stream):
    before = aborted(server)
    server.brake.on()
    connection = connect(server)
    connection.sendall(post("/v1/completions", json.dumps({**LONG, "n": 1, "stream": stream}).encode()))
    server.wait_for(lambda: len(server.async_engine._requests) == 1)
    connection.close()
    steps = server.brake.steps
    server.wait_for(lambda: bool(server.async_engine._thread.queue._cancelled))
    server.brake.off()
    server.wait_for(lambda: not server.async_engine._requests)
    assert aborted(server) == before + 1
    assert server.brake.steps - steps <= 3  # of 500
    assert server.metric("vllm:num_requests_running") == 0
    assert server.async_engine.model.engine._scheduler.memory.used_tokens == 0


def test_a_client_that_goes_away_between_tokens(server):
    before = aborted(server)
    connection = connect(server)
    connection.sendall(post("/v1/completions", json.dumps({**LONG, "stream": True}).encode()))
    received = b""
    while b"data: " not in received:
        received += connection.recv(1024)
    connection.close()
    server.wait_for(lambda: not server.async_engine._requests)
    assert aborted(server) == before + 1
    assert server.complete(prompt="Once").status == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/completions", "/tokenize", "/detokenize"])
def test_hostile_bodies_are_400_with_a_sentence(server, path):
    for body, _ in HOSTILE:
        answer = server.request("POST", path, body)
        if answer.status != 200:  # what one route does not know may be nothing to another
            assert answer.status == 400 and answer.json["error"]["message"], body
    assert server.request("GET", "/health").status == 200


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"\x00\x01\x02\xff" * 100, b"400"),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /%ff%fe%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
        (b"GET /v1/models/%ed%a0%80 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"400"),
        (b"PUT /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"405"),
    ],
)
def test_what_is_hardly_http_gets_an_answer(server, request_bytes, status):
    with connect(server) as connection:
        connection.sendall(request_bytes)
        assert ended(connection).split()[1] == status


def test_a_body_must_be_json_by_its_own_word(server):
    answer = server.request("POST", "/v1/completions", b'{"prompt": "a"}', {"Content-Type": "text/plain"})
    assert answer.status == 415 and "application/json" in answer.json["error"]["message"]
    answer = server.request(
        "POST", "/v1/completions", b'{"prompt": "a"}', {"Content-Type": "application/json; charset=utf-8"}
    )
    assert answer.status == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_413_and_read_to_its_end(alone, chunked):
    with running(alone, Limits(body_bytes=1000)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        body = b'{"prompt": "' + b"a" * 6000 + b'"}'
        content = iter([body[:3000], body[3000:]]) if chunked else body
        connection.request(
            "POST", "/v1/completions", content, {"Content-Type": "application/json"}, encode_chunked=chunked
        )
        answer = connection.getresponse()
        error = json.loads(answer.read())["error"]
        assert answer.status == 413 and "more than 1000 bytes" in error["message"]
        with connect(server) as endless:
            endless.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999\r\n\r\n" + b"a" * 9000
            )
            assert b" 413 " in ended(endless)


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


def test_a_key_is_asked_for(alone):
    with running(alone, api_key="s3cret") as server:
        server.wait_for(lambda: server.request("GET", "/health").status == 200)
        for path in ("/v1/models", "/metrics", "/nothing"):
            answer = server.request("GET", path)
            assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json["error"]["code"] == "invalid_api_key"
        for key in ("s3cret2", "S3cret", "", "s3cre", "é"):
            headers = {"Authorization": f"Bearer {key}".encode("latin-1")}
            assert server.request("POST", "/v1/completions", {"prompt": "a"}, headers).status == 401
        for scheme in ("Bearer", "bearer"):
            headers = {"Authorization": f"{scheme} s3cret"}
            assert server.request("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}, headers).status == 200
        assert server.request("GET", "/").status == 200


def test_a_request_has_a_time(alone):
    with running(alone, Limits(request_seconds=0.3)) as server:
        server.wait_for(lambda: server.request("GET", "/health").status == 200)
        server.brake.on()
        answer = server.complete(**LONG)
        assert answer.status == 504 and "within 0.3 s" in answer.json["error"]["message"]
        (event,) = server.complete(**LONG, stream=True).events
        assert event["error"]["code"] == "timeout"
        server.brake.off()
        server.wait_for(lambda: not server.async_engine._requests)
        assert aborted(server) == 2


def test_slow_clients_are_let_go(alone, monkeypatch):
    monkeypatch.setattr(BoundedConnection, "head_seconds", 0.5)
    with running(alone, Limits(body_seconds=0.5)) as server:
        server.wait_for(lambda: server.request("GET", "/health").status == 200)
        silent = [connect(server) for _ in range(40)]
        heads = [connect(server) for _ in range(40)]
        bodies = [connect(server) for _ in range(40)]
        refused = connect(server)
        refused.sendall(
            b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        )
        for body in bodies:
            body.sendall(post("/v1/completions", b"{}").replace(b"Content-Length: 2", b"Content-Length: 99"))
        for letter in b"GET / HTTP/1.1\r\nX: aaaaaaaaaaaaa":  # a byte now and then does not help
            for head in heads:
                try:
                    head.sendall(bytes([letter]))
                except OSError:
                    break
            time.sleep(0.03)
        assert server.complete(prompt="Once", max_tokens=1).status == 200
        assert {ended(connection) for connection in silent} == {b""}
        assert {ended(connection) for connection in heads} == {b""}
        assert all(b" 408 " in ended(connection) for connection in bodies)
        assert b" 408 " in ended(refused)
        server.wait_for(lambda: not server.server.server_state.connections)


def test_the_rest_of_a_body_that_is_answered_already_has_a_time(alone, monkeypatch):
    monkeypatch.setattr(BoundedConnection, "head_seconds", 0.3)
    with running(alone, api_key="s3cret") as server, connect(server) as connection:
        connection.sendall(post("/v1/completions", b"{}").replace(b"Content-Length: 2", b"Content-Length: 99"))
        assert b" 401 " in connection.recv(65536)
        server.wait_for(lambda: _is_closed(connection, b" "))


def _is_closed(connection: socket.socket, sent: bytes) -> bool:
    try:
        connection.sendall(sent)
    except OSError:
        return True
    return False


def test_a_client_that_reads_nothing_is_let_go(alone, monkeypatch):
    monkeypatch.setattr(BoundedConnection, "write_seconds", 0.3)
    with running(alone) as server:
        server.wait_for(lambda: server.request("GET", "/health").status == 200)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        many = {**LONG, "temperature": 1, "n": 8, "logprobs": 20, "stream": True}
        connection.sendall(post("/v1/completions", json.dumps(many).encode()))
        server.wait_for(lambda: bool(server.async_engine._requests))
        server.wait_for(lambda: not server.async_engine._requests)
        server.wait_for(lambda: not server.server.server_state.connections)
        assert aborted(server) == 1
        connection.close()
