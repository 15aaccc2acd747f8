"""Streams, clients that go away, and the time limit of a request."""

import json

import pytest
from raw_http import connect, post
from running_server import LONG, aborted, running

from opt_megatron.serving.limits import Limits

PROMPT = "Once upon a time"


def choices_of(events):
    """A stream's pieces, joined."""
    choices = {}
    for event in events:
        for piece in event["choices"]:
            choice = choices.setdefault(piece["index"], {"text": "", "finish_reason": None, "logprobs": None})
            assert choice["finish_reason"] is None
            choice["text"] += piece["text"]
            choice["finish_reason"] = piece["finish_reason"]
            for name in ("token_ids", "prompt_token_ids", "prompt_logprobs"):
                if name in piece:
                    choice[name] = choice.get(name, []) + piece[name]
            if piece["logprobs"]:
                logprobs = choice["logprobs"] = choice["logprobs"] or {name: [] for name in piece["logprobs"]}
                for name, values in piece["logprobs"].items():
                    logprobs[name] += values
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprobs": 3},
        {"echo": True, "logprobs": 1, "n": 2},
        {"echo": True, "n": 2},
        {"echo": True, "logprobs": 0, "max_tokens": 0},
        {"echo": True, "max_tokens": 0},
        {"stop": ["e", " a"]},
        {"n": 3, "best_of": 4, "logprobs": 1},
        {"prompt": [PROMPT, "The king"], "n": 2},
        {"prompt": [[2, 700, 3000], [2, 4001]], "logit_bias": {"3": 3}},
        {"echo": True, "prompt_logprobs": 1, "logprobs": 0, "return_token_ids": True, "n": 2},
        {"use_beam_search": True, "n": 2},
        {"max_tokens": 0, "return_token_ids": True},
    ],
)
def test_a_stream_is_the_whole_answer_in_pieces(server, options):
    options = {"prompt": PROMPT, "max_tokens": 12, "seed": 2, **options}
    whole = server.complete(**options).json
    answer = server.complete(**options, stream=True, stream_options={"include_usage": True})
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream")
    *events, last = answer.events
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert {event["usage"] for event in events} == {None} and len({event["id"] for event in events}) == 1
    streamed = choices_of(events)
    for got, wanted in zip(streamed, whole["choices"], strict=True):
        assert (got["text"], got["finish_reason"]) == (wanted["text"], wanted["finish_reason"])
        for name in ("tokens", "text_offset") if wanted["logprobs"] else ():
            assert got["logprobs"][name] == wanted["logprobs"][name]
        for name in ("token_ids", "prompt_token_ids", "prompt_logprobs"):
            assert got.get(name) == wanted.get(name)
    assert "usage" not in server.complete(**options, stream=True).events[-1]


def test_the_tokens_so_far_can_be_in_every_chunk(server):
    options = {"prompt": PROMPT, "max_tokens": 4, "ignore_eos": True, "return_token_ids": True, "stream": True}
    usage = {"include_usage": True, "continuous_usage_stats": True}
    events = server.complete(**options, stream_options=usage).events
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 4, 4]
    assert {event["usage"]["prompt_tokens"] for event in events} == {5}
    events = server.complete(**options, stream_options={"continuous_usage_stats": True}).events
    assert not any("usage" in event for event in events)


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
    assert server.async_engine.model.engine.kv_cache_usage == 0


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
