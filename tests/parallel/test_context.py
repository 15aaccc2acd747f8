"""Layout checks, seeding, and errors that reach every rank."""

import subprocess
import sys

import pytest
import rank_jobs
import torch

from opt_megatron.config import released_config
from opt_megatron.errors import UserError
from opt_megatron.parallel import context
from opt_megatron.parallel.context import check_seed
from opt_megatron.parallel.layout import check_layout

OPT_125M = released_config("opt-125m")


@pytest.mark.parametrize(
    ("config", "tp", "pp", "world", "message"),
    [
        (None, 2, 2, 1, "tensor 2 x pipeline 2 = 4 processes are needed.*torchrun --nproc-per-node 4"),
        (None, 0, 1, 1, "0 x 1; both must be at least 1"),
        (OPT_125M, 5, 1, 5, "5 does not divide the model's 12 attention heads: use one of 1, 2, 3, 4, 6, 12"),
        (OPT_125M, 1, 5, 5, "5 does not divide the model's 12 layers: use one of 1, 2, 3, 4, 6, 12"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line_with_the_numbers(monkeypatch, config, tp, pp, world, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=message) as caught:
        check_layout(config, tp, pp, world)
    assert "\n" not in str(caught.value)


def test_processes_beyond_the_model_are_data_parallel_or_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_layout(OPT_125M, 2, 1, 4)
    with pytest.raises(UserError, match="2 processes are needed, but 4 were started"):
        check_layout(OPT_125M, 2, 1, 4, data_parallel=False)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed):
    with pytest.raises(UserError, match=str(seed)):
        check_seed(seed)


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(8, 3, 3), (1, 3, 0), (1, 0, 0), (2, 2, None)])
def test_the_gpu_of_a_process(monkeypatch, visible, local_rank, index):
    """Slurm binds a GPU to each task, which sees that one alone."""
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    if index is None:
        with pytest.raises(UserError, match="local rank 2 has no GPU of its own: this machine has 2"):
            context._choose_device(None)
    else:
        assert context._choose_device(None) == torch.device("cuda", index)


def test_two_ranks_on_one_gpu_are_refused(ranks):
    shared, own = ranks(2).run(rank_jobs.gpus_checked, ["a", "a"]), ranks(2).run(rank_jobs.gpus_checked, ["a", "b"])
    assert all(text.startswith("ranks 0 and 1 compute on one GPU of ") for text in shared) and own == ["", ""]


def test_context_has_each_ranks_position(ranks):
    contexts = ranks(4).run(rank_jobs.context_facts, 2, 2)
    assert contexts == [(0, 0, True, False, 2), (1, 0, True, False, 2), (0, 1, False, True, 2), (1, 1, False, True, 2)]


def test_one_ranks_mistake_is_raised_on_all(ranks):
    assert ranks(2).run(rank_jobs.error_of_rank, 1) == ["no such thing (on rank 1)"] * 2
    assert ranks(2).run(rank_jobs.error_of_rank, 0) == ["no such thing"] * 2


def test_tensor_ranks_share_torchs_generator_and_have_megatrons_apart(ranks):
    (common, first, second), (other_common, other_first, _) = ranks(2).run(rank_jobs.random_draws, 2, 1)
    assert common == other_common
    assert first != other_first and first != second
    assert ranks(2).run(rank_jobs.random_draws, 2, 1)[0] == (common, first, second)  # seeded anew


def test_ranks_that_end_before_megatrons_groups_are_made_leave_no_thread_of_gloos():
    program = """
import pathlib, torch
from datetime import timedelta
from opt_megatron.parallel import agreement, context
def threads():
    return sum("gloo" in path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm"))
context._start_distributed(torch.device("cpu"), timedelta(minutes=1), None)
agreement.check_same_on_all_ranks(context._control_group(), {})
began = threads()
context.shut_down()
print(began > 0, threads())
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.split() == ["True", "0"]
