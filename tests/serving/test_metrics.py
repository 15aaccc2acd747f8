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
                         "request_queue_time_seconds_count", "num_requests_running", "num_requests_waiting")
        } | {"length": server.metric("vllm:request_success_total", finished_reason="length")}  # fmt: skip

    before = read()
    server.complete(prompt=PROMPT, n=2, max_tokens=7, ignore_eos=True)
    growth = {name: value - before[name] for name, value in read().items()}
    assert growth == {
        "prompt_tokens_total": 5, "generation_tokens_total": 14, "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 12, "e2e_request_latency_seconds_count": 1,
        "request_queue_time_seconds_count": 1, "num_requests_running": 0, "num_requests_waiting": 0, "length": 1,
    }  # fmt: skip
    assert 0 <= server.metric("vllm:kv_cache_usage_perc") <= 1


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
