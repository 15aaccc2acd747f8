"""The log of a run's steps, and what repeating them does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opt_megatron.checkpoint.mezo.run_files import RUN_FILE, STEPS_FILE, MezoRun, read_run, run_files
from opt_megatron.checkpoint.mezo.steps import MezoStep, add_multiple, repeat_step, steps_from_bytes, steps_to_bytes
from opt_megatron.errors import CheckpointError

STEPS = [MezoStep(2**64 - 1, -3.5, 1e-6), MezoStep(0, 0.0, 2e-6)]
RUN = MezoRun("story", None, "0123", "float16", 1e-3, 1)


def test_the_log_takes_24_bytes_a_step_and_returns_them() -> None:
    assert len(steps_to_bytes(STEPS)) == 48
    assert steps_from_bytes(steps_to_bytes(STEPS)) == STEPS
    for content, message in ((b"x" * 25, "25 bytes"), (steps_to_bytes([MezoStep(1, float("nan"), 1.0)]), "not finite")):
        with pytest.raises(ValueError, match=message):
            steps_from_bytes(content)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_line_of_a_step_is_rounded_to_the_parameters(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1000, generator=generator)
    before = (torch.randn(1000, generator=generator) * 0.02).to(dtype)
    expected, found = before.clone(), before.clone()
    for factor in (1e-3, -2e-3, 1e-3, 3.5e-6):
        expected = (expected.float() + normal * factor).to(dtype)
    repeat_step(found, normal, 1e-3, STEPS[0])
    assert torch.equal(found, expected) and not torch.equal(found, before)
    add_multiple(found, normal, 0.0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (RUN_FILE, b"{"),
        (RUN_FILE, b"{}"),
        (RUN_FILE, b"[1]"),
        (STEPS_FILE, b"x" * 7),
        (STEPS_FILE, steps_to_bytes(STEPS[:1])),
        (STEPS_FILE, None),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, name: str, content: bytes | None) -> None:
    for file, written in run_files(RUN, STEPS, {"iteration": 2}).items():
        (tmp_path / file).write_bytes(written)
    assert read_run(tmp_path) == (RUN, STEPS, {"iteration": 2})
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"MeZO|steps") as error:
        read_run(tmp_path)
    assert "\n" not in str(error.value)
