"""The API key, and bodies that are too large or of another type."""

import http.client
import json

import pytest
from raw_http import connect, ended
from running_server import SECONDS, running

from opt_megatron.serving.limits import Limits


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
