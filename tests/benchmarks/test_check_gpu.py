"""The check of a machine's GPUs, rehearsed on the CPU: what it compares with, and that no section costs another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import section_jobs
import torch

from benchmarks.check_gpu import command, run
from benchmarks.check_gpu.case import Case, attempt, compared
from benchmarks.check_gpu.plain_opt import PlainOPT
from benchmarks.check_gpu.run import SECTIONS, Section
from benchmarks.check_gpu.settings import Settings
from benchmarks.check_gpu.table import format_table
from benchmarks.random_weights import save_random
from benchmarks.worker import iterate_in_child
from opt_megatron.config import OPTConfig

SHAPES = {
    "pre-norm": {"word_embed_proj_dim": 32},
    "post-norm": {"word_embed_proj_dim": 16, "do_layer_norm_before": False, "has_final_layer_norm": False},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_torch_is_transformers(shape: str, tmp_path: Path) -> None:
    from transformers import OPTForCausalLM

    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64, "vocab_size": 96}
    save_random(OPTConfig(**sizes, **SHAPES[shape], dtype="float32"), tmp_path)
    theirs, plain = OPTForCausalLM.from_pretrained(tmp_path).eval(), PlainOPT(tmp_path, "cpu", torch.float32)
    tokens = torch.tensor([[2, 17, 95, 3, 40], [2, 9, 11, 60, 61]])
    with torch.no_grad():
        torch.testing.assert_close(plain.logits(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    made = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, 5:]
    assert len(set(made[0].tolist())) > 2  # it wanders
    assert plain.greedy(tokens.tolist(), 9) == [tuple(row) for row in made.tolist()]
    weight = plain.weights["layers.0.fc1.weight"].requires_grad_()
    plain.loss(tokens.tolist()).backward()
    logits = theirs(tokens[:, :-1]).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    torch.testing.assert_close(weight.grad, theirs.model.decoder.layers[0].fc1.weight.grad, atol=1e-5, rtol=0)


def test_a_case_that_raises_has_failed_and_says_where() -> None:
    case = attempt("ratio", lambda: (True, {"ratio": 1 / 0}))
    assert (case.passed, case.figures) == (False, {})
    assert case.error.startswith("ZeroDivisionError: division by zero (case.py:")
    assert "test_check_gpu.py:" in case.error


@pytest.mark.parametrize(
    ("own", "expected", "passed"),
    [
        ([1, 0.5], [1, 0.5004], True),
        ([1, 0.5], [1, 0.502], False),
        ([1, 0.5], [1], False),
        ([float("nan")], [0.0], False),
        ([0.0, float("nan")], [0.0, 0.0], False),
    ],
)
def test_a_gpus_numbers_are_compared_with_the_cpus(own: list[float], expected: list[float], passed: bool) -> None:
    case = compared(Case("x", figures={"values": own}), Case("x", figures={"values": expected}))
    assert case.passed is passed


def test_a_feature_that_failed_on_the_cpu_has_failed() -> None:
    own = Case("x", figures={"values": [1]})
    assert compared(own, Case("x", False, error="E")).error == "on the CPU: E"
    assert compared(own, None).passed is False


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A rehearsal with toy sizes."""
    return Settings("cpu", 2, tmp_path, is_tiny=True)


def section(job: Callable[[], Iterator[Case]]) -> Section:
    """That runs a job in a child."""
    return Section("", lambda settings, deadline: iterate_in_child("the job", 1, deadline, job))


def test_a_section_costs_itself_alone(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [section_jobs.fails, section_jobs.crashes, section_jobs.refuses, section_jobs.passes]
    monkeypatch.setattr(run, "SECTIONS", {job.__name__: section(job) for job in jobs})
    path = tmp_path / "check.json"
    result = run.run(settings, [job.__name__ for job in jobs], 480, path)
    assert json.loads(path.read_text()) == result
    sections = result["sections"]
    assert [found["state"] for found in sections.values()] == ["failed"] * 3 + ["passed"]
    assert [list(found["cases"]) for found in sections.values()] == [
        ["false", "broken", "after"],
        ["first"],
        ["first"],
        ["claimed", "measured"],
    ]
    assert "ended with code 7" in sections["crashes"]["error"] and "no such thing" in sections["refuses"]["error"]
    assert [name.split(":")[0] for name in result["failed"]] == ["fails", "fails", "crashes", "refuses"]
    assert not result["passed"]
    table = format_table(result).splitlines()
    assert len(table) == 3 + 2 + 2 + 2 + 1 and table[-1].startswith("4 failed")
    assert [line.split()[2] for line in table[-3:-1]] == ["ok", "-"]
    assert capsys.readouterr().err.count("\n") == len(jobs)


def test_what_hangs_is_ended_and_what_has_no_time_is_not_begun(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        run, "SECTIONS", {job.__name__: section(job) for job in (section_jobs.hangs, section_jobs.passes)}
    )
    monkeypatch.setattr(run, "_LEAST_SECONDS", 1)
    result = run.run(settings, ["hangs", "passes"], 2, tmp_path / "check.json")
    hung, other = result["sections"].values()
    assert "too long" in hung["error"]
    assert (other["state"], other["cases"]) == ("not begun", {})


def test_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, names = tmp_path / "check.json", [name for name in SECTIONS if name != "speed"]  # as speed-small, here
    with pytest.raises(SystemExit) as end:
        command.main(["--device", "cpu", "--tiny", "--output", str(path), "--seconds", "100000", "--only", *names])
    result: dict[str, Any] = json.loads(path.read_text())
    # On a CPU no claim is made about which is faster: that is a GPU's.
    assert (result["failed"], end.value.code) == ([], 0)
    assert list(result["sections"]) == names
    assert all(found["cases"] for found in result["sections"].values())
    claimed = {name for name, found in result["sections"].items() for case in found["cases"].values() if case["passed"]}
    assert claimed == set(names) - {"environment", "speed-small"}
    assert "all passed" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        command.main(["--device", "cpu", "--tiny", "--output", str(path)])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("check.json exists: choose another --output, or replace it with --force\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["--output", str(tmp_path / "check.json")])
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1)
    assert "finds no CUDA GPU here; --device cpu --tiny rehearses" in said
    assert not list(tmp_path.iterdir())
