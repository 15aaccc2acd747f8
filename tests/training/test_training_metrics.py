"""metrics.jsonl is continued without the lines of lost steps; durations and FLOPs are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opt_megatron.config import released_config
from opt_megatron.errors import UserError
from opt_megatron.training.metrics import METRICS_FILE, MetricsLogger, flops_per_token, format_duration, read_metrics
from opt_megatron.training.plot_curves import read_curve


def test_a_resumed_run_drops_the_lines_of_later_steps_and_half_lines(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, None)
    for iteration in (1, 2, 3):
        logger.record("train", iteration, {"loss": 1 / iteration if iteration < 3 else float("inf")})
    logger.close()
    path = tmp_path / METRICS_FILE
    assert json.loads(path.read_text().splitlines()[-1]) == {"kind": "train", "iteration": 3, "loss": "inf"}
    assert read_curve(tmp_path, "loss").train == [(1, 1.0), (2, 0.5), (3, float("inf"))]
    path.write_text(path.read_text() + '{"kind": "train", "itera')
    logger = MetricsLogger(tmp_path, None, iteration=2)
    logger.record("valid", 2, {"loss": 4.0})
    logger.close()
    assert [(entry["kind"], entry["iteration"]) for _, entry in read_metrics(path)] == [
        ("train", 1), ("train", 2), ("valid", 2),
    ]  # fmt: skip


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path, None)
    with Path("/dev/full").open("w") as logger._file:
        with pytest.raises(UserError, match="/dev/full: cannot be written: No space left on device"):
            logger.record("train", 1, {"loss": 1.0})
        logger.close()


def test_durations_are_hours_minutes_and_seconds() -> None:
    assert [format_duration(seconds) for seconds in (0, 61.9, 36_000, float("inf"))] == [
        "0:00:00", "0:01:01", "10:00:00", "0:00:00",
    ]  # fmt: skip


def test_flops_are_six_a_parameter_and_the_attention() -> None:
    config = released_config("opt-175b")
    matrices = config.num_layers * 12 * config.hidden_size**2 + config.vocab_size * config.hidden_size
    attention = 12 * config.num_layers * config.hidden_size * 2048
    assert flops_per_token(config, 2048) == pytest.approx(6 * matrices + attention)
