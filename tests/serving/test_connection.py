"""Clients that are slow or do not speak HTTP do not affect others."""

import json
import socket
import time

import pytest
from raw_http import connect, ended, post
from running_server import LONG, aborted, running

from opt_megatron.serving.connection import BoundedConnection
from opt_megatron.serving.limits import Limits


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


def test_slow_clients_are_disconnected(alone, monkeypatch):
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


def test_a_client_that_reads_nothing_is_disconnected(alone, monkeypatch):
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
