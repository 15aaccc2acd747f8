"""/metrics counts what happened."""

import threading

from running_server import running

PROMPT = "Once upon a time"


def test_metrics_count_what_happened(server):
    def read():
        return {
            name: server.metric(f"vllm:{name}")
            for name in ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count",
                         "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
                         "request_queue_time_seconds_count", "num_requests_running", "num_requests_waiting",
                         "request_prefill_time_seconds_count", "request_decode_time_seconds_count",
                         "request_inference_time_seconds_count", "request_prompt_tokens_sum",
                         "request_generation_tokens_sum", "request_params_n_sum", "request_params_max_tokens_sum",
                         "num_preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total",
                         "request_time_per_output_token_seconds_count", "request_max_num_generation_tokens_sum",
                         "request_prefill_kv_computed_tokens_sum", "prompt_tokens_cached_total")
        } | {
            "length": server.metric("vllm:request_success_total", finished_reason="length"),
            "computed": server.metric("vllm:prompt_tokens_by_source_total", source="local_compute"),
            "2xx": server.metric("http_requests_total", handler="/v1/completions", status="2xx"),
            "timed": server.metric("http_request_duration_seconds_count", handler="/v1/completions"),
        }  # fmt: skip

    server.complete(prompt=PROMPT, max_tokens=1)

    before = read()
    server.complete(prompt=PROMPT, n=2, max_tokens=7, ignore_eos=True)
    growth = {name: value - before[name] for name, value in read().items()}
    assert growth == {
        "prompt_tokens_total": 5, "generation_tokens_total": 14, "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 12, "e2e_request_latency_seconds_count": 1,
        "request_queue_time_seconds_count": 1, "num_requests_running": 0, "num_requests_waiting": 0, "length": 1,
        "request_prefill_time_seconds_count": 1, "request_decode_time_seconds_count": 1,
        "request_inference_time_seconds_count": 1, "request_prompt_tokens_sum": 5, "request_generation_tokens_sum": 14,
        "request_params_n_sum": 2, "request_params_max_tokens_sum": 7, "num_preemptions_total": 0,
        "prefix_cache_queries_total": 10, "prefix_cache_hits_total": 0,
        "request_time_per_output_token_seconds_count": 1, "request_max_num_generation_tokens_sum": 7,
        "request_prefill_kv_computed_tokens_sum": 5, "prompt_tokens_cached_total": 0, "computed": 5,
        "2xx": 1, "timed": 1,
    }  # fmt: skip
    assert 0 <= server.metric("vllm:kv_cache_usage_perc") <= 1
    assert server.metric("vllm:num_requests_waiting_by_reason", reason="deferred") == 0


def test_http_requests_are_counted_by_the_route_and_not_by_what_a_client_writes(server):
    for path in ("/v1/engines/a/completions", "/v1/engines/b/completions"):
        server.request("POST", path, {"prompt": PROMPT, "temperature": "hot"})
    for path in ("/no/1", "/no/2"):
        server.request("GET", path)
    assert server.metric("http_requests_total", handler="/v1/engines/{engine}/completions", status="4xx") >= 2
    assert server.metric("http_requests_total", handler="none", status="4xx") >= 2
    text = server.request("GET", "/metrics").body
    assert b"/no/" not in text and b'handler="/metrics"' not in text


def test_steps_and_prompts_that_are_found_in_the_cache_are_counted(alone):
    prompt, seen = [2, *range(300, 339)], []
    with running(alone) as server:
        server.wait_for(lambda: server.request("GET", "/health").status == 200)
        blocks = {"block_size": "64", "num_gpu_blocks": "128", "kv_cache_size_tokens": "8192"}
        blocks |= {"enable_prefix_caching": "True"}
        assert server.metric("vllm:cache_config_info", **blocks) == 1
        for _ in range(2):
            usage = server.complete(prompt=prompt, max_tokens=3, ignore_eos=True, n=2).json["usage"]
            seen.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert seen == [0, 39]  # the last token of a prompt is always computed
        server.wait_for(lambda: server.metric("vllm:iteration_tokens_total_sum") >= 40 + 3 + 4 * 2)
        assert server.metric("vllm:iteration_tokens_total_sum") == 40 + 3 + 4 * 2
        assert server.metric("vllm:prefix_cache_queries_total") == 4 * 40
        assert server.metric("vllm:prefix_cache_hits_total") == 3 * 39
        assert server.metric("vllm:prompt_tokens_cached_total") == 39  # of the prompts, not of the continuations
        assert server.metric("vllm:prompt_tokens_by_source_total", source="local_compute") == 40 + 1


def test_what_waits_for_a_place_is_counted_apart_from_what_computes(alone):
    with running(alone, max_batch_size=1) as server:
        server.wait_for(lambda: server.request("GET", "/health").status == 200)
        server.complete(prompt=PROMPT, max_tokens=400, ignore_eos=True)
        waited = server.metric("vllm:request_queue_time_seconds_sum")
        assert waited < server.metric("vllm:time_to_first_token_seconds_sum")
        server.brake.on()
        asking = [threading.Thread(target=server.complete, kwargs={"prompt": PROMPT}) for _ in range(2)]
        for thread in asking:
            thread.start()
        server.wait_for(lambda: len(server.async_engine._requests) == 2)
        server.brake.off()
        for thread in asking:
            thread.join()
        # The second begins when the first has ended.
        assert server.metric("vllm:request_queue_time_seconds_sum") > waited
        assert server.metric("vllm:request_queue_time_seconds_count") == 3
