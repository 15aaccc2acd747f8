"""A server of several ranks: signals, and a rank that dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from running_server import SECONDS, TOKENIZER, in_thread

TOOL = Path(__file__).parents[2] / "tools" / "serve.py"
LONG = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


@contextmanager
def ranks_of_a_server(tp: int, pp: int, *arguments: str):
    """Processes of one server, and its URL once it serves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = str(probe.getsockname()[1])
    sizes = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    processes = []
    for rank in range(tp * pp):
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(tp * pp)}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": rendezvous, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(TOOL), "--port", "0", *sizes, *arguments]
        processes.append(subprocess.Popen(command, env=os.environ | world, stderr=subprocess.PIPE, text=True))
    try:
        lines = iter(processes[0].stderr.readline, "")
        url = next(line.split()[-1] for line in lines if "serving story" in line)
        yield processes, url
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def post(url: str, **body) -> dict:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.loads(answer.read())


def wait_until_one_runs(url: str) -> None:
    text = ""
    while 'num_requests_running{engine="0",model_name="story"} 1' not in text:
        with urllib.request.urlopen(f"{url}/metrics", timeout=SECONDS) as answer:
            text = answer.read().decode()


def test_two_tensor_parallel_ranks_serve_and_end_on_a_signal(server):
    options = {"prompt": ["Once upon a time", "The king"], "max_tokens": 20, "temperature": 0.8, "seed": 3, "top_k": 20}
    with ranks_of_a_server(2, 1) as (processes, url):
        assert post(url, **options)["choices"] == server.complete(**options).json["choices"]
        finishing = in_thread(lambda: post(url, **LONG))
        wait_until_one_runs(url)
        for process in reversed(processes):  # as torchrun does
            process.send_signal(signal.SIGTERM)
        result = finishing()
        assert result["usage"]["completion_tokens"] == 400
        assert [process.wait(SECONDS) for process in processes] == [0, 0]


@pytest.mark.parametrize(("victim", "busy"), [(1, True), (1, False), (0, True)])
def test_when_a_rank_dies_the_server_ends(victim, busy):
    with ranks_of_a_server(1, 2) as (processes, url):
        body = {**LONG, "prompt": TOKENIZER.encode("Once upon a time"), "n": 16, "temperature": 1}
        if busy:
            in_thread(lambda: post(url, **body))
            wait_until_one_runs(url)
        processes[victim].kill()
        assert processes[1 - victim].wait(SECONDS) == 1
        errors = processes[1 - victim].stderr.read()
        assert "lost the connection to another rank" in errors and "Traceback" not in errors
