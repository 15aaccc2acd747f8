"""Prometheus metrics under vLLM's names, so that dashboards and alerts made for vLLM work here too.

Names, labels and buckets are those of vLLM's documentation, "Production metrics".
"""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..generation.core.scheduler import SchedulerCounters

CONTENT_TYPE = CONTENT_TYPE_LATEST
FINISH_REASONS = ("stop", "length", "abort", "error")

# Histogram buckets of numbers, and in seconds.
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_CONTINUATIONS = (1, 2, 5, 10, 20)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20)
_REQUEST = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """The metrics of one server, in a registry that no other server shares.

    Args:
        model_name: value of the label `model_name` of every metric.
    """

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self.running = self._gauge("num_requests_running", "Prompts that have rows in the batch")
        self.waiting = self._gauge("num_requests_waiting", "Prompts that wait for a place in the batch")
        self.kv_cache_usage = self._gauge("kv_cache_usage_perc", "Part of the KV cache in use; 1 is all of it")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self._success = Counter(
            "vllm:request_success", "Prompts that ended", ("model_name", "finished_reason"), registry=self._registry
        )
        for reason in FINISH_REASONS:  # a label that exists from the start reads 0 instead of being absent
            self._success.labels(model_name, reason)
        self.queue_time = self._histogram("request_queue_time_seconds", "Until a place in the batch", _REQUEST)
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Until the first new token", _FIRST_TOKEN
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "From a token to the next", _INTER_TOKEN
        )
        self.e2e_request_latency = self._histogram("e2e_request_latency_seconds", "Until the last token", _REQUEST)
        self.prefill_time = self._histogram("request_prefill_time_seconds", "From a place to the first token", _REQUEST)
        self.decode_time = self._histogram("request_decode_time_seconds", "From the first token to the last", _REQUEST)
        self.inference_time = self._histogram("request_inference_time_seconds", "From a place to the end", _REQUEST)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of each prompt", _TOKENS)
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated for each prompt", _TOKENS
        )
        self.params_n = self._histogram("request_params_n", "n of each prompt", _CONTINUATIONS)
        self.params_max_tokens = self._histogram("request_params_max_tokens", "max_tokens of each prompt", _TOKENS)
        self._iteration_tokens = self._histogram("iteration_tokens_total", "Tokens that a step computes", _STEP_TOKENS)
        self._counters = SchedulerCounters()
        self._of_scheduler = {
            "prefix_queries": self._counter("prefix_cache_queries", "Tokens of prompts looked up in the KV cache"),
            "prefix_hits": self._counter("prefix_cache_hits", "Tokens of prompts copied within the KV cache"),
            "preemptions": self._counter("num_preemptions", "Sequences that gave their place to another client's"),
        }

    def set_cache_config(self, block_size: int, num_blocks: int) -> None:
        """Show the size of the KV cache, in blocks of `block_size` tokens."""
        values = {
            "model_name": self._model_name,
            "block_size": str(block_size),
            "num_gpu_blocks": str(num_blocks),  # vLLM's name, whatever the device
            "enable_prefix_caching": "True",
        }
        gauge = Gauge("vllm:cache_config_info", "Size of the KV cache; 1", tuple(values), registry=self._registry)
        gauge.labels(**values).set(1)

    def count_steps(self, counters: SchedulerCounters) -> None:
        """Count what the scheduler has done since the last call."""
        if counters.tokens > self._counters.tokens:
            self._iteration_tokens.observe(counters.tokens - self._counters.tokens)
        for name, metric in self._of_scheduler.items():
            metric.inc(getattr(counters, name) - getattr(self._counters, name))
        self._counters = counters

    def count_finished(self, reason: str) -> None:
        """Count a finished prompt; `reason` is one of `FINISH_REASONS`."""
        self._success.labels(self._model_name, reason).inc()

    def to_text(self) -> bytes:
        """All metrics in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, ("model_name",), registry=self._registry).labels(self._model_name)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, ("model_name",), registry=self._registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"vllm:{name}", text, ("model_name",), registry=self._registry, buckets=buckets)
        return made.labels(self._model_name)
