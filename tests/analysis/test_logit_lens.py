"""The logit lens against transformers' final norm and head, at every layout, and its picture."""

import api_jobs
import pytest
import torch

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.cli import main
from opt_megatron.tokenizer import OPTTokenizer

TOKENIZER = OPTTokenizer.from_directory(EMBEDDED_DIRECTORY)
TOKENS = torch.tensor([TOKENIZER.encode("Once upon a time there was a king")])


def rows_by_transformers(model, tokens):
    """[layers + 1, s, vocabulary] probabilities."""
    decoder = model.model.decoder
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
        norm = decoder.final_layer_norm or (lambda x: x)
        project = decoder.project_out or (lambda x: x)
        lens = [model.lm_head(project(norm(hidden[0]))) for hidden in states[:-1]]
        return torch.stack([*lens, model.lm_head(states[-1][0])]).softmax(-1)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("name", ["story", "post-norm"])
def test_rows_are_transformers(models, ranks, name, tp, pp):
    directory, oracle = models[name]
    tokens = TOKENS if name == "story" else TOKENS % 500
    expected = rows_by_transformers(oracle, tokens)
    for lens in ranks(tp * pp).run(api_jobs.lens, directory, tp, pp, tokens):
        assert lens.tokens == tuple(tokens[0].tolist())
        probabilities, best = torch.tensor(lens.probabilities), torch.tensor(lens.best)
        assert (probabilities - expected.amax(-1)).abs().max() <= 1e-4
        # The id too, but for a tie that rounding decides.
        assert (expected.gather(-1, best[..., None])[..., 0] - expected.amax(-1)).abs().max() <= 1e-4


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["logit-lens", *arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_command_draws_and_does_not_overwrite(capsys, tmp_path):
    path = tmp_path / "lens.png"
    arguments = ("--prompt", "Once upon a time\nthere was a $king$", "--output", str(path), "--last", "5")
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out == f"wrote {path}: 5 rows, 5 tokens\n"
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[0] > 200 and picture.shape[1] > 500 and picture.std() > 0.05
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "is there already; --force replaces it" in err
    assert run(capsys, *arguments, "--force")[0] == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["lens.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "x.png"), "--prompt"),
        (("--prompt", "x", "--output", "x.svg"), "end its name with .png"),
        (("--prompt", "", "--output", "x.png"), "--prompt is empty"),
        (("--prompt", "x", "--output", "x.png", "--last", "0"), "--last is 0"),
        (("--prompt", "x", "--output", "/nowhere/x.png"), "/nowhere/x.png: cannot be written: No such file"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out and message in err.strip().splitlines()[-1]
