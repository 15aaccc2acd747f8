"""lm-eval's adapter against transformers and against lm-eval's own `hf`, the shipped tasks, and the command."""

import json
from pathlib import Path

import evaluation_jobs
import pytest
import torch

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.cli import evaluate_lm_eval, main
from opt_megatron.errors import UserError
from opt_megatron.evaluation.run_tasks import SHIPPED_TASKS
from opt_megatron.tokenizer import OPTTokenizer

pytest.importorskip("lm_eval", reason="needs the extra eval: pip install lm-eval")

TOKENIZER = OPTTokenizer.from_directory(EMBEDDED_DIRECTORY)
TOLERANCE = 1e-3
LONG = "The king and his three sons rode out into the forest to look for the golden bird. " * 30
QUESTIONS = [
    ("loglikelihood", ("Once upon a", " time")),
    ("loglikelihood", ("Once upon a ", "time there was")),  # the space belongs to the continuation
    ("loglikelihood", ("", "The king")),
    ("loglikelihood", (LONG, " bird")),  # longer than the model
    ("loglikelihood_rolling", ("Once upon a time there was a king.",)),
    ("loglikelihood_rolling", (LONG,)),
    ("generate_until", ("Once upon a time", {"until": ["."], "max_gen_toks": 40})),
    ("generate_until", ("The old woman said", {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False})),
    ("generate_until", ("The king", {"until": ["\n\n"], "max_gen_toks": 12, "num_beams": 1})),
    ("generate_until", ("The king", {"until": ["\n\n"], "max_gen_toks": 12, "num_beams": 3, "early_stopping": True})),
]


@pytest.fixture(scope="module")
def answers(ranks):
    return ranks(1).run(evaluation_jobs.lm_eval_answers, EMBEDDED_DIRECTORY, 1, 1, QUESTIONS)[0]


def same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for kind, values in expected.items():
        for one, other in zip(found[kind], values, strict=True):
            assert one == other if kind == "generate_until" else one == pytest.approx(other, abs=tolerance)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_answers_are_the_same_at_every_layout(ranks, answers, tp, pp):
    found, *others = ranks(tp * pp).run(evaluation_jobs.lm_eval_answers, EMBEDDED_DIRECTORY, tp, pp, QUESTIONS)
    same(found, answers, 1e-3)
    assert others == [None] * (tp * pp - 1)


def hf_model():
    pytest.importorskip("accelerate", reason="lm-eval's hf needs accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        str(EMBEDDED_DIRECTORY), dtype="float32", device="cpu", batch_size=3, max_length=512, add_bos_token=True
    )


def test_answers_are_those_of_lm_evals_own_hf(answers):
    lm = hf_model()
    theirs = evaluation_jobs.ask(lm, [one for one in QUESTIONS if one[0] != "loglikelihood_rolling"])
    lm.add_bos_token = False  # with it, hf scores a second BOS as the text's first token
    theirs |= evaluation_jobs.ask(lm, [one for one in QUESTIONS if one[0] == "loglikelihood_rolling"])
    same(answers, theirs, TOLERANCE)


def run_shipped(lm):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from opt_megatron.evaluation.run_tasks import SHIPPED_TASKS

    manager = TaskManager(include_path=str(SHIPPED_TASKS), include_defaults=False)
    return simple_evaluate(
        lm, tasks=["fairy_last_word", "fairy_minimal_pairs"], task_manager=manager, bootstrap_iters=0
    )["samples"]


def test_shipped_tasks_score_as_transformers_and_as_hf(models):
    from opt_megatron.evaluation.lm_eval_model import OPTMegatronLM

    samples = run_shipped(OPTMegatronLM(load="story", batch_size=16, device="cuda:0"))
    assert {task: len(of_task) for task, of_task in samples.items()} == {
        "fairy_last_word": 150,
        "fairy_minimal_pairs": 135,
    }
    model = models["story"][1]
    for sample in samples["fairy_last_word"][::10] + samples["fairy_minimal_pairs"][::10]:
        for strings, responses in zip(sample["arguments"], sample["resps"], strict=True):
            assert responses[0][0] == pytest.approx(log_likelihood(model, *strings), abs=TOLERANCE)
    theirs = run_shipped(hf_model())
    for task, of_task in samples.items():
        for ours, other in zip(of_task, theirs[task], strict=True):
            assert ours["acc"] == other["acc"]
            for one, two in zip(ours["resps"], other["resps"], strict=True):
                assert one[0] == pytest.approx(two[0], abs=TOLERANCE)


def log_likelihood(model, context: str, continuation: str) -> float:
    """By transformers. No pair of the shipped tasks has tokens across the border."""
    before = TOKENIZER.encode(context)
    ids = torch.tensor([TOKENIZER.encode(context + continuation)])
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None])[len(before) - 1 :].sum().item()


def test_generation_wants_options_that_are_known(ranks):
    from ranks import RankFailure

    question = [("generate_until", ("Once", {"until": [], "penalty_alpha": 0.6}))]
    with pytest.raises(RankFailure, match="a task wants generation by penalty_alpha, which is not known here"):
        ranks(1).run(evaluation_jobs.lm_eval_answers, EMBEDDED_DIRECTORY, 1, 1, question)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "lm-eval", *arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_command_prints_and_writes_and_does_not_overwrite(capsys, tmp_path):
    output = tmp_path / "results"
    arguments = ("--tasks", "fairy_last_word,fairy_minimal_pairs", "--limit", "6", "--output", str(output))
    code, out, _ = run(capsys, *arguments)
    assert (
        code == 0 and out.startswith("# story: lm-eval\n") and out.strip() == (output / "results.md").read_text()[:-1]
    )
    report = json.loads((output / "results.json").read_text())
    assert [(score["task"], score["metric"], score["items"]) for score in report["scores"]] == [
        ("fairy_last_word", "perplexity", 6),
        ("fairy_last_word", "acc", 6),
        ("fairy_minimal_pairs", "acc", 6),
    ]
    assert all(score["stderr"] is not None for score in report["scores"])
    assert report["limit"] == 6 and report["command"]
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out and "holds results already; --force replaces them" in err
    code, out, _ = run(capsys, *arguments, "--force", "--json")
    assert code == 0 and json.loads(out)["scores"] == report["scores"]
    (output / "diary.txt").write_text("x")
    code, _, err = run(capsys, *arguments, "--force")
    assert code == 2 and "is no directory of results" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]


def test_shots_are_those_asked_for(capsys, tmp_path):
    (tmp_path / "fixed.yaml").write_text(f"include: {SHIPPED_TASKS}/minimal_pairs.yaml\ntask: fixed\nnum_fewshot: 0\n")
    arguments = ("--tasks", "fairy_minimal_pairs", "fixed", "--include-path", str(tmp_path), "--limit", "4", "--json")
    code, out, err = run(capsys, *arguments, "--num-fewshot", "2")
    assert code == 0 and [score["num_fewshot"] for score in json.loads(out)["scores"]] == [2, 0]
    assert "--num-fewshot 2 was not used where the task's own file fixes another number: fixed (0)" in err


def test_results_are_shown_even_when_they_cannot_be_written(capsys, tmp_path, monkeypatch):
    def full(*arguments):
        raise UserError("no space left")

    monkeypatch.setattr(evaluate_lm_eval, "_write", full)
    arguments = ("--tasks", "fairy_minimal_pairs", "--limit", "2", "--output", str(tmp_path / "results"))
    code, out, err = run(capsys, *arguments)
    assert code == 2 and "fairy_minimal_pairs" in out and "no space left" in err


def test_tasks_of_the_user(capsys, tmp_path):
    data = tmp_path / "animals.jsonl"
    data.write_text("".join(json.dumps({"q": f"The {x} said", "a": [" to", " zebra"]}) + "\n" for x in ("fox", "cat")))
    (tmp_path / "animals.yaml").write_text(
        f"task: animals\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{a}}'\ndoc_to_target: 0\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1}\n"
    )
    code, out, _ = run(capsys, "--tasks", "animals", "--include-path", str(tmp_path), "--json")
    (score,) = json.loads(out)["scores"]
    assert code == 0 and score["value"] == 1.0 and score["items"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "nothing_such"), "knows no task nothing_such"),
        (("--tasks", ","), "no task is named"),
        (("--tasks", "fairy_last_word", "--limit", "0"), "limit is 0, but must be at least 1"),
        (("--tasks", "fairy_last_word", "--include-path", "nowhere"), "nowhere: there is no such directory"),
        (("--tasks", "fairy_last_word", "--batch-size", "0"), "--batch-size is 0"),
        (("--tasks", "fairy_last_word", "--output", f"{__file__}/results"), "is no directory that can be written"),
        (("--tasks", "fairy_minimal_pairs", "--num-fewshot", "200", "--limit", "2"), "has fewer examples"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out and message in err.strip().splitlines()[-1]


def test_a_task_that_cannot_be_loaded_is_one_line(capsys, tmp_path):
    (tmp_path / "bad.yaml").write_text(
        f"task: bad\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/none.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: x\ndoc_to_target: y\n"
    )
    code, out, err = run(capsys, "--tasks", str(Path("bad")), "--include-path", str(tmp_path))
    assert code == 2 and not out and "lm-eval cannot load bad: " in err.strip().splitlines()[-1]
