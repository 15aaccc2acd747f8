"""/openapi.json describes what the routes take and return."""

import pytest
from starlette.testclient import TestClient

from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.options import options_of
from opt_megatron.serving.app import make_app
from opt_megatron.serving.async_engine import AsyncEngine
from opt_megatron.serving.limits import Limits
from opt_megatron.serving.metrics import Metrics


@pytest.fixture(scope="module")
def document():
    return make_app(AsyncEngine(lambda: None, Limits(), Metrics("story"))).openapi()


def test_every_sampling_option_with_an_api_name_is_a_field_with_its_range(document):
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    declared = {option.api_name for option in options_of(SamplingParams).values() if option.api_name}
    assert declared <= set(fields) and all(fields[name]["description"] for name in declared)
    number, null = fields["temperature"]["anyOf"]
    assert number == {"type": "number", "minimum": 0, "maximum": 100} and null == {"type": "null"}
    assert fields["temperature"]["default"] == 1 and fields["max_tokens"].get("default") is None


def test_routes_name_their_bodies_and_errors(document):
    for path, name in (
        ("/v1/completions", "CompletionRequest"),
        ("/v2/engines/{engine}/completions", "MetaseqRequest"),
        ("/tokenize", "TokenizeRequest"),
        ("/detokenize", "DetokenizeRequest"),
    ):
        operation = document["paths"][path]["post"]
        body = operation["requestBody"]
        assert body["required"] and body["content"]["application/json"]["schema"]["$ref"].endswith(f"/{name}")
        assert {"400", "429"} <= set(operation["responses"]) and "422" not in operation["responses"]


@pytest.mark.parametrize(
    ("allowed", "origin", "answer"),
    [
        (("http://page.example",), "http://page.example", "http://page.example"),
        (("http://page.example",), "http://other.example", None),
        (("*",), "http://other.example", "*"),
        ((), "http://page.example", None),
    ],
)
def test_pages_of_allowed_origins_may_send_requests(allowed, origin, answer):
    engine = AsyncEngine(lambda: None, Limits(), Metrics("story"))
    client = TestClient(make_app(engine, "key", allowed_origins=allowed))
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    preflight = client.options("/v1/completions", headers={"Origin": origin} | asked)
    assert preflight.headers.get("access-control-allow-origin") == answer
    response = client.post("/v1/completions", headers={"Origin": origin}, json={})  # without the key
    assert (response.status_code, response.headers.get("access-control-allow-origin")) == (401, answer)
