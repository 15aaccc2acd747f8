"""The systems that are measured: one class each, all with `System`'s methods, created in child processes.

Each runs as its own documentation recommends, on the same number of threads, greedily, and past every end
of sequence, so that all generate exactly the requested number of tokens.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from opt_megatron.config import OPTConfig

from .measure import cache_bytes
from .static_batching import Mark, ServingResult, StepClock, Tokens, serve_in_batches
from .system_protocol import Run, Setup, System
from .weights import ctranslate2_directory, huggingface_directory
from .workload import Prompt, WorkloadRequest

if TYPE_CHECKING:
    from opt_megatron.generation.request import Request, TokenEvent

_PADDING = 1


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
            method = f"file://{setup.store}"
            dist.init_process_group("gloo", init_method=method, rank=setup.rank, world_size=setup.ranks)
        parallel.init_parallel(setup.ranks, 1, seed=1234, device=setup.device)

    def __init__(self, setup: Setup) -> None:
        from opt_megatron.checkpoint.load import load_model
        from opt_megatron.generation.core.engine import Engine
        from opt_megatron.parallel.context import init_parallel

        parallel = init_parallel(setup.ranks, 1, seed=1234, device=setup.device)
        dtype, quantization = ("float32", "int8") if setup.dtype == "int8" else (setup.dtype, None)
        model = load_model(huggingface_directory(setup.model), None, parallel, dtype, quantization=quantization)
        self._engine = Engine(model, parallel, max_batch_size=self.BATCH, kv_cache_memory=setup.cache_limit)

    def generate(self, prompts: list[Prompt], new_tokens: int) -> Run:
        """`System.generate`; the ranks after the first get a run without tokens."""
        requests = [_request(WorkloadRequest(prompt, new_tokens)) for prompt in prompts]
        tokens: list[Tokens] = [[] for _ in prompts]
        clock = StepClock()
        for event in self._engine.generate(requests):
            clock.tick(len(tokens[event.request]))
            tokens[event.request].append(_token(event))
        return Run(time.perf_counter() - clock.start, clock.times, tokens)

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


class Transformers:
    """transformers' `generate`: static batches, the shorter prompts padded on the left."""

    BATCH = 16

    @staticmethod
    def prepare(setup: Setup) -> None:
        """torch and transformers' OPT."""
        import torch
        from transformers import OPTForCausalLM  # noqa: F401  (its modules are imported on first use)
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(setup.threads)

    def __init__(self, setup: Setup) -> None:
        import torch
        from transformers import OPTForCausalLM

        directory = huggingface_directory(setup.model)
        self._device = setup.device
        model = OPTForCausalLM.from_pretrained(directory, dtype=getattr(torch, setup.dtype))
        self._model: Any = model.eval().to(setup.device)  # transformers' types do not describe `generate` of a model
        # Without an end-of-sequence token nothing stops generation early.
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = _PADDING

    def generate(self, prompts: list[Prompt], new_tokens: int) -> Run:
        """`System.generate`"""
        clock = StepClock()
        tokens = self._generate(prompts, new_tokens, _Streamer(clock.tick))
        return Run(time.perf_counter() - clock.start, clock.times, tokens)

    def tune(self, requests: list[WorkloadRequest]) -> dict[str, float]:
        """{}: batches of 16 in the order of arrival."""
        return {}

    def serve(self, requests: list[WorkloadRequest], arrivals: list[float]) -> ServingResult:
        """`System.serve`: batches of 16 in the order of arrival, each run to its longest output.

        A request counts as done at the step of its last token, though `generate` returns later.
        """

        def run(batch: list[WorkloadRequest], mark: Mark) -> list[Tokens]:
            def step(number: int) -> None:
                for row, request in enumerate(batch):
                    if request.new_tokens == number + 1:
                        mark(row)

            longest = max(request.new_tokens for request in batch)
            tokens = self._generate([request.prompt for request in batch], longest, _Streamer(step))
            return [row[: request.new_tokens] for row, request in zip(tokens, batch, strict=True)]

        return serve_in_batches(requests, arrivals, run, batch_size=self.BATCH)

    def _generate(self, prompts: list[Prompt], new_tokens: int, streamer: _Streamer) -> list[Tokens]:
        import torch

        width = max(map(len, prompts))
        rows = [[_PADDING] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        masks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        output = self._model.generate(
            torch.tensor(rows, device=self._device),  # [batch, width]
            attention_mask=torch.tensor(masks, device=self._device),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=streamer,
        )
        return output[:, width:].tolist()


class _Streamer:
    """transformers' streamer interface: `generate` calls `put` with the prompt, then with each step's tokens."""

    def __init__(self, on_step: Any) -> None:
        self._on_step = on_step
        self._calls = -1  # the prompt's

    def put(self, tokens: Any) -> None:
        """One step's tokens, [batch]."""
        if self._calls >= 0:
            self._on_step(self._calls)
        self._calls += 1

    def end(self) -> None:
        """Called at the end; there is nothing to flush."""


class CTranslate2:
    """CTranslate2's `Generator`.

    One call of `generate_batch` has one `max_length`, but its callback may end single rows, which leave the
    batch; so each request gets exactly its own number of tokens. Of unequal prompts it forwards at once only
    as many tokens as the shortest has, and the rest one by one: requests are therefore batched by length.
    """

    @staticmethod
    def prepare(setup: Setup) -> None:
        """The library."""
        import ctranslate2  # noqa: F401

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._workers = 0
        self._serving = (1, 16)  # workers, rows of a batch
        self._use(1)

    def generate(self, prompts: list[Prompt], new_tokens: int) -> Run:
        """`System.generate`"""
        self._use(1)
        rows = [_strings(prompt) for prompt in prompts]
        clock = StepClock()

        def on_token(result: Any) -> bool:
            clock.tick(result.step)
            return False

        tokens = self._generate(rows, new_tokens, on_token)
        return Run(time.perf_counter() - clock.start, clock.times, tokens)

    def tune(self, requests: list[WorkloadRequest]) -> dict[str, float]:
        """All requests at once, in batches of several sizes, one batch at a time on all threads (CTranslate2's
        `inter_threads=1`) or several that share them."""
        tried: dict[tuple[int, int], float] = {}
        most = self._most_rows(requests)
        for workers in (1, 2, 4):
            for rows in (8, 16, 32, 64):
                # Every worker needs a batch; and one batch of 8 at a time was never the fastest.
                if workers <= self._setup.threads and 8 < workers * rows <= most:
                    self._serving = (workers, rows)
                    tried[self._serving] = self.serve(requests, [0.0] * len(requests)).seconds
        self._serving = min(tried, key=tried.__getitem__) if tried else (1, max(1, min(16, most)))
        return {f"{workers} x {rows} rows at a time": seconds for (workers, rows), seconds in tried.items()}

    def serve(self, requests: list[WorkloadRequest], arrivals: list[float]) -> ServingResult:
        """`System.serve`: batches by length of prompt, with the parameters that `tune` found."""
        workers, rows = self._serving
        self._use(workers)
        strings = {id(request): _strings(request.prompt) for request in requests}

        def run(batch: list[WorkloadRequest], mark: Mark) -> list[Tokens]:
            made = [0] * len(batch)

            def on_token(result: Any) -> bool:
                row = result.batch_id
                made[row] += 1
                if made[row] < batch[row].new_tokens:
                    return False
                mark(row)
                return True

            # Steps are counted from the end of the shortest prompt.
            shortest = min(len(request.prompt) for request in batch)
            steps = max(len(request.prompt) - shortest + request.new_tokens for request in batch)
            return self._generate([strings[id(request)] for request in batch], steps, on_token)

        return serve_in_batches(
            requests, arrivals, run, batch_size=rows, workers=workers, rank=lambda request: -len(request.prompt)
        )

    def _most_rows(self, requests: list[WorkloadRequest]) -> int:
        """Requests that may run at the same time: all, or as many of the longest as the memory holds."""
        if self._setup.cache_limit is None:
            return len(requests)
        config = OPTConfig.from_directory(huggingface_directory(self._setup.model))
        longest = max(len(request.prompt) + request.new_tokens for request in requests)
        return min(len(requests), self._setup.cache_limit // cache_bytes(config, self._setup.dtype, longest))

    def _use(self, workers: int) -> None:
        """Load the model for this many batches at a time, all threads shared among them."""
        if workers == self._workers:
            return
        import ctranslate2

        self._generator: Any = None  # free the former one's memory before the new one is loaded
        self._generator = ctranslate2.Generator(
            str(ctranslate2_directory(self._setup.model, self._setup.dtype)),
            device=self._setup.device,
            compute_type=self._setup.dtype,
            inter_threads=workers,
            intra_threads=max(1, self._setup.threads // workers),
        )
        self._workers = workers

    def _generate(self, rows: list[list[str]], steps: int, on_token: Any) -> list[Tokens]:
        results = self._generator.generate_batch(
            rows,
            max_length=steps,
            include_prompt_in_result=False,
            beam_size=1,
            sampling_topk=1,
            end_token=[],
            callback=on_token,
        )
        return [result.sequences_ids[0] for result in results]


def _strings(prompt: Prompt) -> list[str]:
    # The conversion's vocabulary calls token 17 "17" (weights.py).
    return [str(token) for token in prompt]


OURS = "opt_megatron"
SYSTEMS: dict[str, type[System]] = {OURS: OptMegatron, "transformers": Transformers, "ctranslate2": CTranslate2}
# transformers has no int8 of its own on a CPU; CTranslate2's CUDA build is another package.
DTYPES: dict[str, dict[str, tuple[str, ...]]] = {  # device -> dtype -> systems
    "cpu": {"float32": tuple(SYSTEMS), "int8": (OURS, "ctranslate2")},
    "cuda": dict.fromkeys(("float32", "bfloat16", "float16"), (OURS, "transformers")),
}
