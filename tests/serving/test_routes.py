"""What /v1/completions, metaseq's routes and the others answer, compared with what the engine gives offline."""

import threading

import pytest
from running_server import TOKENIZER

PROMPT = "Once upon a time"
IDS = TOKENIZER.encode(PROMPT)


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
