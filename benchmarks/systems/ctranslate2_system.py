"""CTranslate2 as a measured system."""

from __future__ import annotations

import time
from typing import Any

from opt_megatron.config import OPTConfig

from ..measure import cache_bytes
from ..static_batching import Mark, ServingResult, StepClock, Tokens, serve_in_batches
from ..system_protocol import GenerateResult, Setup
from ..weights import ctranslate2_directory, huggingface_directory
from ..workload import PromptTokens, WorkloadRequest


class CTranslate2:
    """CTranslate2's `Generator`.

    One call of `generate_batch` has one `max_length`, but its callback may end single rows, which leave the
    batch; so each request gets exactly its own number of tokens. Of unequal prompts it forwards at once only
    as many tokens as the shortest has, and the rest one by one: requests are therefore batched by length.
    """

    @staticmethod
    def prepare(setup: Setup) -> None:
        """Import the library, so that it does not count as the model's memory."""
        import ctranslate2  # noqa: F401

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._workers = 0
        self._serving = (1, 16)  # workers, rows of a batch
        self._use(1)

    def generate(self, prompts: list[PromptTokens], new_tokens: int) -> GenerateResult:
        """See `System.generate`: one static batch."""
        self._use(1)
        rows = [_strings(prompt) for prompt in prompts]
        clock = StepClock()

        def on_token(result: Any) -> bool:
            clock.tick(result.step)
            return False

        tokens = self._generate(rows, new_tokens, on_token)
        return GenerateResult(time.perf_counter() - clock.start, clock.times, tokens)

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


def _strings(prompt: PromptTokens) -> list[str]:
    # The conversion's vocabulary calls token 17 "17" (weights.py).
    return [str(token) for token in prompt]
