"""The page of results, and the data of the shipped tasks; without lm-eval."""

import json
import sys

from opt_megatron.api import OPT
from opt_megatron.evaluation.published_scores import SCORES, SIZES
from opt_megatron.evaluation.report import command_line, to_json, to_markdown
from opt_megatron.evaluation.run_tasks import SHIPPED_TASKS

RESULTS = {
    "results": {
        "lambada_openai": {"alias": "x", "perplexity,none": 26.1, "perplexity_stderr,none": 0.9, "acc,none": 0.378},
        "other": {"acc,none": 0.5, "acc_stderr,none": "N/A"},
    },
    "versions": {"lambada_openai": 1.0},
    "n-shot": {"lambada_openai": 0, "other": 5},
    "n-samples": {"lambada_openai": {"original": 5153, "effective": 5153}},
    "higher_is_better": {"lambada_openai": {"perplexity": False, "acc": True}},
}


def test_published_scores_are_listed_next_to_the_run(alone):
    report = to_json(RESULTS, OPT.open("story", alone), {"dtype": "float32"})
    page = to_markdown(report)
    assert "| lambada_openai | 1.0 | 0 | 5153 | perplexity | lower | 26.1000 | ± 0.9000 |" in page
    assert "| other |  | 5 |  | acc |  | 0.5000 |  |" in page
    beside = page[page.index("Beside Meta's") :].splitlines()
    assert beside[2] == "| task | metric | this run | 125m | 350m | 1.3b | 2.7b | 6.7b | 13b | 30b | 66b |"
    assert beside[4].startswith("| lambada_openai | perplexity | 26.10 ± 0.90 | 26.02 | 16.40 |")
    assert beside[5].startswith("| lambada_openai | acc | 37.80 | 37.90 | 45.16 |")
    assert all(len(row) == len(SIZES) for row in SCORES.values())
    assert json.loads(json.dumps(report)) == report
    assert "Beside" not in to_markdown(report | {"limit": 100})
    few = [score | {"num_fewshot": 5} for score in report["scores"]]
    assert "Beside" not in to_markdown(report | {"scores": few})


def test_the_command_is_one_to_paste(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/evaluate.py", "lm-eval", "--tasks", "a b"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert command_line() == "python tools/evaluate.py lm-eval --tasks 'a b'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert command_line() == "torchrun --nproc-per-node 8 --nnodes 2 tools/evaluate.py lm-eval --tasks 'a b'"
    monkeypatch.setattr(sys, "argv", ["/some/bin/opt-megatron", "evaluate"])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert command_line() == "torchrun --nproc-per-node 8 --no-python opt-megatron evaluate"


def test_shipped_tasks_have_different_items_of_one_line_each():
    words = [json.loads(line) for line in (SHIPPED_TASKS / "last_word.jsonl").read_text("utf-8").splitlines()]
    pairs = [json.loads(line) for line in (SHIPPED_TASKS / "minimal_pairs.jsonl").read_text("utf-8").splitlines()]
    assert len({item["context"] for item in words}) == len(words) == 150
    assert all(item["word"].isalpha() and item["context"] == item["context"].strip() for item in words)
    assert len({item["good"] for item in pairs}) == len(pairs) == 135
    assert all(item["good"] != item["bad"] for item in pairs)
