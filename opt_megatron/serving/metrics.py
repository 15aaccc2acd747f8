"""Prometheus metrics under vLLM's names, so that dashboards and alerts made for vLLM work here too.

Names, labels and buckets are those of vLLM's documentation, "Production metrics", and of the metrics of FastAPI servers
that its dashboards read as well (prometheus-fastapi-instrumentator).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TypeVar

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from ..generation.core.scheduler import SchedulerCounters

CONTENT_TYPE = CONTENT_TYPE_LATEST
AnyMetric = TypeVar("AnyMetric", Counter, Gauge, Histogram)
FINISH_REASONS = ("stop", "length", "abort", "error")
_WAITING_REASONS = ("capacity", "deferred")  # nothing is deferred here
_PROMPT_SOURCES = ("local_compute", "local_cache_hit")

# Histogram buckets of numbers, and in seconds.
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_CONTINUATIONS = (1, 2, 5, 10, 20)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20)
_HTTP_REQUEST = (0.1, 0.5, 1)
_REQUEST = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """The metrics of one server, in a registry that no other server shares.

    Args:
        model_name: value of the label `model_name` of every metric.
    """

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        # Dashboards select and group by the number of the engine, of which there is one.
        self._labels = {"model_name": model_name, "engine": "0"}
        ProcessCollector(registry=self._registry)  # process_cpu_seconds_total, process_resident_memory_bytes ...
        self._running = self._gauge("num_requests_running", "Prompts that have rows in the batch")
        self._waiting = self._gauge("num_requests_waiting", "Prompts that wait for a place in the batch")
        self._waiting_by_reason = self._family(
            Gauge, "num_requests_waiting_by_reason", "Prompts that wait, by the reason", "reason", _WAITING_REASONS
        )
        self.kv_cache_usage = self._gauge("kv_cache_usage_perc", "Part of the KV cache in use; 1 is all of it")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self._prompt_tokens_by_source = self._family(
            Counter,
            "prompt_tokens_by_source",
            "Tokens of prompts that were computed, or copied",
            "source",
            _PROMPT_SOURCES,
        )
        self._prompt_tokens_cached = self._counter("prompt_tokens_cached", "Tokens of prompts that were copied")
        self._success = self._family(
            Counter, "request_success", "Prompts that ended", "finished_reason", FINISH_REASONS
        )
        self.queue_time = self._histogram("request_queue_time_seconds", "Until a place in the batch", _REQUEST)
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Until the first new token", _FIRST_TOKEN
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "From a token to the next", _INTER_TOKEN
        )
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time from a token to the next of each prompt", _INTER_TOKEN
        )
        self.e2e_request_latency = self._histogram("e2e_request_latency_seconds", "Until the last token", _REQUEST)
        self.prefill_time = self._histogram("request_prefill_time_seconds", "From a place to the first token", _REQUEST)
        self.decode_time = self._histogram("request_decode_time_seconds", "From the first token to the last", _REQUEST)
        self.inference_time = self._histogram("request_inference_time_seconds", "From a place to the end", _REQUEST)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of each prompt", _TOKENS)
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated for each prompt", _TOKENS
        )
        self.max_generation_tokens = self._histogram(
            "request_max_num_generation_tokens", "Tokens of the longest continuation of each prompt", _TOKENS
        )
        self._prefill_computed = self._histogram(
            "request_prefill_kv_computed_tokens", "Tokens of each prompt that were computed", _TOKENS
        )
        self.params_n = self._histogram("request_params_n", "n of each prompt", _CONTINUATIONS)
        self.params_max_tokens = self._histogram("request_params_max_tokens", "max_tokens of each prompt", _TOKENS)
        self._iteration_tokens = self._histogram("iteration_tokens_total", "Tokens that a step computes", _STEP_TOKENS)
        self._counters = SchedulerCounters()
        self._of_scheduler = {
            "prefix_queries": self._counter("prefix_cache_queries", "Tokens of prompts looked up in the KV cache"),
            "prefix_hits": self._counter("prefix_cache_hits", "Tokens of prompts copied within the KV cache"),
            "preemptions": self._counter("num_preemptions", "Sequences that gave their place to another client's"),
            "drafts": self._counter("spec_decode_num_drafts", "Steps of sequences with tokens proposed by a draft"),
            "draft_tokens": self._counter("spec_decode_num_draft_tokens", "Tokens proposed"),
            "accepted_tokens": self._counter("spec_decode_num_accepted_tokens", "Proposed tokens that were accepted"),
        }
        self._http_requests = Counter(
            "http_requests", "HTTP requests that were answered", ("handler", "status"), registry=self._registry
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "Until a response ended",
            ("handler",),
            registry=self._registry,
            buckets=_HTTP_REQUEST,
        )

    def set_cache_config(self, block_size: int, num_blocks: int) -> None:
        """Show the size of the KV cache, in blocks of `block_size` tokens."""
        values = {
            **self._labels,
            "block_size": str(block_size),
            "num_gpu_blocks": str(num_blocks),  # vLLM's name, whatever the device
            "kv_cache_size_tokens": str(num_blocks * block_size),
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

    def set_requests(self, running: int, waiting: int) -> None:
        """Show how many prompts are running and waiting."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._waiting_by_reason.labels(**self._labels, reason="capacity").set(waiting)

    def count_prefill(self, num_tokens: int, num_cached: int) -> None:
        """Count a prompt of `num_tokens` that is in the KV cache now, `num_cached` of them copied."""
        for source, count in zip(_PROMPT_SOURCES, (num_tokens - num_cached, num_cached), strict=True):
            self._prompt_tokens_by_source.labels(**self._labels, source=source).inc(count)
        self._prompt_tokens_cached.inc(num_cached)
        self._prefill_computed.observe(num_tokens - num_cached)

    def count_http_request(self, handler: str, status: int, seconds: float) -> None:
        """Count an answered HTTP request; `handler` is the route's path."""
        self._http_requests.labels(handler, f"{status // 100}xx").inc()
        self._http_seconds.labels(handler).observe(seconds)

    def count_finished(self, reason: str) -> None:
        """Count a finished prompt; `reason` is one of `FINISH_REASONS`."""
        self._success.labels(**self._labels, finished_reason=reason).inc()

    def to_text(self) -> bytes:
        """All metrics in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return self._register(Gauge, name, text).labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return self._register(Counter, name, text).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return self._register(partial(Histogram, buckets=buckets), name, text).labels(**self._labels)

    def _family(
        self, kind: Callable[..., AnyMetric], name: str, text: str, label: str, values: Collection[str]
    ) -> AnyMetric:
        """A metric with one more label. Its values exist from the start: they read 0 instead of being absent."""
        made = self._register(kind, name, text, label)
        for value in values:
            made.labels(**self._labels, **{label: value})
        return made

    def _register(self, kind: Callable[..., AnyMetric], name: str, text: str, *labels: str) -> AnyMetric:
        return kind(f"vllm:{name}", text, (*self._labels, *labels), registry=self._registry)
