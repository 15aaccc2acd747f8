"""What generation_config.json says is followed, as transformers does; what is given comes first."""

import json
import shutil

import pytest
import torch
from transformers import OPTForCausalLM

from opt_megatron import OPT
from opt_megatron.errors import CheckpointError
from opt_megatron.generation.generation_config import GenerationConfig, read_generation_config
from opt_megatron.generation.sampling.sampling_params import SamplingParams

PROMPT = [2, 9, 30]


@pytest.fixture
def directory(models, tmp_path):
    return shutil.copytree(models["pre-norm"][0], tmp_path / "model")


def write(directory, **values):
    (directory / "generation_config.json").write_text(json.dumps(values))


def transformers_tokens(directory, new: int) -> tuple[int, ...]:
    model = OPTForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = model.generate(torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=new)
    return tuple(ids[0, len(PROMPT) :].tolist())


def test_greedy_texts_are_those_of_transformers(directory, alone):
    def tokens(**options) -> tuple[int, ...]:
        opt = OPT.open(str(directory), alone, **options)
        return opt.generate([PROMPT], **{"max_new_tokens": 12})[0].tokens

    write(directory, do_sample=False)
    plain = tokens()
    assert plain == transformers_tokens(directory, 12)
    eos = [plain[7], 3, plain[4]]
    for values in (
        {"eos_token_id": eos},
        {"eos_token_id": plain[5]},
        {"suppress_tokens": [*plain[:3], 7, 10**6], "eos_token_id": 2},
        {"begin_suppress_tokens": [plain[0]], "repetition_penalty": 1.3, "top_p": 0.1},
    ):
        write(directory, do_sample=False, **values)
        assert (found := tokens()) == transformers_tokens(directory, 12) and found != plain
    write(directory, do_sample=True, eos_token_id=plain[5])  # what is not given is sampled
    assert (
        OPT.open(str(directory), alone).generate([PROMPT], temperature=0)[0].tokens
        == plain[: plain.index(plain[5]) + 1]
    )
    write(directory, do_sample=False, eos_token_id=eos, suppress_tokens=list(plain))
    opt = OPT.open(str(directory), alone, use_generation_config=False)
    assert opt.generate([PROMPT], max_new_tokens=12, temperature=0)[0].tokens == plain


@pytest.mark.parametrize(
    ("values", "defaults"),
    [
        ({"temperature": 0.7, "top_k": 50, "top_p": 0.9}, {"temperature": 0.7, "top_k": 50, "top_p": 0.9}),
        ({"temperature": 0.7, "do_sample": True}, {"temperature": 0.7}),
        ({"temperature": 0.7, "do_sample": False, "min_p": None}, {"temperature": 0.0}),
        ({"do_sample": None, "temperature": 1, "typical_p": 1.0, "top_k": 0, "bos_token_id": 2}, {}),
        (
            {"max_new_tokens": 9, "begin_suppress_tokens": [7, 516]},
            {"max_new_tokens": 9, "begin_suppress_tokens": (7,)},
        ),
    ],
)
def test_defaults(tmp_path, values, defaults):
    write(tmp_path, **values)
    config = read_generation_config(tmp_path, 516)
    assert dict(config.defaults) == defaults and config.eos_token_ids is None
    assert bool(config.describe(2)) == bool(defaults)
    assert config.with_defaults({"temperature": 0.5, "top_k": 0}) == defaults | {"temperature": 0.5, "top_k": 0}
    for search in ({"num_beams": 2}, {"penalty_alpha": 0.5, "top_k": 4}):
        SamplingParams(**config.with_defaults(search))  # nothing that the search would refuse


def test_the_user_is_told_what_is_followed_and_what_is_not(tmp_path):
    assert read_generation_config(tmp_path, 516) == GenerationConfig()
    write(tmp_path, eos_token_id=2, pad_token_id=1, num_beams=1, transformers_version="5.23.0", stop_strings=None)
    assert read_generation_config(tmp_path, 516).describe(2) == ""
    write(tmp_path, eos_token_id=[2, 50], suppress_tokens=list(range(10)), top_p=0.9, num_beams=4, bad_words_ids=[[3]])
    assert read_generation_config(tmp_path, 516).describe(2) == (
        "generation_config.json: eos_token_id 2, 50; suppress_tokens 0, 1, 2, 3, 4, 5, 6, 7 and 2 more; where nothing "
        "else is given top_p 0.9; not followed: num_beams, bad_words_ids (--no-generation-config leaves it out)"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"temperature": "hot"}', "temperature"),
        ('{"top_p": 7}', "top_p is 7, but must be from 0"),
        ('{"eos_token_id": [2, "x"]}', "eos_token_id is .*, not an id or a list of ids"),
        ('{"eos_token_id": "2"}', "eos_token_id is '2', not an id"),
        ("[2]", "holds a list, not an object"),
        ("{", "Expecting property name"),
    ],
)
def test_a_file_that_cannot_be_followed_is_named(tmp_path, content, message):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"generation_config.json: {message}.*--no-generation-config leaves"):
        read_generation_config(tmp_path, 516)
