"""This project as a measured system."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from ..measure import float_dtype
from ..static_batching import ServingResult, StepClock, Tokens
from ..system_protocol import GenerateResult, Setup
from ..weights import huggingface_directory
from ..workload import PromptTokens, WorkloadRequest

if TYPE_CHECKING:
    from opt_megatron.generation.request import Request, TokenEvent


class OptMegatron:
    """This project, through its public interface."""

    BATCH = 64

    @staticmethod
    def prepare(setup: Setup) -> None:
        """torch, Megatron-core and the process group (over a file where there are several ranks)."""
        import torch
        import torch.distributed as dist

        from opt_megatron.parallel import context as parallel

        torch.set_num_threads(setup.threads)
        if setup.ranks > 1:
            backend, method = "nccl" if setup.device == "cuda" else "gloo", f"file://{setup.store}"
            dist.init_process_group(backend, init_method=method, rank=setup.rank, world_size=setup.ranks)
        parallel.init_parallel(setup.ranks, 1, seed=1234, device=setup.device)

    def __init__(self, setup: Setup) -> None:
        from opt_megatron.checkpoint.load import load_model
        from opt_megatron.generation.core.engine import Engine
        from opt_megatron.parallel.context import init_parallel

        parallel = init_parallel(setup.ranks, 1, seed=1234, device=setup.device)
        dtype, quantization = (float_dtype(setup.dtype, setup.device), "int8" if setup.dtype == "int8" else None)
        model = load_model(huggingface_directory(setup.model), None, parallel, dtype, quantization=quantization)
        self._engine = Engine(model, parallel, max_batch_size=self.BATCH, kv_cache_memory=setup.cache_limit)

    def generate(self, prompts: list[PromptTokens], new_tokens: int) -> GenerateResult:
        """`System.generate`; the ranks after the first get a run without tokens."""
        requests = [_request(WorkloadRequest(prompt, new_tokens)) for prompt in prompts]
        tokens: list[Tokens] = [[] for _ in prompts]
        clock = StepClock()
        for event in self._engine.generate(requests):
            clock.tick(len(tokens[event.request]))
            tokens[event.request].append(_token(event))
        return GenerateResult(time.perf_counter() - clock.start, clock.times, tokens)

    def tune(self, requests: list[WorkloadRequest]) -> dict[str, float]:
        """{}: requests join the running batch when they arrive."""
        return {}

    def serve(self, requests: list[WorkloadRequest], arrivals: list[float]) -> ServingResult:
        """`System.serve`: a list if all arrive at the start, else the engine's queue, filled by a second thread."""
        made = [_request(request) for request in requests]
        served = ServingResult([0.0] * len(made), [[] for _ in made])
        start = time.perf_counter()
        source = _queue(made, arrivals, start) if any(arrivals) else made
        for event in self._engine.generate(source):
            served.tokens[event.request].append(_token(event))
            if event.finish_reason:
                served.finished[event.request] = time.perf_counter() - start
        return served


def _token(event: TokenEvent) -> int:
    assert event.token is not None, "the benchmark cancels no request"
    return event.token


def _request(request: WorkloadRequest) -> Request:
    from opt_megatron.generation.request import Request
    from opt_megatron.generation.sampling.sampling_params import SamplingParams

    params = SamplingParams(max_new_tokens=request.new_tokens, temperature=0, ignore_eos=True)
    return Request(prompt=request.prompt, params=params)


def _queue(requests: list[Request], arrivals: list[float], start: float) -> Any:
    """A queue into which a thread puts the requests at their times, in order: request n has index n."""
    from opt_megatron.generation.core.request_queue import RequestQueue

    queue = RequestQueue()

    def fill() -> None:
        for request, arrival in zip(requests, arrivals, strict=True):
            time.sleep(max(0.0, arrival - (time.perf_counter() - start)))
            queue.put(request)
        queue.close()

    threading.Thread(target=fill, daemon=True).start()
    return queue
