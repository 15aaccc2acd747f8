"""Prometheus metrics under vLLM's names, so that dashboards and alerts made for vLLM work here too.

Names, labels and buckets are those of vLLM's documentation, "Production metrics".
"""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
FINISH_REASONS = ("stop", "length", "abort", "error")

# Histogram buckets in seconds.
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
