"""The load test's client and its figures."""

import argparse
import asyncio

from benchmarks.load_client import LoadClient, LoadRequest, LoadResult, keep_streams
from benchmarks.load_test import _compared, percentiles, summary, table


def test_streams_are_kept_open_and_answers_are_the_offline_engines(server):
    client = LoadClient(f"http://127.0.0.1:{server.port}", {"max_tokens": 8, "temperature": 0.8})
    asked = [LoadRequest("Once upon a time", seed) for seed in range(12)]
    done = asyncio.Queue()
    results = asyncio.run(keep_streams(client, asked, 4, 60, done))
    assert sorted(one.request.seed for one in results) == list(range(12)) and done.qsize() == 12
    report = summary(results, 1.0, [(0, 100.0), (6, 110.0), (12, 111.0)])
    assert report["statuses"] == {"200": 12} and report["errors"] == {}
    assert report["memory"] == {"first": 100.0, "settled": 110.0, "last": 111.0, "most": 111.0}
    args = argparse.Namespace(load="story", check=5, max_tokens=8, temperature=0.8)
    report["offline"] = _compared(results, args)
    assert report["offline"] == {"compared": 5, "equal": 5}
    assert "equal to the offline engine: 5 of 5" in table(report)


def test_what_goes_wrong_is_counted(server):
    asked = LoadRequest("word " * 600, 1)
    refused = asyncio.run(LoadClient(f"http://127.0.0.1:{server.port}", {}).stream(asked))
    nobody = asyncio.run(LoadClient("http://127.0.0.1:1", {}).stream(asked))
    assert refused.status == 400 and "positions" in refused.error and nobody.status == 0
    report = summary([refused, nobody, LoadResult(asked, 200, "x", [0.1, 0.3])], 2.0, [])
    assert report["statuses"] == {"400": 1, "0": 1, "200": 1} and len(report["errors"]) == 2
    assert report["tokens_per_second"] == 1 and report["inter_token_latency"]["p99"] == 0.3 - 0.1


def test_percentiles_are_values_that_were_there():
    assert percentiles([3, 1, 2, 4]) == {"p50": 2, "p90": 4, "p99": 4}
    assert percentiles([]) == {}
