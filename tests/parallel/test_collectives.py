"""Sums and gathers through shared memory against torch.distributed's."""

import platform

import pytest
import rank_jobs
import torch
from ranks import forkserver

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="shared memory needs the x86 order of writes")

LARGE = (7, 300_001)  # of float32: three pieces, the last of which is not full


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tp", [2, 3])
def test_all_ranks_get_the_sum_and_the_parts(ranks, tp, dtype):
    for shape in ((1,), (5, 48), (3, 2, 2)):
        results = ranks(tp).run(rank_jobs.shared_memory_and_distributed, tp, dtype, shape)
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("tp", [2, 3])
def test_tensors_that_are_larger_than_a_slot(ranks, tp):
    results = ranks(tp).run(rank_jobs.shared_memory_and_distributed, tp, torch.float32, LARGE)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("tp", [2, 3])
def test_many_rounds(ranks, tp):
    ranks(tp).run(rank_jobs.many_rounds, tp, 400)


def test_what_is_chosen(ranks):
    assert ranks(2).run(rank_jobs.kinds_of_collectives, 2, 1) == [("SharedMemoryCollectives", True)] * 2
    assert ranks(2).run(rank_jobs.kinds_of_collectives, 1, 2) == [("NoOpCollectives", False)] * 2


def test_a_rank_does_not_wait_for_one_that_has_ended(tmp_path):
    context = forkserver()
    ours, theirs = context.Pipe()
    processes = [
        context.Process(target=rank_jobs.with_a_peer_that_ends, args=(rank, str(tmp_path / "store"), theirs))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        assert ours.poll(100), "the rank that is left hangs"
        assert ours.recv() == ([2.0] * 3, "Connection closed by peer: tensor parallel rank 1 has ended")
    finally:
        for process in processes:
            process.kill()
            process.join()
