"""What /v1/completions, metaseq's routes and the others answer, compared with what the engine gives offline."""

import threading

import pytest
from running_server import TOKENIZER

from opt_megatron.version import __version__

PROMPT = "Once upon a time"
IDS = TOKENIZER.encode(PROMPT)


def test_a_seed_gives_the_offline_engines_text(server, offline):
    options = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 11}
    body = server.complete(model="story", prompt=PROMPT, max_tokens=24, **options).json
    (wanted,) = offline(PROMPT, max_new_tokens=24, **options)
    assert body["object"] == "text_completion" and body["model"] == "story" and body["id"].startswith("cmpl-")
    unasked = dict.fromkeys(("logprobs", "stop_reason", "prompt_logprobs", "prompt_token_ids", "token_ids"))
    assert body["choices"] == [{"index": 0, "text": wanted.text, "finish_reason": "length", **unasked}]
    details = {"prompt_tokens_details": {"cached_tokens": 0}}
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 24, "total_tokens": 29, **details}
    again = server.complete(prompt=IDS, max_tokens=24, user="me", **options).json
    assert again["choices"] == body["choices"]


def test_every_option_reaches_the_engine(server, offline):
    both = {
        "temperature": 1.3, "top_k": 60, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 5,
        "presence_penalty": 0.3, "frequency_penalty": 0.2, "ignore_eos": True,
        "watermark_delta": 1.5, "watermark_gamma": 0.4, "watermark_key": 2**40 + 1, "watermark_scheme": "selfhash",
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
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text[:15], "stop", text[15:22])
    last = server.complete(**options, stream=True).events[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", text[15:22])
    (choice,) = server.complete(**options, include_stop_str_in_output=True).json["choices"]
    assert choice["text"] == text[:22]
    for token, reason in ((2, None), (300, 300)):  # an end of sequence has no reason
        body = server.complete(prompt=PROMPT, logit_bias={str(token): 100}, stop_token_ids=[300], temperature=0).json
        (choice,) = body["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", reason)
        assert body["usage"]["completion_tokens"] == 1


def test_n_gives_different_texts_and_each_prompt_its_own(server, offline):
    body = server.complete(prompt=[PROMPT, "The king"], n=2, max_tokens=8, seed=3).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    wanted = [one.text for prompt in (PROMPT, "The king") for one in offline(prompt, n=2, max_new_tokens=8, seed=3)]
    assert [choice["text"] for choice in body["choices"]] == wanted and len(set(wanted)) == 4
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (8, 32)


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


def test_metaseqs_values_for_off_are_off(server, offline):
    (wanted,) = offline(PROMPT, max_new_tokens=8, temperature=0)
    off = {"lambda_decay": -1, "omega_bound": -1, "alpha_presence": -1, "alpha_frequency_src": -1}
    for greedy in ({"top_p": -1}, {"top_p": "0"}, {"temperature": "0"}):
        body = {"prompt": PROMPT, "max_tokens": "8", **off, **greedy}
        (choice,) = server.request("POST", "/completions", body).json["choices"]
        assert choice["text"] == wanted.text


def test_metaseqs_routes_take_what_openais_clients_send(server, offline):
    (wanted,) = offline(PROMPT, max_new_tokens=8, temperature=0, presence_penalty=2, logit_bias=((262, -5.0),))
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "presence_penalty": 2, "logit_bias": {"262": -5}}
    answer = server.request("POST", "/v1/engines/175b/completions", {**body, "frequency_penalty": 0})
    assert answer.json["choices"][0]["text"] == wanted.text
    answer = server.request("POST", "/completions", {**body, "alpha_presence": 1})
    assert answer.json["error"]["param"] == "presence_penalty"


def test_greedy_and_empty_continuations_are_openais(server):
    def texts(**options):
        return [choice["text"] for choice in server.complete(prompt=PROMPT, **options).json["choices"]]

    greedy = texts(temperature=0, max_tokens=6)
    assert texts(temperature=0, n=3, max_tokens=6) == texts(top_p=0, n=3, best_of=4, max_tokens=6) == greedy * 3
    assert texts(max_tokens=0) == [""] and texts(max_tokens=0, n=2, echo=True) == [PROMPT] * 2


def test_beam_search_is_the_engines(server, offline):
    wanted = offline(PROMPT, max_new_tokens=8, num_beams=4, n=2, length_penalty=2.0, early_stopping=True, temperature=0)
    options = {"use_beam_search": True, "best_of": 4, "n": 2, "length_penalty": 2.0, "early_stopping": True}
    choices = server.complete(prompt=PROMPT, max_tokens=8, **options).json["choices"]
    assert [choice["text"] for choice in choices] == [one.text for one in wanted]
    (one,) = server.complete(prompt=PROMPT, max_tokens=8, use_beam_search=True).json["choices"]
    assert one["text"] == offline(PROMPT, max_new_tokens=8, temperature=0)[0].text


def test_ids_and_the_prompts_log_probabilities_are_returned(server, offline):
    options = {"max_tokens": 3, "temperature": 0, "return_token_ids": True, "return_tokens_as_token_ids": True}
    body = server.complete(prompt=PROMPT, logprobs=1, prompt_logprobs=2, n=2, **options).json
    (wanted,) = offline(PROMPT, max_new_tokens=3, temperature=0, prompt_logprobs=2)
    for choice in body["choices"]:
        assert (choice["prompt_token_ids"], choice["token_ids"]) == (IDS, list(wanted.tokens))
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in wanted.tokens]
        assert choice["prompt_logprobs"][0] is None
        for got, event in zip(choice["prompt_logprobs"][1:], wanted.prompt_events[1:], strict=True):
            assert set(got) == {str(token) for token in (event.token, *dict(event.top_logprobs))}
            own = got[str(event.token)]
            assert abs(own["logprob"] - event.logprob) < 1e-4
            assert own["decoded_token"] == TOKENIZER.decode([event.token])
            assert sorted(score["rank"] for score in got.values())[:2] == [1, 2]
            assert (own["rank"] > 2) == (len(got) > 2) and own["rank"] == event.vocab_rank


def test_log_probabilities_of_given_ids_are_returned(server):
    first = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "return_tokens_as_token_ids": True}
    (best,) = server.complete(**first, logprobs=20).json["choices"]
    wanted = best["logprobs"]["top_logprobs"][0]
    rare, common = [int(name.removeprefix("token_id:")) for name in (min(wanted, key=wanted.get), next(iter(wanted)))]
    given = {"logprobs": 0, "logprob_token_ids": [rare, common], "echo": True}
    (choice,) = server.complete(**first, **given).json["choices"]
    *of_prompt, got = choice["logprobs"]["top_logprobs"]
    assert list(got) == [f"token_id:{common}", f"token_id:{rare}"]
    assert all(abs(got[name] - wanted[name]) < 1e-4 for name in got) and {len(top) for top in of_prompt[1:]} == {1}
    assert server.complete(**first, logprob_token_ids=[1]).json["error"]["param"] == "logprobs"
    assert "ids go from" in server.complete(**first, logprobs=0, logprob_token_ids=[9999]).json["error"]["message"]


def test_a_client_names_its_request(server):
    body = {"prompt": PROMPT, "max_tokens": 1, "request_id": "mine"}
    assert server.complete(**body).json["id"] == "cmpl-mine"
    answer = server.request("POST", "/v1/completions", {**body, "stream": True}, {"X-Request-Id": "header"})
    assert {event["id"] for event in answer.events} == {"cmpl-header"}
    answer = server.request("POST", "/v1/completions", body, {"X-Request-Id": "x" * 257})
    assert (answer.status, answer.json["error"]["message"][:27]) == (400, "the header X-Request-Id has")


def test_special_tokens_can_be_shown_and_words_ruled_out(server, offline):
    shown = {"prompt": PROMPT, "max_tokens": 2, "allowed_token_ids": [1], "skip_special_tokens": False}
    assert server.complete(**shown).json["choices"][0]["text"] == "<pad><pad>"
    (plain,) = offline("The king had", max_new_tokens=8, temperature=0)
    word = plain.text.split()[0]
    options = {"prompt": "The king had", "max_tokens": 8, "temperature": 0, "bad_words": [word]}
    assert word not in server.complete(**options).json["choices"][0]["text"].split()


def test_the_other_routes(server):
    (model,) = server.request("GET", "/v1/models").json["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("story", "model", 512)
    assert server.request("GET", "/v1/models/story").json == model
    assert server.request("GET", "/v1/models/gpt").json["error"]["code"] == "model_not_found"
    assert server.complete(model="gpt", prompt="a").status == 404
    assert server.request("POST", "/tokenize", {"prompt": PROMPT}).json == {
        "count": 5, "max_model_len": 512, "tokens": IDS, "token_strs": None,
    }  # fmt: skip
    strings = server.request("POST", "/tokenize", {"prompt": PROMPT, "return_token_strs": True}).json["token_strs"]
    assert strings == ["</s>", "Once", "\u0120upon", "\u0120a", "\u0120time"]
    info = server.request("GET", "/tokenizer_info").json
    assert info["tokenizer_class"] == "GPT2Tokenizer" and info["model_max_length"] == 512
    without = server.request("POST", "/tokenize", {"prompt": "a" * 20_000, "add_special_tokens": False}).json
    assert without["tokens"] == TOKENIZER.encode("a" * 20_000, add_bos=False)
    assert server.request("POST", "/detokenize", {"tokens": IDS}).json == {"prompt": "</s>" + PROMPT}
    assert "from 0 to 4095" in server.request("POST", "/detokenize", {"tokens": [4096]}).json["error"]["message"]
    assert server.request("GET", "/version").json == {"version": __version__}
    assert server.request("POST", "/ping").status == server.request("GET", "/ping").status == 200
    assert server.request("GET", "/load").json == {"server_load": 0}
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
