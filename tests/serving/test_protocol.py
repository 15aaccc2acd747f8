"""Which request bodies are accepted."""

import json

import pytest
from body_reading import read, refused
from pydantic import ValidationError

from opt_megatron.generation.generation_config import GenerationConfig
from opt_megatron.serving.protocol import CompletionRequest, DetokenizeRequest, MetaseqRequest, TokenizeRequest


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


def test_a_beam_search_is_not_sampled_whatever_the_model_says():
    config = GenerationConfig(defaults={"top_k": 5, "temperature": 0.7, "repetition_penalty": 1.2})
    body = read(CompletionRequest, b'{"prompt": "a", "use_beam_search": true, "n": 2, "best_of": 3}')
    options = config.with_defaults(body.given_options())
    assert (options["num_beams"], options["n"], options["best_of"], options["temperature"]) == (3, 2, None, 0)
    assert "top_k" not in options and options["repetition_penalty"] == 1.2


def test_fields_that_change_nothing_are_taken():
    unused = {
        "user": "u" * 10_000, "suffix": "", "detokenize": True, "spaces_between_special_tokens": False,
        "priority": -3, "request_id": "r1", "cache_salt": "x", "metadata": {"a": [1]}, "session_id": "s",
        "stream_interval": 4, "response_format": {"type": "text"},
        "stream_options": {"include_obfuscation": False}, "stream": True,
    }  # fmt: skip
    read(CompletionRequest, json.dumps({"prompt": "a", **unused}).encode())
    read(MetaseqRequest, b'{"prompt": "a", "model": "x", "user": "u", "stream": false}')


def test_metaseqs_numbers_are_strings_and_its_values_for_off_are_taken():
    sent = {
        "max_tokens": "8", "min_tokens": "2", "n": "2", "best_of": "0", "logprobs": "1", "seed": "7", "top_p": "0.9",
        "temperature": "1.0", "alpha_presence": "-1", "lambda_decay": -1, "omega_bound": "0.3",
        "alpha_src_penalty_end_idx": "-1",
    }  # fmt: skip
    body = read(MetaseqRequest, json.dumps({"prompt": "a", **sent}).encode())
    assert {name: getattr(body, name) for name in sent} == {name: float(value) for name, value in sent.items()}
    assert read(MetaseqRequest, b'{"prompt": "a"}').omega_bound == 0.3  # metaseq's default
    refused(MetaseqRequest, b'{"prompt": "a", "max_tokens": "8.5"}')
    refused(MetaseqRequest, b'{"prompt": "a", "alpha_src_penalty_end_idx": 5}')


def test_other_kinds_of_bodies_have_bounds_too():
    for kind, body in (
        (MetaseqRequest, b'{"prompt": "a", "stream": true}'),
        (TokenizeRequest, b'{"prompt": "\\ud800"}'),
        (TokenizeRequest, b'{"prompt": ["a"]}'),
        (DetokenizeRequest, b'{"tokens": [-1]}'),
        (DetokenizeRequest, b'{"tokens": "a"}'),
    ):
        refused(kind, body)


@pytest.mark.parametrize("kind", [CompletionRequest, MetaseqRequest, TokenizeRequest, DetokenizeRequest])
@pytest.mark.parametrize("item", ["", -1, None, [], {}])
def test_a_large_body_is_refused_before_its_items_are_checked(kind, item):
    """Every error takes microseconds of the event loop, and a body has room for a million."""
    many = 30_000
    for name in kind.model_fields:
        for value in ([item] * many, {str(n): item for n in range(many)}):
            with pytest.raises(ValidationError) as caught:
                kind.model_validate({"prompt": "a", "tokens": [1], "stream": True} | {name: value})
            assert caught.value.error_count() <= 20, name
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({f"unknown {n}": item or 0 for n in range(many)})
    assert caught.value.error_count() <= 2
