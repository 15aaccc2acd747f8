"""What bodies are taken."""

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from opt_megatron.serving.app import add_error_handlers
from opt_megatron.serving.protocol import CompletionRequest, DetokenizeRequest, MetaseqRequest, TokenizeRequest


def post(kind, body):
    """The response of a route that takes this kind of body, and the body as the route gets it (None if refused)."""
    app = FastAPI()
    add_error_handlers(app)
    read = [None]

    @app.post("/")
    async def route(body: kind) -> None:
        read[0] = body

    response = TestClient(app).post("/", content=body, headers={"Content-Type": "application/json"})
    return response, read[0]


def read(kind, body):
    response, parsed = post(kind, body)
    assert response.status_code == 200, response.text
    return parsed


def refused(kind, body):
    """The error of a body that is refused."""
    response, _ = post(kind, body)
    assert response.status_code == 400 and set(response.json()) == {"error"}
    assert response.content.isascii() and len(response.content) < 500
    return response.json()["error"]


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        (b'"text"', ["text"]),
        (b'["a", "b"]', ["a", "b"]),
        (b"[2, 15]", [[2, 15]]),
        (b"[[2], [3, 4]]", [[2], [3, 4]]),
        (b'["a", [2]]', ["a", [2]]),
        (b'"\\ud83d\\ude00\\u0000"', ["\U0001f600\x00"]),
    ],
)
def test_prompts_come_in_all_forms(given, prompts):
    assert read(CompletionRequest, b'{"prompt": %s}' % given).prompt == prompts


def test_defaults_are_openais_and_null_is_a_default():
    nulls = b'{"prompt": "a", "max_tokens": null, "temperature": null, "stop": null, "suffix": null, "logprobs": null}'
    body = read(CompletionRequest, nulls)
    assert (body.max_tokens, body.temperature, body.top_p, body.n, body.stop, body.echo) == (None, 1, 1, 1, [], False)
    assert body == read(CompletionRequest, b'{"prompt": "a"}')


def test_values_keep_their_meaning():
    body = read(
        CompletionRequest, b'{"prompt": "a", "temperature": 1, "stop": "x", "logit_bias": {"7": -3}, "top_k": -1}'
    )
    assert (body.temperature, body.stop, body.logit_bias) == (1.0, ["x"], {7: -3.0})
    metaseq = read(MetaseqRequest, b'{"prompt": "a", "top_p": 0, "alpha_presence_src": 0.5}')
    assert (metaseq.top_p, metaseq.alpha_presence_src) == (0, 0.5)


def test_other_kinds_of_bodies_have_bounds_too():
    for kind, body in (
        (MetaseqRequest, b'{"prompt": "a", "stream": true}'),
        (TokenizeRequest, b'{"prompt": "\\ud800"}'),
        (TokenizeRequest, b'{"prompt": ["a"]}'),
        (DetokenizeRequest, b'{"tokens": [-1]}'),
        (DetokenizeRequest, b'{"tokens": "a"}'),
    ):
        refused(kind, body)
