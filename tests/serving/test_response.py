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
    # The continuation is decoded separately: it does not complete the half character that the prompt ends with.
    assert choice["text"][0] == "\ufffd" and choice["logprobs"]["text_offset"][:3] == [0, 0, 1]
