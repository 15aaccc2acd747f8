"""Detection against transformers' detector, and texts whose values the authors' code gave."""

import pytest
import torch
from transformers import OPTConfig
from transformers import WatermarkDetector as TheirDetector
from transformers.generation import WatermarkingConfig

from opt_megatron.checkpoint.load import load_model
from opt_megatron.errors import UserError
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.request import Request
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.generation.sampling.watermark_detector import WatermarkDetector
from opt_megatron.generation.sampling.watermark_options import DetectionOptions

BEGINNING = (2, 1335, 988, 1100, 446, 439, 307, 262)  # of fairy tales that the embedded model was not trained on


def detected(tokens, **options):
    return WatermarkDetector(DetectionOptions(**options), 4096, 2).detect(tokens)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize(("scheme", "width"), [("lefthash", 1), ("lefthash", 3), ("selfhash", 1), ("selfhash", 3)])
def test_counts_and_scores_are_transformers(scheme, width, once):
    tokens = torch.randint(3, 15, (80,), generator=torch.Generator().manual_seed(width)).tolist()  # many repeat
    options = {"greenlist_ratio": 0.4, "hashing_key": 999331, "seeding_scheme": scheme, "context_width": width}
    theirs = TheirDetector(
        OPTConfig(vocab_size=4096, bos_token_id=2), "cpu", WatermarkingConfig(**options), ignore_repeated_ngrams=once
    )
    for begin in ([], [2]):
        expected = theirs(torch.tensor([begin + tokens]), return_dict=True)
        found = detected(
            begin + tokens, watermark_gamma=0.4, watermark_key=999331, watermark_scheme=scheme,
            watermark_context_width=width, ignore_repeated_ngrams=once, z_threshold=3.0,
        )  # fmt: skip
        assert (found.num_scored, found.num_green) == (expected.num_tokens_scored[0], expected.num_green_tokens[0])
        assert found.green_fraction == expected.green_fraction[0]
        assert found.z_score == pytest.approx(expected.z_score[0], rel=1e-12)
        assert found.p_value == pytest.approx(expected.p_value[0], rel=1e-9)
        assert found.is_watermarked == expected.prediction[0]


@pytest.mark.parametrize(
    ("delta", "first", "counted", "once"),
    [
        (2.0, (504, 384, 336, 262, 692, 15), (199, 198, 24.270), (6, 5, 3.2998)),
        # Without a mark: a text that repeats itself is a false alarm, unless each bigram counts once.
        (0.0, (504, 384, 336, 262, 692, 384), (199, 102, 8.554), (33, 11, 1.1055)),
    ],
)
def test_greedy_texts_have_the_authors_scores(models, alone, delta, first, counted, once):
    engine = Engine(load_model(models["story"][0], None, alone), alone)
    params = SamplingParams(max_new_tokens=200, temperature=0, ignore_eos=True, watermark_delta=delta)
    (completion,) = engine.complete([Request(BEGINNING, params)])
    assert completion.tokens[:6] == first
    for expected, ignores in ((counted, False), (once, True)):
        found = detected(completion.tokens, ignore_repeated_ngrams=ignores)
        assert (found.num_scored, found.num_green) == expected[:2]
        assert found.z_score == pytest.approx(expected[2], abs=5e-4)
        assert found.is_watermarked == (found.z_score > 4)


def test_sampled_texts_are_told_apart(models, alone):
    engine = Engine(load_model(models["story"][0], None, alone), alone)
    for delta, lowest, highest in ((2.0, 8, 16), (0.0, -3, 3)):
        params = SamplingParams(max_new_tokens=200, ignore_eos=True, watermark_delta=delta, seed=1)
        (completion,) = engine.complete([Request(BEGINNING, params)])
        assert lowest < detected(completion.tokens).z_score < highest


def test_ids_beyond_the_lists_are_red_and_short_texts_are_refused():
    text = (4090, 7, 4090, 4091)
    found = detected(text, watermark_vocab_size=4000)
    assert found.num_scored == 3 and found.num_green == detected(text[:2], watermark_vocab_size=4000).num_green
    with pytest.raises(UserError, match="the text is too short: of 2 tokens, the last can be scored, and it has 1"):
        detected((2, 7))
