"""The messages with which bodies are refused."""

import pytest
from body_reading import refused

from opt_megatron.serving.protocol import CompletionRequest

HOSTILE = [
    (b"", "must be a JSON object, not empty"),
    (b"{", "not JSON"),
    (b"[]", "must be a JSON object, not an array"),
    (b"null", "must be a JSON object, not "),
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
    (b'{"prompt": "a", "top_p": -0.1}', "top_p: must be greater than or equal to 0"),
    (b'{"prompt": "a", "n": 0}', "n: must be greater"),
    (b'{"prompt": "a", "n": 129}', "n: must be less"),
    (b'{"prompt": "a", "n": 1.5}', "n: must be a valid integer"),
    (b'{"prompt": "a", "seed": -9223372036854775809}', "seed: must be greater"),
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
    (
        b'{"prompt": "a", "logit_bias": {' + b",".join(b'"%d":"x"' % n for n in range(1025)) + b"}}",
        "logit_bias: must have at most 1024 items, not 1025",
    ),
    (b'{"prompt": [' + b'"",' * 10_000 + b'""]}', "prompt: must have at most 10000 prompts, not 10001"),
    (b'{"prompt": "a", "aa": 1, "bb": 2}', "there is no field 'aa'"),
    (b'{"prompt": "a", "stream_options": {"include_usage": true}}', "stream is not true"),
    (b'{"prompt": "a", "truncate_prompt_tokens": 0}', "truncate_prompt_tokens is 0"),
    (b'{"prompt": "a", "model": "' + b"x" * 257 + b'"}', "model: must have at most 256 characters"),
    (b'{"prompt": "a", "suffix": "b"}', "suffix is not empty, but OPT does not fill in text"),
    (b'{"prompt": "a", "allowed_tokenids": [5]}', "there is no field 'allowed_tokenids'"),
    (b'{"prompt": "a", "stream": true, "stream_options": {"include_usag": true}}', "stream_options.include_usag"),
    (b'{"prompt": "a", "use_beam_search": true, "temperature": 0.5}', "temperature is 0.5, but must be 0 or 1"),
    (b'{"prompt": "a", "truncation_side": "middle"}', "truncation_side: must be 'left' or 'right'"),
    (b'{"prompt": "a", "bad_words": "king"}', "bad_words: must be a valid"),
]


@pytest.mark.parametrize(("body", "message"), HOSTILE, ids=[f"{n}" for n in range(len(HOSTILE))])
def test_other_bodies_are_refused_in_a_sentence(body, message):
    assert message in refused(CompletionRequest, body)["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/completions", "/tokenize", "/detokenize"])
def test_hostile_bodies_are_400_with_a_sentence(server, path):
    for body, _ in HOSTILE:
        body = body.replace(b'"prompt": "a",', b'"prompt": "a", "max_tokens": 1,')  # what is accepted ends soon
        answer = server.request("POST", path, body)
        if answer.status != 200:  # what one route does not know may be nothing to another
            assert answer.status == 400 and answer.json["error"]["message"], body
    assert server.request("GET", "/health").status == 200


def test_what_is_said_of_two_fields_names_one():
    for body, field in (
        (b'{"prompt": "a", "truncate_prompt_tokens": 0}', "truncate_prompt_tokens"),
        (b'{"prompt": "a", "stream_options": {}}', "stream_options"),
    ):
        assert refused(CompletionRequest, body)["param"] == field
