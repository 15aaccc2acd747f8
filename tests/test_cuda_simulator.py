"""The simulated GPU refuses what a GPU refuses, repeats what a CUDA graph repeats, and counts."""

from collections.abc import Callable

import gpu_jobs
from ranks import RankPool

Pools = Callable[[int], RankPool]


def test_mistakes_are_refused(simulated_gpus: Pools) -> None:
    said = simulated_gpus(1).run(gpu_jobs.rules_of_the_device)[0]
    starts = {
        "two devices": "DeviceMismatch: aten.add",
        "index": "DeviceMismatch: aten.index_select",
        "generator": "DeviceMismatch: aten.rand",
        "numpy": "TypeError: can't convert cuda:0",
        "nccl": "DeviceMismatch: c10d.allreduce_",
        "read in a graph": "CaptureError: read (tolist)",
        "upload in a graph": "CaptureError: upload",
        "decision in a graph": "CaptureError: read (item)",
    }
    assert {name: message[: len(starts[name])] for name, message in said.items()} == starts
    assert all("gpu_jobs.py:" in message for name, message in said.items() if name != "numpy")


def test_a_capture_changes_nothing_and_a_replay_repeats_it(simulated_gpus: Pools) -> None:
    captured, replayed, product = simulated_gpus(1).run(gpu_jobs.replays_of_a_graph)[0]
    assert captured == [0, 0]
    assert replayed == [[1, 1], [2, 2]]
    assert product == [30]


def test_kernels_reads_and_uploads_are_counted(simulated_gpus: Pools) -> None:
    assert simulated_gpus(1).run(gpu_jobs.counts_of_a_few_lines)[0] == (2, 3, 1)
