"""Recipes by name, as text, as lists and in files; mistakes are one sentence."""

import pytest

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.compression.recipe import READY, Prune, Quantize, Recipe, Smooth, find_recipe
from opt_megatron.config import OPTConfig
from opt_megatron.errors import UserError


def test_forms_of_a_recipe(tmp_path):
    made = Recipe(smooth=Smooth(alpha=0.6), prune=Prune(pattern="2:4"), quantize=Quantize(bits=3, group_size=64))
    steps = [{"smooth": {"alpha": 0.6}}, {"prune": {"sparsity": "2:4"}}, {"quantize": {"bits": 3, "group_size": 64}}]
    text = '[{"smooth": {"alpha": 0.6}}, {"prune": {"pattern": "2:4"}}, {"quantize": {"bits": 3, "group_size": 64}}]'
    path = tmp_path / "recipe.yaml"
    path.write_text("- smooth: {alpha: 0.6}\n- prune:\n    pattern: '2:4'\n- quantize: {bits: 3, group_size: 64}\n")
    assert find_recipe(steps) == find_recipe(text) == find_recipe(str(path)) == made
    assert find_recipe(made.to_list()) == made
    assert find_recipe('{"prune": {"method": "wanda", "pattern": "2:4"}}') == READY["wanda-2:4"]
    assert find_recipe("gptq4-g128") == Recipe(quantize=Quantize(bits=4, group_size=128))


def test_what_a_recipe_needs():
    assert not find_recipe("magnitude50").needs_samples
    assert find_recipe("int8-smooth").needs_samples and not find_recipe("int8-smooth").needs_inputs
    assert find_recipe("wanda50").needs_inputs and not find_recipe("wanda50").needs_hessian
    assert find_recipe("sparsegpt50").needs_hessian and find_recipe("gptq4").needs_hessian


def test_patterns_must_divide_the_model():
    config = OPTConfig.from_path(EMBEDDED_DIRECTORY).replace(ffn_hidden_size=1000)
    find_recipe([{"prune": {"pattern": "4:8"}}]).check_fits(config)
    with pytest.raises(UserError, match="the pattern 8:16 does not divide the model's ffn_hidden_size of 1000"):
        find_recipe([{"prune": {"pattern": "8:16"}}]).check_fits(config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gptq5", "no ready recipe (int8, int8-smooth"),
        ("nowhere.yaml", "nowhere.yaml: cannot be read: No such file"),
        ("[{quantize: {bits: 5}}]", "--recipe: quantize: bits is 5, but must be one of 2, 3, 4, 8"),
        ('[{"quantize": {"bit": 4}}]', "quantize has no setting bit; it has method, bits, group_size"),
        ('[{"quantise": {}}]', "there is no step 'quantise'; there are smooth, prune, quantize"),
        ([{"quantize": {}}, {"prune": {"sparsity": 0.5}}], "prune comes after quantize; the order is smooth, prune"),
        ([{"prune": {"sparsity": 0.5}}, {"prune": {"sparsity": 0.5}}], "prune is there twice"),
        ([{"prune": {}}], "give one of sparsity (as 0.5) and pattern (as 2:4)"),
        ([{"prune": {"sparsity": 1.5}}], "sparsity is 1.5, but must be above 0 and below 1"),
        ([{"prune": {"pattern": "4:4"}}], "must be n:m with n below m"),
        ([{"quantize": {"group_size": 0}}], "group_size is 0, but must be at least 1, or -1 for whole rows"),
        ([{"quantize": {"method": "rtn", "act_order": True}}], "belong to gptq: rtn rounds every weight by itself"),
        ([{"prune": {"sparsity": 0.5}}, {"quantize": {"act_order": True}}], "cannot be combined with sparsegpt"),
        ([], "has no step"),
        ("[quantize]", "'quantize' is no step"),
        ("[{quantize: [4]}]", "quantize is [4], but must be settings with their values"),
        ("[{quantize: }", "line 1"),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(UserError) as raised:
        find_recipe(given)
    assert message in str(raised.value)
