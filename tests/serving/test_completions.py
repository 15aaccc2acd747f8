"""What /v1/completions and metaseq's routes answer, beside what the engine gives offline."""

import math
import threading

import pytest
from running_server import EMBEDDED_DIRECTORY, TOKENIZER, running

from opt_megatron.checkpoint.load import load_model
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams

PROMPT = "Once upon a time"
IDS = TOKENIZER.encode(PROMPT)


@pytest.fixture(scope="module")
def offline(alone):
    engine = Engine(load_model(EMBEDDED_DIRECTORY, None, alone), alone)

    def complete(prompt: str, **params):
        request = Request(tuple(TOKENIZER.encode(prompt)), SamplingParams(**params), TOKENIZER.stream)
        return engine.complete([request])

    return complete


def choices_of(events):
    """A stream's pieces, joined."""
    choices = {}
    for event in events:
        for piece in event["choices"]:
            choice = choices.setdefault(piece["index"], {"text": "", "finish_reason": None, "logprobs": None})
            assert choice["finish_reason"] is None
            choice["text"] += piece["text"]
            choice["finish_reason"] = piece["finish_reason"]
            if piece["logprobs"]:
                logprobs = choice["logprobs"] = choice["logprobs"] or {name: [] for name in piece["logprobs"]}
                for name, values in piece["logprobs"].items():
                    logprobs[name] += values
    return [choices[index] for index in sorted(choices)]


def test_a_seed_gives_the_offline_engines_text(server, offline):
    options = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 11}
    body = server.complete(model="story", prompt=PROMPT, max_tokens=24, **options).json
    (wanted,) = offline(PROMPT, max_new_tokens=24, **options)
    assert body["object"] == "text_completion" and body["model"] == "story" and body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": wanted.text, "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 24, "total_tokens": 29}
    again = server.complete(prompt=IDS, max_tokens=24, user="me", **options).json
    assert again["choices"] == body["choices"]


def test_every_option_reaches_the_engine(server, offline):
    both = {
        "temperature": 1.3, "top_k": 60, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 5,
        "presence_penalty": 0.3, "frequency_penalty": 0.2, "ignore_eos": True,
    }  # fmt: skip
    body = server.complete(
        prompt=PROMPT, max_tokens=30, min_tokens=30, logit_bias={"262": -100, "15": 4}, stop_token_ids=[4000], **both
    ).json
    (wanted,) = offline(
        PROMPT,
        max_new_tokens=30,
        min_new_tokens=30,
        logit_bias=((15, 4.0), (262, -100.0)),
        stop_token_ids=(4000,),
        **both,
    )
    assert body["choices"][0]["text"] == wanted.text


def test_requests_of_one_batch_do_not_meet(server, offline):
    kinds = [
        {"temperature": 0},
        {"temperature": 1, "seed": 3, "logprobs": 2, "echo": True},
        {"temperature": 0.7, "seed": 4, "stop": [" the"]},
        {"temperature": 1.5, "seed": 5, "frequency_penalty": 1},
    ]
    alone = [server.complete(prompt=PROMPT, max_tokens=40, **kind).json["choices"] for kind in kinds]
    together = [None] * len(kinds)

    def ask(number):
        together[number] = server.complete(prompt=PROMPT, max_tokens=40, **kinds[number]).json["choices"]

    server.brake.on()
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(kinds))]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: len(server.async_engine._requests) == len(kinds))
    server.brake.off()
    for thread in threads:
        thread.join()
    texts = [choice["text"] for (choice,) in together]
    assert texts == [choice["text"] for (choice,) in alone]
    assert [(choice["logprobs"] is not None, choice["finish_reason"]) for (choice,) in together] == [
        (choice["logprobs"] is not None, choice["finish_reason"]) for (choice,) in alone
    ]


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
        if wanted["logprobs"]:
            assert got["logprobs"]["tokens"] == wanted["logprobs"]["tokens"]
            assert got["logprobs"]["text_offset"] == wanted["logprobs"]["text_offset"]
    assert "usage" not in server.complete(**options, stream=True).events[-1]


def test_echo_and_logprobs_are_the_engines(server, offline):
    body = server.complete(prompt=PROMPT, max_tokens=6, echo=True, logprobs=2, seed=9).json
    (wanted,) = offline(PROMPT, max_new_tokens=6, echo=True, logprobs=2, seed=9)
    (choice,) = body["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == PROMPT + wanted.text
    scores = [event.logprob for event in wanted.prompt_events] + list(wanted.logprobs)
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(
        math.isclose(a, b, abs_tol=1e-4) for a, b in zip(logprobs["token_logprobs"][1:], scores[1:], strict=True)
    )
    assert logprobs["tokens"][0] == "</s>" and "".join(logprobs["tokens"][1:]) == choice["text"]
    for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[1:]:
        assert choice["text"][offset : offset + len(token)] == token
    for token, score, top in zip(logprobs["tokens"][1:], scores[1:], logprobs["top_logprobs"][1:], strict=True):
        assert len(top) in (2, 3) and math.isclose(top[token], score, abs_tol=1e-4)


def test_what_lm_eval_posts_is_answered_with_the_score_of_every_token(server, offline):
    posted = {"prompt": [IDS, IDS[:3]], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    choices = server.complete(model="story", **posted).json["choices"]
    (wanted,) = offline(PROMPT, max_new_tokens=0, echo=True, logprobs=0)
    for choice, ids in zip(choices, posted["prompt"], strict=True):
        got = choice["logprobs"]["token_logprobs"][1:-1]
        assert len(got) == len(ids) - 1
        assert all(
            math.isclose(a, e.logprob, abs_tol=1e-4) for a, e in zip(got, wanted.prompt_events[1:], strict=False)
        )


def test_half_characters_wait_for_their_other_half(server):
    ids = TOKENIZER.encode("€", add_bos=False)
    assert len(ids) > 1
    options = {"prompt": [2, ids[0]], "max_tokens": len(ids) - 1, "temperature": 0, "echo": True, "logprobs": 0}
    (choice,) = server.complete(**options, logit_bias={str(ids[1]): 100}).json["choices"]
    assert choice["logprobs"]["tokens"][1].startswith("bytes:\\x")
    # The continuation is a text of its own: it does not complete the half character that the prompt ends with.
    assert choice["text"][0] == "\ufffd" and choice["logprobs"]["text_offset"][:3] == [0, 0, 1]


def test_stop_and_its_reasons(server):
    text = server.complete(prompt=PROMPT, max_tokens=40, seed=5).json["choices"][0]["text"]
    options = {"prompt": PROMPT, "max_tokens": 40, "seed": 5, "stop": text[15:22]}
    (choice,) = server.complete(**options).json["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[:15], "stop")
    (choice,) = server.complete(**options, include_stop_str_in_output=True).json["choices"]
    assert choice["text"] == text[:22]
    body = server.complete(prompt=PROMPT, logit_bias={"2": 100}).json
    assert body["choices"][0]["finish_reason"] == "stop" and body["usage"]["completion_tokens"] == 1
    assert body["choices"][0]["text"] == ""


def test_n_gives_different_texts_and_each_prompt_its_own(server, offline):
    body = server.complete(prompt=[PROMPT, "The king"], n=2, max_tokens=8, seed=3).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    wanted = [one.text for prompt in (PROMPT, "The king") for one in offline(prompt, n=2, max_new_tokens=8, seed=3)]
    assert [choice["text"] for choice in body["choices"]] == wanted and len(set(wanted)) == 4
    assert body["usage"] == {"prompt_tokens": 8, "completion_tokens": 32, "total_tokens": 40}


def test_equal_prompts_get_texts_of_their_own_unless_there_is_a_seed(server):
    body = {"prompt": [PROMPT] * 3, "max_tokens": 24}
    for options, different in (({}, 3), ({"seed": 5}, 1)):
        assert len({choice["text"] for choice in server.complete(**body, **options).json["choices"]}) == different
    several = server.complete(prompt=PROMPT, n=2, best_of=5, max_tokens=8).json
    assert len({choice["text"] for choice in several["choices"]}) == 2 and not server.async_engine._requests


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0, "n": 2}, "n is 2, but must be 1 at temperature 0"),
        ({"max_tokens": 0}, "max_tokens is 0, but must be at least 1"),
        ({"min_tokens": 17}, "min_tokens is 17, but must be from 0 to max_tokens, which is 16"),
        ({"n": 3, "best_of": 2}, "best_of is 2, but must be at least n, which is 3"),
        ({"prompt": [2, 4096]}, "the prompt holds the id 4096"),
        ({"prompt": [[2], [2, -1]]}, "prompt 2 holds the id -1"),
        ({"prompt": [2, 10**30]}, "the prompt holds the id 1000"),
        ({"prompt": "", "add_special_tokens": False}, "the prompt has no tokens"),
        ({"stop_token_ids": [4095, 4096]}, "stop_token_ids has 4096, but"),
        ({"logit_bias": {"4095": 1, "4096": 1}}, "logit_bias has 4096, but"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_400_in_the_apis_words(server, options, message, stream):
    answer = server.complete(**{"prompt": PROMPT, "stream": stream, **options})
    assert answer.status == 400 and message in answer.json["error"]["message"]
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}


def test_metaseqs_routes_answer_in_its_shape(server, offline):
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "lambda_decay": 0.9, "omega_bound": 0.3}
    marks = TOKENIZER.sentence_end_tokens()
    (wanted,) = offline(PROMPT, max_new_tokens=20, sentence_end_tokens=marks, **options)
    for path in (
        "/completions",
        "/engines/davinci/completions",
        "/v1/engines/x/completions",
        "/v2/engines/x/completions",
    ):
        body = server.request("POST", path, {"prompt": PROMPT, "max_tokens": 20, **options}).json
        assert set(body) == {"id", "object", "created", "model", "choices"}
        (choice,) = body["choices"]
        assert set(choice) == {"text", "logprobs", "metrics"} and choice["text"] == wanted.text
        assert choice["logprobs"]["finish_reason"] == "length" and len(choice["logprobs"]["token_logprobs"]) == 20
    scored = {"prompt": [PROMPT], "echo": True, "max_tokens": 0, "logprobs": 0}
    (choice,) = server.request("POST", "/completions", scored).json["choices"]
    assert choice["text"] == PROMPT and choice["logprobs"]["token_logprobs"][0] is None
    long = {"prompt": "word " * 600, "max_tokens": 20, "top_p": 0, "echo": True}
    (choice,) = server.request("POST", "/completions", long).json["choices"]
    assert len(choice["logprobs"]["tokens"]) == 512 - 1


def test_the_other_routes(server):
    (model,) = server.request("GET", "/v1/models").json["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("story", "model", 512)
    assert server.request("GET", "/v1/models/story").json == model
    assert server.request("GET", "/v1/models/gpt").json["error"]["code"] == "model_not_found"
    assert server.complete(model="gpt", prompt="a").status == 404
    assert server.request("POST", "/tokenize", {"prompt": PROMPT}).json == {
        "count": 5, "max_model_len": 512, "tokens": IDS,
    }  # fmt: skip
    without = server.request("POST", "/tokenize", {"prompt": "a" * 20_000, "add_special_tokens": False}).json
    assert without["tokens"] == TOKENIZER.encode("a" * 20_000, add_bos=False)
    assert server.request("POST", "/detokenize", {"tokens": IDS}).json == {"prompt": PROMPT}
    assert "from 0 to 4095" in server.request("POST", "/detokenize", {"tokens": [4096]}).json["error"]["message"]
    chat = server.request("POST", "/v1/chat/completions", {"messages": []})
    assert chat.status == 400 and "no chat template" in chat.json["error"]["message"]
    assert server.request("GET", "/nothing").json["error"]["type"] == "not_found_error"
    assert server.request("GET", "/v1/completions").status == 405
    paths = server.request("GET", "/openapi.json").json
    assert "CompletionRequest" in paths["components"]["schemas"] and "/completions" in paths["paths"]


def test_metrics_count_what_happened(server):
    def read():
        return {
            name: server.metric(f"vllm:{name}")
            for name in ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count",
                         "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
                         "request_queue_time_seconds_count", "num_requests_running", "num_requests_waiting")
        } | {"length": server.metric("vllm:request_success_total", finished_reason="length")}  # fmt: skip

    before = read()
    server.complete(prompt=PROMPT, n=2, max_tokens=7, ignore_eos=True)
    growth = {name: value - before[name] for name, value in read().items()}
    assert growth == {
        "prompt_tokens_total": 5, "generation_tokens_total": 14, "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 12, "e2e_request_latency_seconds_count": 1,
        "request_queue_time_seconds_count": 1, "num_requests_running": 0, "num_requests_waiting": 0, "length": 1,
    }  # fmt: skip
    assert 0 <= server.metric("vllm:kv_cache_usage_perc") <= 1


def test_what_waits_for_a_place_is_told_from_what_computes(alone):
    with running(alone, max_batch_size=1) as server:
        server.wait_for(lambda: server.request("GET", "/health").status == 200)
        server.complete(prompt=PROMPT, max_tokens=400, ignore_eos=True)
        waited = server.metric("vllm:request_queue_time_seconds_sum")
        assert waited < server.metric("vllm:time_to_first_token_seconds_sum")
        server.brake.on()
        asking = [threading.Thread(target=server.complete, kwargs={"prompt": PROMPT}) for _ in range(2)]
        for thread in asking:
            thread.start()
        server.wait_for(lambda: len(server.async_engine._requests) == 2)
        server.brake.off()
        for thread in asking:
            thread.join()
        # The second begins when the first has ended.
        assert server.metric("vllm:request_queue_time_seconds_sum") > waited
        assert server.metric("vllm:request_queue_time_seconds_count") == 3


def test_openais_own_client(server, offline):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="unused")
    (wanted,) = offline(PROMPT, max_new_tokens=12, seed=6)
    arguments = {"model": "story", "prompt": PROMPT, "max_tokens": 12, "seed": 6}
    assert client.models.list().data[0].id == "story"
    whole = client.completions.create(**arguments, echo=True, logprobs=2)
    assert whole.choices[0].text == PROMPT + wanted.text and whole.usage.total_tokens == 17
    assert len(whole.choices[0].logprobs.token_logprobs) == 17 and whole.choices[0].logprobs.top_logprobs[0] is None
    pieces = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in pieces[:-1]) == wanted.text
    assert pieces[-1].usage.completion_tokens == 12
    several = client.completions.create(**arguments, n=3, stop=["zzz"], extra_body={"top_k": 50})
    assert len({choice.text for choice in several.choices}) == 3
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="story", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
