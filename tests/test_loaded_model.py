"""Loading in steps: what is opened, what is read when, and the messages about mistakes."""

import copy

import api_jobs
import pytest
import torch
from factory import oracle_greedy
from formats import write_peft

from opt_megatron import OPT
from opt_megatron.errors import CheckpointError, UserError
from opt_megatron.generation.engine_options import EngineOptions
from opt_megatron.pretrained import open_pretrained, start_parallel

GREEDY = {"max_new_tokens": 6, "temperature": 0}


def test_opening_reads_no_weights_and_loading_reads_them_once(alone):
    opt = OPT.open("story", alone)
    assert opt._model is None and opt.config.num_layers == 4 and opt.tokenizer and opt.name == "story"
    assert opt.load() is opt and opt.model is opt.load().model


def test_a_model_that_was_made_elsewhere_has_all_but_a_checkpoint(alone, tmp_path):
    loaded = OPT.open("story", alone)
    opt = OPT.from_model(loaded.model, alone, loaded.tokenizer)
    assert torch.equal(opt.logits([2, 5]), loaded.logits([2, 5]))
    with pytest.raises(UserError, match="was not opened from a checkpoint"):
        opt.save(tmp_path / "x")


def test_the_engine_is_made_with_its_options_and_a_draft_model(alone):
    plain = OPT.open("story", alone).generate("The king", **GREEDY)
    options = EngineOptions(max_batch_size=2, draft_model="story", num_speculative_tokens=2)
    assert OPT.open("story", alone, engine=options).generate("The king", **GREEDY)[0].tokens == plain[0].tokens
    with pytest.raises(UserError, match="raise max_batch_size, which is 2"):
        OPT.open("story", alone, engine=options).generate("The king", num_beams=3)


def test_an_adapter_is_added_at_every_layout(ranks, models, tmp_path):
    directory, model = models["pre-norm"]
    modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"]
    names = [f"layers.{layer}.{module}" for layer in range(12) for module in modules]
    targets = [name.rpartition(".")[2] for name in modules]
    factors = write_peft(
        tmp_path / "adapter", model.state_dict(), dict.fromkeys(names, 4), target_modules=targets, lora_alpha=2
    )
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, (a, b) in factors.items():
            merged.get_parameter(name).add_(0.5 * b @ a)
        tokens = torch.arange(4, 24)[None]
        wanted, base = merged(tokens).logits, model(tokens).logits
    assert (wanted - base).abs().max() > 0.1
    for tp, pp in ((1, 1), (2, 2)):
        for logits, continuation in ranks(tp * pp).run(
            api_jobs.adapted, directory, tmp_path / "adapter", tp, pp, tokens
        ):
            assert (logits - wanted).abs().max() <= 1e-4
            assert continuation == oracle_greedy(merged, [2, 9, 30], 8)


def test_a_missing_tokenizer_is_an_error_where_one_is_needed(models, alone):
    directory = str(models["pre-norm"][0])
    with pytest.raises(UserError, match="there is no tokenizer"):
        open_pretrained(directory, alone)
    pretrained = open_pretrained(directory, alone, needs_tokenizer=False)
    assert pretrained.tokenizer is None and pretrained.suppress_tokens == ()
    with pytest.raises(CheckpointError, match="there is no tokenizer"):
        pretrained.require_tokenizer()
    with pytest.raises(UserError, match="there is no such directory"):
        open_pretrained(directory, alone, tokenizer="/nowhere", needs_tokenizer=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor_model_parallel_size": 2}, "2 processes are needed"),
        ({"seed": -1}, "seed -1 is not from 0"),
        ({"dtype": "float8"}, "float8"),
    ],
)
def test_what_needs_no_model_is_checked_before_the_ranks_start(alone, arguments, message):
    with pytest.raises(UserError, match=message):
        start_parallel(**arguments)
