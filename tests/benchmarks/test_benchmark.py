"""The benchmark: its workloads repeat, its numbers are what they say, and all systems are asked the same."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import command, options
from benchmarks.measure import alternate, cache_bytes, measure_bandwidth, percentile, weight_bytes
from benchmarks.options import BenchmarkOptions
from benchmarks.report import add_limits, format_table
from benchmarks.session import run
from benchmarks.static_batching import serve_in_batches
from benchmarks.weights import make_model, model_directory
from benchmarks.worker import in_child
from benchmarks.workload import QUICK, WorkloadRequest, WorkloadSizes, make_prompts, make_requests, poisson_arrivals
from benchmarks.workload_runs import Group, compared, make_row
from opt_megatron.config import OPTConfig, released_config
from opt_megatron.errors import UserError

OPT_125M = released_config("opt-125m")
TINY = OPTConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64, word_embed_proj_dim=32, vocab_size=256
)
TINY_SIZES = WorkloadSizes(
    prefill=((1, 8),),
    decode_batches=(1, 3),
    decode_prompt=8,
    decode_steps=4,
    contexts=(8, 40),
    context_steps=2,
    requests=8,
    prompt_range=(4, 40),
    output_range=(2, 12),
    equality=(3, 16, 12),
    memory=(1, 8, 2),
)
HAS_CTRANSLATE2 = importlib.util.find_spec("ctranslate2") is not None


def tiny_options(output: Path, **changes: object) -> BenchmarkOptions:
    """A run of seconds."""
    values: dict[str, object] = {
        "sizes": {"tiny": TINY},
        "dtypes": ("float32",),
        "workloads": ("decode", "context", "poisson"),
        "systems": ("opt_megatron", "transformers", *(["ctranslate2"] if HAS_CTRANSLATE2 else [])),
        "workload_sizes": TINY_SIZES,
        "threads": 2,
        "repeats": 2,
        "mixed_repeats": 1,
        "settle_seconds": 0,
        "output": output,
    }
    return BenchmarkOptions(**(values | changes))


def test_requests_repeat_by_seed_and_stay_within_their_bounds() -> None:
    requests = make_requests(OPT_125M, WorkloadSizes(), seed=7)
    assert requests == make_requests(OPT_125M, WorkloadSizes(), seed=7)
    assert requests != make_requests(OPT_125M, WorkloadSizes(), seed=8)
    assert len(requests) == 64
    assert all(16 <= len(request.prompt) <= 512 and 16 <= request.new_tokens <= 256 for request in requests)
    assert all(request.prompt[0] == 2 and min(request.prompt[1:]) >= 4 for request in requests)
    assert max(max(request.prompt) for request in requests) < OPT_125M.num_tokens


def test_another_round_has_the_same_lengths_and_other_tokens() -> None:
    first, second = (make_requests(OPT_125M, QUICK, 1, label) for label in ("0", "1"))
    lengths = [[(len(request.prompt), request.new_tokens) for request in requests] for requests in (first, second)]
    assert lengths[0] == lengths[1]
    assert all(a.prompt != b.prompt for a, b in zip(first, second, strict=True))
    assert make_prompts(OPT_125M, 2, 9, 1, "0") != make_prompts(OPT_125M, 2, 9, 1, "1")


def test_arrivals_repeat_ascend_and_keep_their_rate() -> None:
    arrivals = poisson_arrivals(2000, 5.0, seed=3)
    assert arrivals == poisson_arrivals(2000, 5.0, seed=3)
    assert arrivals == sorted(arrivals) and arrivals[0] == 0
    assert 2000 / arrivals[-1] == pytest.approx(5, rel=0.1)


def test_a_model_with_too_few_positions_is_refused() -> None:
    with pytest.raises(UserError, match="tiny has 128 positions, but the workloads need 2017"):
        WorkloadSizes().check_fits(TINY.replace(max_position_embeddings=128), "tiny")


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_hold_only_what_has_arrived(workers: int) -> None:
    requests = [WorkloadRequest((2, n), n) for n in range(1, 8)]
    arrivals = [0.0, 0.0, 0.0, 0.04, 0.04, 0.08, 0.08]
    started: list[tuple[float, list[int]]] = []
    begin = time.perf_counter()

    def run_batch(batch: list[WorkloadRequest], mark: object) -> list[list[int]]:
        started.append((time.perf_counter() - begin, [request.new_tokens for request in batch]))
        time.sleep(0.01)
        for row in range(len(batch)):
            mark(row)
        return [[request.new_tokens] for request in batch]

    served = serve_in_batches(requests, arrivals, run_batch, batch_size=2, workers=workers)
    assert served.tokens == [[n] for n in range(1, 8)]
    assert all(done >= arrival for done, arrival in zip(served.finished, arrivals, strict=True))
    assert all(len(batch) <= 2 and at >= max(arrivals[n - 1] for n in batch) for at, batch in started)
    assert served.seconds == max(served.finished)


def test_of_requests_that_come_together_the_lowest_rank_goes_first() -> None:
    requests = [WorkloadRequest((2,) * n, 1) for n in (3, 9, 5)]
    batches: list[list[int]] = []

    def run_batch(batch: list[WorkloadRequest], mark: object) -> list[list[int]]:
        batches.append([len(request.prompt) for request in batch])
        return [[] for _ in batch]

    serve_in_batches(requests, [0.0] * 3, run_batch, batch_size=2, rank=lambda request: -len(request.prompt))
    assert batches == [[9, 5], [3]]


def test_systems_take_turns_and_each_begins_a_round() -> None:
    turns: list[str] = []
    counter = itertools.count()

    def measure(name: str) -> dict[str, float]:
        turns.append(name)
        return {"ms": next(counter)}

    runs = {name: lambda number, name=name: measure(f"{name}{number}") for name in "ab"}
    samples = alternate(runs, repeats=3, settle_seconds=0)
    assert turns == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert samples == {"ms": {"a": [0, 3, 4], "b": [1, 2, 5]}}
    assert list(samples["ms"]) == ["a", "b"]


def test_numbers_that_rows_are_made_of() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2
    assert percentile([4.0, 1.0, 3.0, 2.0], 95) == 4
    elements = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 50272 * 768
    assert weight_bytes(OPT_125M, "float32") == 4 * elements
    assert weight_bytes(OPT_125M, "int8") == elements
    assert cache_bytes(OPT_125M, "float32", 10) == cache_bytes(OPT_125M, "int8", 10) == 2 * 12 * 768 * 4 * 10
    row = make_row("s", "float32", "decode", "batch 1", "ms", {"ours": [2.0, 1.0, 9.0], "theirs": [4.0, 3.0, 8.0]})
    assert row["systems"]["ours"] == {"median": 2.0, "min": 1.0, "max": 9.0, "samples": [2.0, 1.0, 9.0], "ratio": 1.0}
    assert row["systems"]["theirs"]["ratio"] == 2.0


def test_differences_are_counted() -> None:
    group = Group(None, "s", TINY, "float32", {"ours": None, "theirs": None})
    entry = compared(group, "what", {"ours": [[1, 2, 3], [4, 5]], "theirs": [[1, 2, 3], [4, 6]]})
    assert entry["systems"] == {"theirs": {"equal": 4, "tokens": 5, "equal_rows": 1, "rows": 2}}


def synthetic_result() -> dict:
    """Two dtypes, one of them without transformers; every workload; a float32 token that differs."""
    rows = []
    for dtype, systems in (("float32", ("opt_megatron", "transformers", "ctranslate2")), ("int8", ("opt_megatron",))):
        for workload, case, metric, more in (
            ("prefill", "1 x 128 tokens", "ms", {}),
            ("decode", "batch 1", "ms", {"limit_bytes": 5 * 10**8}),
            ("context", "64 tokens", "ms", {"limit_bytes": 5 * 10**8, "cache_bytes": 10**6}),
            ("context", "2000 tokens", "ms", {"limit_bytes": 6 * 10**8, "cache_bytes": 10**8}),
            ("mixed", "all at once", "all done, s", {"tokens_per_second": {"opt_megatron": 300.0}}),
            ("poisson", "2 a second", "median wait, s", {}),
            ("poisson", "2 a second", "95% wait, s", {}),
        ):
            samples = {system: [10.0 + n, 11.0 + n, 12.0 + n] for n, system in enumerate(systems)}
            rows.append(make_row("opt-125m", dtype, workload, case, metric, samples) | more)
    counts = {"equal": 127, "tokens": 128, "equal_rows": 3, "rows": 4}
    return {
        "machine": {"processor": "a processor", "cores": 2, "versions": {"torch": "2"}},
        "settings": {"threads": 2, "device": "cpu", "repeats": 3, "mixed_repeats": 3},
        "bandwidth": [{"gb_per_s": 40.0, "kernels": {"sum": 40.0, "max": 30.0}}],
        "models": {"opt-125m": {"parameters": 125_239_296}},
        "equality": [{"size": "opt-125m", "dtype": "float32", "what": "w", "systems": {"transformers": counts}}],
        "tuned": [
            {"size": "opt-125m", "dtype": "int8", "system": "ctranslate2", "seconds": {"1 x 16": 3.0, "2 x 8": 2.0}}
        ],
        "rows": rows,
        "notes": ["a note"],
    }


def test_the_table_shows_ratios_limits_and_differences() -> None:
    result = synthetic_result()
    add_limits(result)
    table = format_table(result)
    assert "transformers 127 of 128 (3 of 4 rows)  ** OUTPUTS DIFFER **" in table
    assert "ctranslate2 int8 serves 2 x 8 (tried: 1 x 16 3.0 s, 2 x 8 2.0 s)" in table
    (decode,) = [line for line in table.splitlines() if line.startswith("float32  batch 1")]
    # 5e8 bytes at 40 GB/s are 12.5 ms.
    wanted = "float32 batch 1 11.0 [10.0-12.0] 12.0 [11.0-13.0] 1.09 13.0 [12.0-14.0] 1.18 12.5 0.88"
    assert " ".join(decode.split()) == wanted
    assert "reading 99.0 MB more takes 2.50 ms" in table
    assert "note: a note" in table


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot import save_plot

    result = synthetic_result()
    add_limits(result)
    save_plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_arguments_become_options(tmp_path: Path) -> None:
    plain = command.parse([])
    assert list(plain.sizes) == ["opt-125m", "opt-1.3b"]
    assert (plain.dtypes, plain.repeats) == (("float32", "int8"), 5)
    assert plain.systems == ("opt_megatron", "transformers", "ctranslate2")
    assert plain.systems_for("int8") == ("opt_megatron", "ctranslate2")
    quick = command.parse(["--quick", "--dtypes", "fp32", "--workloads", "mixed", "decode"])
    assert (list(quick.sizes), quick.dtypes, quick.workload_sizes) == (["opt-125m"], ("float32",), QUICK)
    assert quick.workloads == ("decode", "mixed")
    cuda = command.parse(["--device", "cuda"])
    assert cuda.systems == ("opt_megatron", "transformers")
    assert cuda.dtypes == ("float32", "bfloat16", "float16", "int8")
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    (name,) = command.parse(["--sizes", str(tmp_path)]).sizes
    assert name == tmp_path.name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sizes", "7b"], "'7b' is not a released OPT size"),
        (["--dtypes", "bf16"], "bfloat16 is not measured on cpu: use float32, int8"),
        (["--workloads", "teaching"], "--workloads: 'teaching' is not one of prefill, decode"),
        (["--peers", "vllm"], "--peers: 'vllm' is not one of transformers, ctranslate2"),
        (["--repeats", "0"], "--repeats is 0, but must be at least 1"),
        (["--threads", "x"], "argument --threads: invalid int value"),
        (["--poisson-rate", "-1"], "--poisson-rate is -1.0, but must be"),
    ],
)
def test_a_mistake_is_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        command.main([*argv, "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1)
    assert message in said
    assert not (tmp_path / "out").exists()


def test_a_result_is_not_replaced_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: True)  # as if all were installed
    (tmp_path / "benchmark.json").write_text("{}")
    with pytest.raises(UserError, match=r"benchmark\.json exists: .* or replace it with --force"):
        replace(tiny_options(tmp_path), systems=("opt_megatron",)).check()


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None if name == "ctranslate2" else True)
    with pytest.raises(UserError, match=r'ctranslate2 cannot be imported; .* pip install -e "\.\[bench\]"'):
        replace(tiny_options(tmp_path), systems=("opt_megatron", "ctranslate2")).check()


def test_a_child_that_ends_is_reported() -> None:
    with pytest.raises(UserError, match="the process of a child ended with code 9"):
        in_child("a child", 1, os._exit, 9)


def test_bandwidth_is_that_of_the_best_kernel() -> None:
    measured = measure_bandwidth(threads=2, device="cpu", repeats=1)
    assert measured["gb_per_s"] == max(measured["kernels"].values()) > 0
    assert measured["bytes"] >= 256 * 2**20


def test_a_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    chosen = tiny_options(tmp_path / "out", work_dir=tmp_path / "models")
    # Here, where transformers is imported already; the run takes what is there.
    conversions = ("float32",) if HAS_CTRANSLATE2 else ()
    make_model(model_directory(tmp_path / "models", "tiny", TINY), TINY, conversions)
    run(chosen)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert result["finished"] and result["format"] == 1

    peers = list(result["settings"]["systems"][1:])
    assert [entry["what"].split(",")[0] for entry in result["equality"]] == ["3 prompts of 16 tokens", "mixed workload"]
    for entry in result["equality"]:
        assert list(entry["systems"]) == peers
        assert all(counts["equal"] == counts["tokens"] > 0 for counts in entry["systems"].values())

    cases = [(row["workload"], row["case"], row["metric"]) for row in result["rows"]]
    assert cases[:4] == [("decode", f"batch {n}", "ms") for n in (1, 3)] + [
        ("context", f"{n} tokens", "ms") for n in (8, 40)
    ]
    assert [metric for _, _, metric in cases[4:]] == ["median wait, s", "95% wait, s", "all done, s"]
    for row in result["rows"]:
        assert list(row["systems"]) == ["opt_megatron", *peers]
        repeats = 1 if row["workload"] == "poisson" else 2
        for values in row["systems"].values():
            assert {"median", "min", "max", "samples", "ratio"} <= values.keys()
            assert len(values["samples"]) == repeats
        assert ("limit" in row) == (row["workload"] in ("decode", "context"))


def test_training_is_measured_on_the_same_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"workloads": ("training",), "systems": ("opt_megatron", "transformers")}
    workload_sizes = replace(TINY_SIZES, training=(2, 16))
    result = run(tiny_options(tmp_path / "out", workload_sizes=workload_sizes, **values))
    times, memory = result["rows"]
    assert times["metric"] == "ms" and memory["metric"] == "growth, MB"
    assert times["loss_apart"]["transformers"] < 1e-5
    assert set(memory["systems"]) == {"opt_megatron", "transformers", "opt_megatron, recomputed"}
    assert "the losses of one batch are apart from" in capsys.readouterr().out
