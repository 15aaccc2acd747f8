"""Prompts that are refused or truncated, and options that the engine refuses."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
from running_server import TOKENIZER

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.config import OPTConfig
from opt_megatron.generation.generation_config import GenerationConfig
from opt_megatron.generation.sampling.watermark_options import WatermarkOptions
from opt_megatron.serving.engine_requests import decode, encode, engine_error, make_engine_requests
from opt_megatron.serving.errors import ApiError
from opt_megatron.serving.protocol import CompletionRequest, MetaseqRequest
from opt_megatron.serving.served_model import ServedModel

PROMPT = "Once upon a time"
IDS = TOKENIZER.encode(PROMPT)


def test_long_prompts_are_refused_or_cut(server):
    words = "word " * 600
    refused = server.complete(prompt=words)
    assert refused.status == 400 and refused.json["error"]["code"] == "context_length_exceeded"
    assert "512 positions" in refused.json["error"]["message"]
    assert server.complete(prompt=PROMPT, max_tokens=508).json["error"]["param"] == "prompt"
    assert server.complete(prompt=[2] * 505).json["usage"]["completion_tokens"] <= 7  # the default is what fits
    for keep, tokens in ((3, 3), (-1, 512 - 16)):
        body = server.complete(prompt=words, truncate_prompt_tokens=keep, echo=True, logprobs=0).json
        assert body["usage"]["prompt_tokens"] == tokens and body["choices"][0]["logprobs"]["tokens"][0] == "</s>"
    body = server.complete(prompt=IDS, truncate_prompt_tokens=2, echo=True, max_tokens=0, logprobs=0).json
    assert body["choices"][0]["logprobs"]["tokens"] == [" a", " time"]
    first = {"truncate_prompt_tokens": 2, "truncation_side": "right", "echo": True, "max_tokens": 0}
    assert server.complete(prompt=PROMPT, **first).json["choices"][0]["text"] == "Once"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 128, "max_tokens": 500, "logprobs": 7}, "more than 500000 log-probabilities"),
        ({"prompt": [[2] * 500] * 3, "n": 16, "prompt_logprobs": 20}, "more than 500000 log-probabilities"),
        ({"min_tokens": 17}, "min_tokens is 17, but must be from 0 to max_tokens, which is 16"),
        ({"n": 3, "best_of": 2}, "best_of is 2, but must be at least n, which is 3"),
        ({"prompt": [2, 4096]}, "the prompt holds the id 4096"),
        ({"prompt": [[2], [2, -1]]}, "prompt 2 holds the id -1"),
        ({"prompt": [2, 10**30]}, "the prompt holds the id 1000"),
        ({"prompt": "", "add_special_tokens": False}, "the prompt has no tokens"),
        ({"stop_token_ids": [4095, 4096]}, "stop_token_ids has 4096, but"),
        ({"logit_bias": {"4095": 1, "4096": 1}}, "logit_bias has 4096, but"),
        ({"watermark_key": 7}, "watermark_key is 7, but nothing is marked"),
        ({"watermark_delta": 1, "watermark_scheme": "right"}, "watermark_scheme"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_400_in_the_apis_words(server, options, message, stream):
    answer = server.complete(**{"prompt": PROMPT, "stream": stream, **options})
    assert answer.status == 400 and message in answer.json["error"]["message"]
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}


def test_options_that_are_not_given_are_the_models():
    config = OPTConfig.from_file(EMBEDDED_DIRECTORY / "config.json")
    defaults = GenerationConfig(defaults={"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 3, "top_k": 7})
    model = ServedModel(SimpleNamespace(check=lambda *_: None), TOKENIZER, config, ("story",), defaults)
    for kind, given in (
        (CompletionRequest, {"top_p": 1.0, "top_k": None}),
        (MetaseqRequest, {"top_p": 1.0, "max_tokens": 16}),
    ):
        (made,) = asyncio.run(make_engine_requests(model, kind.model_validate({"prompt": PROMPT, **given})))
        params = made.request.params
        assert (params.temperature, params.top_p, params.top_k, params.max_new_tokens) == (0.5, 1.0, 7, 16)


def test_a_servers_watermark_is_every_requests():
    config, mark = (
        OPTConfig.from_file(EMBEDDED_DIRECTORY / "config.json"),
        WatermarkOptions(watermark_delta=2.0, watermark_key=31),
    )
    model = ServedModel(SimpleNamespace(check=lambda *_: None), TOKENIZER, config, ("story",), watermark=mark)
    for kind in (CompletionRequest, MetaseqRequest):
        (made,) = asyncio.run(make_engine_requests(model, kind.model_validate({"prompt": PROMPT})))
        assert made.request.params.watermark() == mark.watermark()
    for name, value in (("watermark_delta", 0), ("watermark_key", 7)):
        with pytest.raises(ApiError, match=f"{name} is given, but this server marks every text") as refused:
            asyncio.run(make_engine_requests(model, CompletionRequest.model_validate({"prompt": PROMPT, name: value})))
        assert refused.value.param == name


def test_the_engines_words_become_the_apis():
    error = engine_error("max_new_tokens is 0, but must be at least 1")
    assert (error.message, error.param) == ("max_tokens is 0, but must be at least 1", "max_tokens")
    for what in ("the prompt", "prompt 3"):
        assert engine_error(f"{what}: logit_bias has 4096, but ids go").param == "logit_bias"
    error = engine_error("the prompt has 600 tokens with BOS, and the model has 512 positions: shorten it")
    assert (error.param, error.code) == ("prompt", "context_length_exceeded")
    assert error.message.startswith("this model's maximum context length is 512 tokens: the prompt has 600")


def test_long_texts_and_lists_are_converted_beside_the_event_loop():
    go = threading.Event()
    waiting = SimpleNamespace(
        encode_batch=lambda texts, add_bos: [[len(text), go.wait(10)] for text in texts],
        decode=lambda tokens, skip_special_tokens: [len(tokens), go.wait(10)],
    )

    async def convert():
        model = SimpleNamespace(tokenizer=waiting)
        tasks = asyncio.gather(encode(model, "a" * 20_000, True), decode(model, [1] * 20_000))
        asyncio.get_running_loop().call_later(0.01, go.set)
        return await tasks

    assert asyncio.run(convert()) == [[20_000, True]] * 2
