"""Watermarks of green lists against transformers' processor, and lists whose ids are known."""

from dataclasses import replace

import pytest
import torch
from sampling_inputs import filtered, history, scores
from transformers.generation.logits_process import WatermarkLogitsProcessor

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.config import OPTConfig
from opt_megatron.errors import UserError
from opt_megatron.generation.request import Request, check_request
from opt_megatron.generation.sampling.green_lists import GreenLists
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.generation.sampling.watermark_options import GreenListOptions, WatermarkOptions

KEYS = (15485863, 2**63 - 25)


@pytest.mark.parametrize("size", [50, 4096, 50272])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_the_processor_is_transformers_to_the_bit(scheme, width, size):
    known = history(8, 5)
    for key in KEYS:
        theirs = WatermarkLogitsProcessor(size, "cpu", 0.3, 2.7, key, scheme, width)
        expected = theirs(torch.tensor([known.tokens]), scores(key % 7, size)[None])[0]
        assert not torch.equal(expected, scores(key % 7, size))
        params = SamplingParams(
            watermark_delta=2.7, watermark_gamma=0.3, watermark_key=key,
            watermark_scheme=scheme, watermark_context_width=width,
        )  # fmt: skip
        assert torch.equal(filtered(scores(key % 7, size), params, known), expected)


@pytest.mark.parametrize(
    ("size", "number", "lowest", "total"),
    [
        (4096, 1024, [5, 13, 17, 34, 35, 37, 41, 43], 2074873),
        (50265, 12566, [7, 8, 12, 13, 15, 17, 36, 41], 318732277),
        (50272, 12568, [1, 3, 4, 7, 12, 19, 21, 28], 315006572),
    ],
)
def test_lists_are_the_authors(size, number, lowest, total):
    """After token 7, with the public key and a quarter of the ids green: as the authors' `simple_1` gives them."""
    for lists in (
        GreenLists(GreenListOptions(), size),
        GreenLists(GreenListOptions(watermark_vocab_size=size), 50272),  # of a model with more rows
    ):
        ids = lists.green_mask([7], torch.zeros(50272)).nonzero().squeeze(1)
        assert (len(ids), ids[:8].tolist(), int(ids.sum())) == (number, lowest, total)
        assert [token for token in range(44) if lists.is_green((7, token))] == ids[ids < 44].tolist()


@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_too_few_tokens_leave_scores_as_they_are(scheme):
    params = SamplingParams(watermark_delta=2, watermark_scheme=scheme, watermark_context_width=3)
    assert torch.equal(filtered(scores(), params, history(prompt=(2, 5))), scores())
    assert not torch.equal(filtered(scores(), params, history(prompt=(2, 5, 9))), scores())


def test_equal_scores_and_impossible_tokens():
    """Of self hash's candidates, the lower ids come first where scores are equal; what is impossible stays so."""
    params = SamplingParams(watermark_delta=2, watermark_scheme="selfhash", allowed_token_ids=tuple(range(60, 160)))
    changed = (filtered(torch.zeros(400), params, history()) > 0).nonzero().squeeze(1)
    assert 0 < len(changed) < 40 and 60 <= int(changed.min()) <= int(changed.max()) < 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"watermark_gamma": 0.5}, "watermark_gamma is 0.5, but nothing is marked"),
        ({"watermark_delta": -1}, "watermark_delta is -1, but must be from 0"),
        ({"watermark_delta": 1, "watermark_gamma": 1.0}, "watermark_gamma is 1.0, but must be above 0 and below 1"),
        ({"watermark_delta": 1, "watermark_key": 0}, "watermark_key is 0, but must be from 1"),
        ({"watermark_delta": 1, "watermark_scheme": "right"}, "must be one of lefthash, selfhash"),
        (
            {"watermark_delta": 1, "watermark_vocab_size": 518},
            "prompt 3: watermark_vocab_size is 518, but the",
        ),
        ({"watermark_delta": 1, "watermark_gamma": 1e-3}, "prompt 3: watermark_gamma is 0.001, and none of 517 ids"),
    ],
)
def test_mistakes(options, message):
    config = replace(OPTConfig.from_directory(EMBEDDED_DIRECTORY), vocab_size=517)
    with pytest.raises(UserError, match=message):
        check_request(Request((2,), SamplingParams(**options)), config, "prompt 3")


def test_the_options_of_the_mark_alone():
    assert SamplingParams(watermark_key=7, watermark_delta=0).mark == SamplingParams().mark == 0
    params = SamplingParams(watermark_delta=1.5, watermark_key=7, top_p=0.5)
    assert WatermarkOptions(**params.watermark()).watermark() == params.watermark()
