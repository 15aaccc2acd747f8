"""transformers as a measured system."""

from __future__ import annotations

import time
from typing import Any

from ..static_batching import Mark, ServingResult, StepClock, Tokens, serve_in_batches
from ..system_protocol import GenerateResult, Setup
from ..weights import huggingface_directory
from ..workload import PromptTokens, WorkloadRequest

_PADDING = 1


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

    def generate(self, prompts: list[PromptTokens], new_tokens: int) -> GenerateResult:
        """See `System.generate`: one static batch."""
        clock = StepClock()
        tokens = self._generate(prompts, new_tokens, _Streamer(clock.tick))
        return GenerateResult(time.perf_counter() - clock.start, clock.times, tokens)

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

    def _generate(self, prompts: list[PromptTokens], new_tokens: int, streamer: _Streamer) -> list[Tokens]:
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
