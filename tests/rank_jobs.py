"""Jobs that ranks run for the tests of several areas."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

# ruff: noqa: E402
from opt_megatron.parallel.core_compat import import_core

import_core()  # before a module that imports Megatron-core: without torch's compiler, as the commands do

import torch

from opt_megatron.api import OPT
from opt_megatron.checkpoint.load import load_model
from opt_megatron.errors import UserError
from opt_megatron.generation.core import engine as engine_module
from opt_megatron.generation.core import model_runner
from opt_megatron.generation.core.cuda_graphs import CudaGraphs
from opt_megatron.generation.core.decode_step import DecodeStep
from opt_megatron.generation.core.engine import Engine
from opt_megatron.generation.core.kv_cache_allocator import round_up
from opt_megatron.generation.core.model_runner import ModelRunner
from opt_megatron.generation.core.paged_kv_cache import PagedKVCache
from opt_megatron.generation.core.request_queue import RequestQueue
from opt_megatron.generation.request import Completion, Request
from opt_megatron.generation.sampling.logits_processors import NO_IDS
from opt_megatron.generation.sampling.sampling_params import SamplingParams
from opt_megatron.generation.step import BLOCK_SIZE, KVCacheBlocks, ScheduledSequence, StepInput
from opt_megatron.parallel.collectives import (
    DistributedCollectives,
    SharedMemoryCollectives,
    tensor_parallel_collectives,
)
from opt_megatron.parallel.command_loop import CommandLoop
from opt_megatron.parallel.context import ParallelContext, _check_gpus, init_parallel, on_all_ranks


def start(tp: int, pp: int) -> ParallelContext:
    """Groups of this layout on the running world."""
    return init_parallel(tp, pp, seed=1234)


def generate(
    directory: Path, tp: int, pp: int, requests: list[Request], quantization: str | None = None
) -> list[Completion]:
    """Load and complete the requests."""
    parallel = start(tp, pp)
    model = load_model(directory, None, parallel, quantization=quantization)
    return Engine(model, parallel, max_batch_size=8).complete(requests)


def generate_with_tokens_kept(
    directory: Path, tp: int, pp: int, requests: list[Request], max_batch_size: int = 8
) -> tuple[list[Completion], list[Completion]]:
    """The requests completed as on a GPU, and as on a CPU."""
    parallel = start(tp, pp)
    expected = Engine(load_model(directory, None, parallel), parallel, max_batch_size=max_batch_size).complete(requests)
    with (
        mock.patch.object(model_runner, "keeps_tokens", lambda device: True),
        mock.patch.object(model_runner, "make_kv_cache", PagedKVCache),
        mock.patch.object(model_runner, "DecodeStep", _GraphedDecodeStep if pp == 1 else model_runner.DecodeStep),
    ):
        engine = Engine(load_model(directory, None, parallel), parallel, max_batch_size=max_batch_size)
        return engine.complete(requests), expected


class _GraphedDecodeStep(DecodeStep):
    """One whose graphs call the function again instead of replaying it."""

    def __init__(self, *parts: Any) -> None:
        graphs = CudaGraphs()
        graphs._capture = _Replayed.capture
        super().__init__(*parts[:-1], graphs)

    def forward(self, step: StepInput) -> torch.Tensor:
        return super().forward(step).clone()  # the next step overwrites it; a GPU copies it before


class _Replayed:
    def __init__(self, function: Callable[[], torch.Tensor], output: torch.Tensor) -> None:
        self._function, self._output = function, output

    @classmethod
    def capture(cls, function: Callable[[], torch.Tensor]) -> tuple[_Replayed, torch.Tensor]:
        output = torch.empty(1024, dtype=torch.int64)
        return cls(function, output), output

    def replay(self) -> None:
        tokens = self._function()
        self._output[: len(tokens)] = tokens


def speculate(directory: Path, draft: Path | None, tp: int, pp: int, requests: list[Request]) -> list[Completion]:
    """Complete the requests with a draft model, or by prompt lookup without one."""
    parallel = start(tp, pp)
    draft_model = None if draft is None else load_model(draft, None, parallel)
    model = load_model(directory, None, parallel)
    return Engine(model, parallel, draft_model=draft_model, prompt_lookup=draft is None).complete(requests)


def suppressing(directory: Path, tp: int, suppress_tokens: set[int], requests: list[Request]) -> list[Completion]:
    """Continuations by an engine that suppresses tokens."""
    parallel = start(tp, 1)
    return Engine(load_model(directory, None, parallel), parallel, suppress_tokens=sorted(suppress_tokens)).complete(
        requests
    )


def cached_logits(
    directory: Path, tp: int, pp: int, tokens: list[int], prefill: int, quantization: str | None = None
) -> torch.Tensor | None:
    """Logits after the first `prefill` tokens and after each later one, through the KV cache: [n, vocabulary]."""
    parallel = start(tp, pp)
    model = load_model(directory, None, parallel, quantization=quantization)
    runner = ModelRunner(model, parallel, NO_IDS)
    blocks = KVCacheBlocks(BLOCK_SIZE, round_up(len(tokens), BLOCK_SIZE))
    runner.allocate(blocks.start + blocks.size)
    parts = [ScheduledSequence(blocks, 0, tuple(tokens[:prefill]), 1)]
    parts += [ScheduledSequence(blocks, n, (tokens[n],), 1) for n in range(prefill, len(tokens))]
    outputs = [runner.forward(StepInput((part,))).rows for part in parts]
    return torch.cat(outputs) if parallel.is_leader else None


def full_logits(directory: Path, tp: int, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a plain forward pass, gathered: [b, s, vocabulary] on every rank."""
    model = load_model(directory, None, start(tp, 1))
    with torch.no_grad():
        return model(tokens, attention_mask=mask)


def sampled_tokens(directory: Path, tp: int, pp: int) -> list[tuple[int, ...]]:
    """Three sampled continuations with one seed."""
    params = SamplingParams(max_new_tokens=40, temperature=0.9, top_p=0.95, seed=7, ignore_eos=True)
    requests = [Request((2, 9, 30, *range(40, 40 + n)), params) for n in (1, 5, 9)]
    return [completion.tokens for completion in generate(directory, tp, pp, requests)]


def bytes_read_by_rank(directory: Path, tp: int, pp: int) -> int:
    """Bytes that this rank's load read from the checkpoint."""
    from opt_megatron.checkpoint.formats.registry import open_checkpoint
    from opt_megatron.checkpoint.load import load_weights
    from opt_megatron.model.opt_model import build_model

    parallel = start(tp, pp)
    checkpoint = open_checkpoint(directory)
    load_weights(build_model(checkpoint.config, parallel, torch.float32), checkpoint, parallel)
    return checkpoint.bytes_read


def error_of_rank(failing_rank: int) -> str:
    """The message that every rank gets when one of them finds a user's mistake."""
    parallel = start(1, 1)

    def action() -> None:
        if parallel.rank == failing_rank:
            raise UserError("no such thing")

    try:
        on_all_ranks(parallel, action)
    except UserError as error:
        return str(error)
    return "nothing was raised"


def start_with_own_arguments(arguments: list[dict[str, Any]]) -> str:
    """The message of `init_parallel` where each rank has its own arguments."""
    try:
        init_parallel(**arguments[torch.distributed.get_rank()])
    except UserError as error:
        return str(error)
    return "nothing was raised"


def gpus_checked(uuids: list[str]) -> str:
    """The message of the check of GPUs, where each rank has a GPU of its own identity."""
    own = mock.Mock(uuid=uuids[start(1, 1).rank])
    try:
        with mock.patch.object(torch.cuda, "get_device_properties", return_value=own):
            _check_gpus(torch.device("cuda", 0))
    except UserError as error:
        return str(error)
    return ""


def open_own_checkpoint(directories: list[Path], options: list[dict[str, Any]]) -> str:
    """The message of `OPT.open` where each rank opens its own directory with its own options; empty if they agree."""
    parallel = start(2, 1)
    try:
        OPT.open(str(directories[parallel.rank]), parallel, **options[parallel.rank])
    except UserError as error:
        return str(error)
    return ""


def random_draws(tp: int, pp: int) -> tuple[float, float, float]:
    """One number from torch's generator, and two from Megatron's tensor parallel state, forked twice."""
    start(tp, pp)
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        first = torch.rand(()).item()
    with get_cuda_rng_tracker().fork():
        second = torch.rand(()).item()
    assert torch.equal(torch.get_rng_state(), before)
    return torch.rand(()).item(), first, second


def leader_error_of_bad_request(directory: Path, tp: int) -> str:
    """A request that cannot run raises on the leader and ends the others; then a good one still runs."""
    parallel = start(tp, 1)
    engine = Engine(load_model(directory, None, parallel), parallel)
    message = ""
    try:
        list(engine.generate([Request(tuple(range(3, 300)))]))
    except UserError as error:
        message = str(error)
    refused = ""
    try:
        engine.complete([Request(tuple(range(3, 300)))])
    except UserError as error:
        refused = str(error)
    assert "has 297 tokens" in refused  # on every rank
    good = engine.complete([Request((2, 5), SamplingParams(max_new_tokens=3, temperature=0))])
    assert len(good[0].tokens) == 3
    return message


def abandoned_stream(directory: Path, tp: int) -> list[int]:
    """The caller stops listening after two events; the ranks stay together and can generate again."""
    parallel = start(tp, 1)
    engine = Engine(load_model(directory, None, parallel), parallel)
    request = Request((2, 5), SamplingParams(max_new_tokens=30, temperature=0, ignore_eos=True))
    events = engine.generate([request])
    first = []
    for event in events:
        first.append(event.token)
        if len(first) == 2:
            break
    events.close()
    again = engine.complete([request])[0].tokens
    assert not first or list(again[:2]) == first
    return first


def served_from_a_queue(directory: Path, tp: int) -> dict[int, str]:
    """How four requests end that another thread puts, cancels or gets wrong; the leader is idle in between."""
    engine_module._KEEP_ALIVE_SECONDS = 0.01
    parallel = start(tp, 1)
    engine = Engine(load_model(directory, None, parallel), parallel)
    queue = RequestQueue()
    params = SamplingParams(max_new_tokens=200, temperature=0, ignore_eos=True)
    began, ended = threading.Event(), threading.Event()

    def put() -> None:
        queue.put(Request((2, 5), params))
        assert ended.wait(60)
        began.clear()
        time.sleep(0.05)
        queue.put(Request((2, 6), params))
        assert began.wait(60)
        queue.cancel(1)
        queue.put(Request((2,) * 300, params))
        queue.put(Request((2, 7), params))
        queue.close()

    thread = threading.Thread(target=put)
    if parallel.is_leader:
        thread.start()
    ends = {}
    for event in engine.generate(queue):
        began.set()
        if event.finish_reason:
            ends[event.request] = event.finish_reason
            ended.set()
    if parallel.is_leader:
        thread.join()
    return ends


def commands_executed(tp: int, commands: list[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
    """What a rank executes of the commands that the leader sends, which fails at the end and leads once more."""
    parallel = start(tp, 1)
    executed: list[tuple[int, list[int]]] = []
    loop = CommandLoop(parallel, lambda *command: executed.append(command))
    if parallel.is_leader:
        with suppress(ZeroDivisionError), loop.leading():
            for command, numbers in commands:
                loop.send(command, numbers)
                loop.keep_alive()
            raise ZeroDivisionError
        with loop.leading():
            loop.send(0)
        return executed
    loop.follow()
    loop.follow()
    return executed


def shared_memory_and_distributed(tp: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Sum and gather of a tensor through shared memory, which are compared with torch.distributed's; the sum."""
    from megatron.core import parallel_state

    rank = start(tp, 1).rank
    group = parallel_state.get_tensor_model_parallel_group()
    shared, distributed = SharedMemoryCollectives(group), DistributedCollectives(group)
    mine = (torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 100).to(dtype)
    kept = mine.clone()
    parts = distributed.all_gather(mine.double()).to(dtype)
    gathered, total = shared.all_gather(mine), shared.all_reduce(mine)
    assert torch.equal(gathered, parts) and gathered.dtype is total.dtype is dtype
    assert torch.equal(total, sum(parts.chunk(tp, dim=-1)))  # in the order of ranks, in the tensor's own dtype
    exact = distributed.all_reduce(mine.double().clone())
    assert torch.allclose(total.double(), exact, rtol=0, atol=float(exact.abs().max()) * torch.finfo(dtype).eps * tp)
    assert torch.equal(mine, kept)
    columns = mine.t() if mine.dim() == 2 else mine[..., ::2]  # not contiguous
    assert torch.equal(shared.all_gather(columns), distributed.all_gather(columns.double()).to(dtype))
    shared.all_reduce(mine[:0])
    assert torch.equal(total, sum(parts.chunk(tp, dim=-1)))  # a result stays good in later rounds
    return total


def many_rounds(tp: int, rounds: int) -> None:
    """Small and large tensors in turn, with ranks that are late now and then."""
    from megatron.core import parallel_state

    rank = start(tp, 1).rank
    shared = SharedMemoryCollectives(parallel_state.get_tensor_model_parallel_group())
    for number in range(rounds):
        if number % 97 == rank:
            time.sleep(0.002)
        size = 1 + number * 37 % 5000
        total = shared.all_reduce(torch.full((size,), float(number + rank)))
        assert torch.equal(total, torch.full((size,), float(tp * number + tp * (tp - 1) // 2)))
        assert shared.all_gather(torch.tensor([number + rank])).tolist() == [number + r for r in range(tp)]


def kinds_of_collectives(tp: int, pp: int) -> tuple[str, bool]:
    """Which class is chosen, and whether it is made once."""
    parallel = start(tp, pp)
    first = tensor_parallel_collectives(parallel)
    return type(first).__name__, tensor_parallel_collectives(parallel) is first


def with_a_peer_that_ends(rank: int, store: str, pipe: Any) -> None:
    """A separate process, one of two ranks: rank 1 ends after the first round, and 0 reports what it sees then."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shared = SharedMemoryCollectives(dist.group.WORLD)
    total = shared.all_reduce(torch.ones(3))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        shared.all_reduce(torch.ones(3))
    except RuntimeError as error:
        pipe.send((total.tolist(), str(error)))
    os._exit(0)


def context_facts(tp: int, pp: int) -> tuple[int, int, bool, bool, int]:
    """Tensor rank, stage, is it the first, the last, and who sends the logits."""
    context = start(tp, pp)
    return (
        context.tensor_model_parallel_rank,
        context.pipeline_model_parallel_rank,
        context.is_first_stage,
        context.is_last_stage,
        context.logits_rank,
    )


def bytes_held_and_read(directory: Path, tp: int, pp: int, batch: int, context: int) -> tuple[int, int, int]:
    """Bytes of this rank's parameters and KV cache, and bytes that loading read."""
    from opt_megatron.checkpoint.formats.registry import open_checkpoint

    parallel = start(tp, pp)
    checkpoint = open_checkpoint(directory)
    model = load_model(checkpoint, None, parallel)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    runner = ModelRunner(model, parallel, NO_IDS)
    runner.allocate(batch * context)
    return weights, runner._cache._blocks._numbers.nbytes, checkpoint.bytes_read
