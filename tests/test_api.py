"""Logits, hidden states, attention and hooks against transformers, at every layout."""

import subprocess
import sys

import api_jobs
import pytest
import torch
from transformers import OPTForCausalLM

from opt_megatron import OPT
from opt_megatron.errors import UserError

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
MODELS = ["pre-norm", "post-norm"]
TOLERANCE = 1e-4
HOOK_POINTS = [
    "embedding",
    "layers.2",
    "layers.7",
    "layers.7.attention",
    "layers.7.attention.heads",
    "layers.7.mlp",
    "layers.7.mlp.neurons",
    "output",
]


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(4, 516, (2, 17), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def eager(models):
    """transformers' models that give attention maps."""
    return {
        name: OPTForCausalLM.from_pretrained(models[name][0], dtype="float32", attn_implementation="eager").eval()
        for name in MODELS
    }


def near(one, other) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= TOLERANCE)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_everything_is_transformers_at_every_layout_on_every_rank(models, ranks, eager, tokens, name, tp, pp):
    with torch.no_grad():
        oracle = eager[name](tokens, output_hidden_states=True, output_attentions=True)
    for found in ranks(tp * pp).run(api_jobs.look, models[name][0], tp, pp, tokens):
        assert near(found["logits"], oracle.logits)
        layers = models[name][1].config.num_hidden_layers
        assert len(found["hidden_states"]) == layers + 1 and len(found["attentions"]) == layers
        for one, other in zip(found["hidden_states"], oracle.hidden_states, strict=True):
            assert near(one, other)
        for one, other in zip(found["attentions"], oracle.attentions, strict=True):
            assert near(one, other)
        for one, number in zip(found["some"], (3, layers, 0), strict=True):
            assert torch.equal(one, found["hidden_states"][number])
        assert torch.equal(found["last attention"], found["attentions"][layers - 1])


def test_one_rank_gives_transformers_logits_to_the_bit(models, ranks, tokens):
    directory, oracle = models["pre-norm"]
    with torch.no_grad():
        assert torch.equal(ranks(1).run(api_jobs.look, directory, 1, 1, tokens)[0]["logits"], oracle(tokens).logits)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_looking_goes_on_after_generating(models, ranks, eager, tokens, tp, pp):
    with torch.no_grad():
        oracle = eager["pre-norm"](tokens, output_hidden_states=True)
    found = ranks(tp * pp).run(api_jobs.look, models["pre-norm"][0], tp, pp, tokens, True)[-1]
    assert near(found["logits"], oracle.logits)
    for one, other in zip(found["hidden_states"], oracle.hidden_states, strict=True):
        assert near(one, other)


def modules(model, name):
    """transformers' module and whether the hook point is its input, its output or a part of that."""
    decoder = model.model.decoder
    if name in ("embedding", "output"):
        return (decoder.layers[0], True) if name == "embedding" else (decoder.final_layer_norm, False)
    number, _, part = name.removeprefix("layers.").partition(".")
    layer = decoder.layers[int(number)]
    return {
        "": (layer, False),
        "attention": (layer.self_attn.out_proj, False),
        "attention.heads": (layer.self_attn.out_proj, True),
        "mlp": (layer.fc2, False),
        "mlp.neurons": (layer.fc2, True),
    }[part]


def hooked(model, tokens, name, see):
    """transformers' logits with `see` at the hook point; it gets [b, s, width], and its result replaces the tensor."""
    module, is_input = modules(model, name)

    def at_output(module, inputs, output):
        first = output[0] if isinstance(output, tuple) else output
        replaced = see(first.view(*tokens.shape, -1)).view(first.shape)
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    def at_input(module, inputs):
        return (see(inputs[0].view(*tokens.shape, -1)).view(inputs[0].shape), *inputs[1:])

    handle = module.register_forward_pre_hook(at_input) if is_input else module.register_forward_hook(at_output)
    with torch.no_grad():
        logits = model(tokens).logits
    handle.remove()
    return logits


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_captured_tensors_are_whole(models, ranks, tokens, tp, pp):
    directory, oracle = models["pre-norm"]
    expected = {}
    for name in HOOK_POINTS:
        hooked(oracle, tokens, name, lambda tensor, name=name: expected.setdefault(name, tensor))
    for found in ranks(tp * pp).run(api_jobs.captured, directory, tp, pp, tokens, HOOK_POINTS):
        assert found["layers.7.attention.heads"].shape == (2, 17, 12, 4)
        for name in HOOK_POINTS:
            assert near(found[name].reshape(expected[name].shape), expected[name]), name


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("name", HOOK_POINTS)
def test_replacements_reach_the_logits_as_in_transformers(models, ranks, tokens, name, tp, pp):
    directory, oracle = models["pre-norm"]

    def see(tensor):
        whole = tensor.unflatten(-1, (12, 4)) if name.endswith("heads") else tensor
        return api_jobs.scaled(whole).reshape(tensor.shape)

    expected = hooked(oracle, tokens, name, see)
    with torch.no_grad():
        plain = oracle(tokens).logits
    assert not near(expected, plain)
    for logits, after in ranks(tp * pp).run(api_jobs.changed, directory, tp, pp, tokens, name):
        assert near(logits, expected) and near(after, plain)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_hook_may_keep_its_tensor_and_write_into_it(models, ranks, tokens, tp):
    for seen, captured, is_same in ranks(tp).run(api_jobs.kept, models["pre-norm"][0], tp, tokens, HOOK_POINTS):
        assert is_same
        for name in HOOK_POINTS:
            assert torch.equal(seen[name], captured[name]), name


@pytest.mark.parametrize("name", ["layers.1.mlp", "layers.10.attention.weights"])
def test_a_hook_that_fails_on_one_stage_fails_on_all_and_leaves_them_in_step(models, ranks, tokens, name):
    stages = list(ranks(2).run(api_jobs.failing, models["pre-norm"][0], 2, tokens, name))
    own, other = stages if name == "layers.1.mlp" else reversed(stages)
    assert own[1] and other[1]
    assert own[0][::2] == ["ZeroDivisionError: by nothing"] * 2
    assert other[0][::2] == ["UserError: a hook raised ZeroDivisionError: by nothing"] * 2
    assert own[0][1] == other[0][1] and own[0][1].startswith(
        f"UserError: {'the hook at ' if 'mlp' in name else ''}{name}"
    )


def test_tokens_and_layers_come_in_all_kinds(alone):
    opt = OPT.from_pretrained()
    ids = opt.tokens("Once upon a time")
    wanted = opt.logits(ids)
    for kind in ("int8", "uint16", "uint32", "uint64", "int64"):
        row = (ids % 100).numpy().astype(kind)
        assert torch.equal(opt.logits(row), opt.logits(ids % 100))
    for given in (ids[0], ids[0].tolist(), [ids[0]], list(ids.numpy()), tuple(ids[0])):
        assert torch.equal(opt.logits(given), wanted)
    one, two = (opt.hidden_states(ids, layers=layers) for layers in (torch.tensor([0, -1]), [0, -1]))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_hooks_act_on_scores(models, alone):
    opt = OPT.from_pretrained()
    plain = opt.score([("Once upon a", " time")])[0].total
    with opt.hooks({"layers.0": lambda hidden: hidden * 0}):
        assert opt.score([("Once upon a", " time")])[0].total < plain - 1
    assert opt.score([("Once upon a ", "time")])[0].total == plain == opt.score([("Once upon a", " time")])[0].total
    assert opt.score("Once upon") == opt.score(["Once upon"])
    tokens = opt.tokens("Once upon a time")
    assert len(opt.hidden_states(tokens, layers=(n for n in (0, 1)))) == 2


def test_mistakes_are_the_same_line_on_every_rank(models, ranks):
    first, second = ranks(2).run(api_jobs.errors, models["pre-norm"][0], 2)
    assert first == second
    for message, part in zip(
        first,
        (
            "12 layers are counted from 0",
            "'layers.1.nose' is no hook point; there are embedding, output, layers.N",
            "layer 13: there are 13, from 0 to 12",
            "layer 12: there are 12, from 0 to 11",
            "in sequences of one length",
            "ids go from 0 to 515, not 2 to 516",
            "257 tokens are more than the model's 256",
            "tokens must be ids [b, s] or [s], not torch.float32 [1, 1]",
            "tokens must be ids [b, s] or [s]",
            "has no tokenizer: give ids",
            "got an unexpected keyword argument 'heat'",
            "max_new_tokens is 2.5, but must be a whole number",
            "tokens must be ids, in sequences of one length",
            "the hook at layers.1 returned (1, 2, 47), but must return (1, 2, 48) or None",
            "can be read only",
            "generate does not run hooks",
            "the hook at layers.1 must be a function, not int",
            "layers must be numbers in a list, as in layers=[3]",
            "layer '1': there are 12, from 0 to 11",
            "a prompt must be a text or a list of ids, not 2",
            "must be a text or a pair (context, continuation), not 7",
            "not ('a', 'b', 'c')",
            "hidden states must be [b, s, 48], not [1, 2, 47]",
            "batch_size is 0",
        ),
        strict=True,
    ):
        assert part in message


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_streams_give_every_rank_the_text_in_pieces_and_may_be_closed(ranks, tp, pp):
    found, *others = ranks(tp * pp).run(api_jobs.streamed, tp, pp)
    assert all(other == found for other in others)
    assert "".join(found["pieces"]) == found["text"] and len(found["pieces"]) > 10 and all(found["pieces"])
    assert found["again"].startswith("".join(found["first"])) and found["dropped"] == found["first"][0]
    for message, part in zip(
        found["refused"],
        ("a stream is open", "a stream is open", "but n is 2: use generate", "tokens with BOS", "stream: got an unex"),
        strict=True,
    ):
        assert part in message


def test_a_stream_of_text_needs_a_tokenizer(models, alone):
    with pytest.raises(UserError, match="no tokenizer to make text of ids: use generate"):
        OPT.from_pretrained(str(models["pre-norm"][0])).stream([2, 5])


def test_importing_the_package_stays_light():
    code = (
        "import sys, opt_megatron; assert 'torch' not in sys.modules; opt_megatron.OPT; assert 'torch' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
