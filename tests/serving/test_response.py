"""Echoed prompts, log-probabilities and offsets of a response."""

import math

from running_server import TOKENIZER

PROMPT = "Once upon a time"
IDS = TOKENIZER.encode(PROMPT)


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
        assert next(iter(top)) == token  # as in vLLM


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
    assert len(ids) == 3
    options = {"temperature": 0, "logprobs": 0, "max_tokens": 3, "allowed_token_ids": [ids[1]]}
    prompt = [2, *TOKENIZER.encode("a", add_bos=False), ids[0]]
    for echo, text, offsets in ((True, "a\u2082\ufffd", [0, 0, 1, 1, 1, 2]), (False, "\u2082\ufffd", [1, 1, 2])):
        (choice,) = server.complete(prompt=prompt, echo=echo, **options).json["choices"]
        assert (choice["text"], choice["logprobs"]["text_offset"]) == (text, offsets)
        assert choice["logprobs"]["tokens"][-1].startswith("bytes:\\x")
    scored = server.complete(prompt=prompt, echo=True, logprobs=0, max_tokens=0).json["choices"][0]
    assert (scored["text"], scored["logprobs"]["text_offset"]) == ("a\ufffd", [0, 0, 1])


def test_offsets_count_from_the_prompt_and_special_tokens_of_a_prompt_are_shown(server):
    (choice,) = server.complete(prompt=PROMPT, max_tokens=2, logprobs=0).json["choices"]
    assert choice["logprobs"]["text_offset"][0] == len(PROMPT)
    (choice,) = server.complete(prompt=[2, 1, 335, 1], max_tokens=2, logprobs=0, echo=True, seed=1).json["choices"]
    assert choice["text"].startswith("<pad>The<pad>")
    assert choice["logprobs"]["text_offset"][:5] == [0, 0, 5, 8, 13]
    body = {"prompt": [2, 1, 335], "max_tokens": 2, "logprobs": 0}
    assert server.complete(**body).json["choices"][0]["logprobs"]["text_offset"][0] == 8
    # metaseq's offsets are those in the text that it returns.
    assert server.request("POST", "/completions", body).json["choices"][0]["logprobs"]["text_offset"][0] == 0
