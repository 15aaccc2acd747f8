"""What bodies are taken, and in which words others are refused."""

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from opt_megatron.serving.app import add_error_handlers
from opt_megatron.serving.engine_requests import engine_error
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


HOSTILE = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"[]", "must be a JSON object, not an array"),
    (b"null", "must be a JSON object, not null"),
    (b"3", "must be a JSON object, not a number"),
    (b"\xff{}", "not UTF-8: byte 0"),
    (b'{"prompt": "\xc3"}', "not UTF-8: byte 12"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN"),
    (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature: must be a finite number"),
    (b'{"prompt": "a", "logit_bias": {"1": 1e999}}', "logit_bias"),
    (b'{"prompt": "a", "max_tokens": ' + b"9" * 400 + b"}", "a number of 400 digits"),
    (b'{"prompt": "a", "max_tokens": ' + b"9" * 200 + b"}", "max_tokens: must be less than"),
    (b'{"prompt": "a", "temperature": ' + b"9" * 200 + b"}", "temperature: must be"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"prompt": ' * 50_000, "nested too deeply"),
    (b'{"prompt": "\\ud800"}', "prompt: character 0 is half of a surrogate pair"),
    (b'{"prompt": "a", "user": "\\udfff"}', "user"),
    (b'{"prompt": "a", "model": "\\udfff"}', "model"),
    (b'{"prompt": "a", "stop": ["\\udfff"]}', "stop"),
    (b'{"prompt": "a", "\\udfff": 1}', "as a unicode string"),
    (b"{}", "prompt is missing"),
    (b'{"prompt": null}', "prompt is missing"),
    (b'{"prompt": 3}', "prompt: must be a string, a list"),
    (b'{"prompt": []}', "prompt: must be a string, a list"),
    (b'{"prompt": [[]]}', "empty list"),
    (b'{"prompt": [1, "a"]}', "prompt: holds something"),
    (b'{"prompt": [true]}', "prompt: holds something"),
    (b'{"prompt": [1.0]}', "prompt: holds something"),
    (b'{"prompt": {"a": 1}}', "prompt: must be a string"),
    (b'{"prompt": "a", "temprature": 1}', "there is no field 'temprature'"),
    (b'{"prompt": "a", "temperature": "1"}', "temperature: must be a valid number"),
    (b'{"prompt": "a", "temperature": true}', "temperature: must be a valid number"),
    (b'{"prompt": "a", "temperature": -0.1}', "temperature: must be greater than or equal to 0"),
    (b'{"prompt": "a", "top_p": 0}', "top_p: must be greater than 0"),
    (b'{"prompt": "a", "n": 0}', "n: must be greater"),
    (b'{"prompt": "a", "n": 129}', "n: must be less"),
    (b'{"prompt": "a", "n": 1.5}', "n: must be a valid integer"),
    (b'{"prompt": "a", "seed": -1}', "seed: must be greater"),
    (b'{"prompt": "a", "seed": 9223372036854775808}', "seed: must be less"),
    (b'{"prompt": "a", "logprobs": 21}', "logprobs: must be less"),
    (b'{"prompt": "a", "echo": 1}', "echo: must be a valid boolean"),
    (b'{"prompt": "a", "stop": [""]}', "stop.0"),
    (b'{"prompt": "a", "stop": "' + b"x" * 1001 + b'"}', "stop.0"),
    (
        b'{"prompt": "a", "stop": ' + str(["x"] * 17).replace("'", '"').encode() + b"}",
        "stop: must have at most 16 items, not 17",
    ),
    (b'{"prompt": "a", "logit_bias": [1]}', "logit_bias: must be an object"),
    (b'{"prompt": "a", "logit_bias": {"-1": 1}}', "not a token id"),
    (b'{"prompt": "a", "logit_bias": {"\\u0661": 1}}', "not a token id"),
    (b'{"prompt": "a", "logit_bias": {"1": 1, "01": 2}}', "names a token id twice"),
    (b'{"prompt": "a", "logit_bias": {"1": 101}}', "logit_bias"),
    (b'{"prompt": "a", "stream_options": {"include_usage": true}}', "stream is not true"),
    (b'{"prompt": "a", "truncate_prompt_tokens": 0}', "truncate_prompt_tokens is 0"),
    (b'{"prompt": "a", "user": "' + b"x" * 257 + b'"}', "user: must have at most 256 characters"),
]


@pytest.mark.parametrize(("body", "message"), HOSTILE, ids=[f"{n}" for n in range(len(HOSTILE))])
def test_other_bodies_are_refused_in_a_sentence(body, message):
    assert message in refused(CompletionRequest, body)["message"]


def test_other_kinds_of_bodies_have_bounds_too():
    for kind, body in (
        (MetaseqRequest, b'{"prompt": "a", "stream": true}'),
        (TokenizeRequest, b'{"prompt": "\\ud800"}'),
        (TokenizeRequest, b'{"prompt": ["a"]}'),
        (DetokenizeRequest, b'{"tokens": [-1]}'),
        (DetokenizeRequest, b'{"tokens": "a"}'),
    ):
        refused(kind, body)


def test_what_is_said_of_two_fields_names_one():
    for body, field in (
        (b'{"prompt": "a", "truncate_prompt_tokens": 0}', "truncate_prompt_tokens"),
        (b'{"prompt": "a", "stream_options": {}}', "stream_options"),
    ):
        assert refused(CompletionRequest, body)["param"] == field


def test_the_engines_words_become_the_apis():
    error = engine_error("max_new_tokens is 0, but must be at least 1")
    assert (error.message, error.param) == ("max_tokens is 0, but must be at least 1", "max_tokens")
    for what in ("the prompt", "prompt 3"):
        assert engine_error(f"{what}: logit_bias has 4096, but ids go").param == "logit_bias"
    error = engine_error("the prompt has 600 tokens with BOS, and the model has 512 positions: shorten it")
    assert (error.param, error.code) == ("prompt", "context_length_exceeded")
