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
                         "num_preemptions_total", "prefix_cache_queries_total", "prefix_cache_hits_total")
        } | {"length": server.metric("vllm:request_success_total", finished_reason="length")}  # fmt: skip

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
    }  # fmt: skip
    assert 0 <= server.metric("vllm:kv_cache_usage_perc") <= 1


def test_steps_and_prompts_that_are_found_in_the_cache_are_counted(alone):
    prompt, seen = [2, *range(300, 339)], []
    with running(alone) as server:
        server.wait_for(lambda: server.request("GET", "/health").status == 200)
        blocks = {"block_size": "64", "num_gpu_blocks": "128", "enable_prefix_caching": "True"}
        assert server.metric("vllm:cache_config_info", **blocks) == 1
        for _ in range(2):
            usage = server.complete(prompt=prompt, max_tokens=3, ignore_eos=True, n=2).json["usage"]
            seen.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert seen == [0, 39]  # the last token of a prompt is always computed
        server.wait_for(lambda: server.metric("vllm:iteration_tokens_total_sum") >= 40 + 3 + 4 * 2)
        assert server.metric("vllm:iteration_tokens_total_sum") == 40 + 3 + 4 * 2
        assert server.metric("vllm:prefix_cache_queries_total") == 4 * 40
        assert server.metric("vllm:prefix_cache_hits_total") == 3 * 39


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
