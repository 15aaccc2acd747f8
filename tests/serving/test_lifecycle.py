"""From loading to the end: health, an orderly shutdown, an engine that fails, a rank that dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from running_server import SECONDS, TOKENIZER, running

from opt_megatron.cli import main
from opt_megatron.errors import UserError
from opt_megatron.generation.decoding.sampling_group import SamplingGroup
from opt_megatron.serving.async_engine import EngineTimeoutError
from opt_megatron.serving.limits import Limits

TOOL = Path(__file__).parents[2] / "tools" / "serve.py"
LONG = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


def in_thread(action):
    """What it returns, or the error that it raised, once it is asked for."""
    results = []

    def act():
        try:
            results.append(action())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()

    def result():
        thread.join(SECONDS)
        return results[0]

    return result


def health(server):
    answer = server.request("GET", "/health")
    return answer.status, answer.json["status"]


def test_it_is_healthy_when_the_model_is_ready(alone):
    go = threading.Event()
    with running(alone, before_ready=lambda: go.wait(SECONDS)) as server:
        assert health(server) == (503, "loading")
        answer = server.complete(prompt="Once")
        assert answer.status == 503 and "being loaded" in answer.json["error"]["message"]
        assert server.request("GET", "/v1/models").status == 503
        assert server.request("GET", "/").status == 200
        go.set()
        server.wait_for(lambda: health(server) == (200, "ready"))


def test_a_signal_lets_running_requests_finish_and_takes_no_more(alone):
    with running(alone) as server:
        server.wait_for(lambda: health(server)[0] == 200)
        server.brake.on()
        result = in_thread(lambda: server.complete(**LONG))
        server.wait_for(lambda: bool(server.async_engine._requests))
        server.server.handle_exit(signal.SIGTERM, None)
        server.wait_for(lambda: health(server) == (503, "shutting down"))
        assert server.complete(prompt="Once").status == 503
        server.brake.off()
        answer = result()
        assert answer.status == 200 and answer.json["usage"]["completion_tokens"] == 400
        server.thread.join(SECONDS)
        assert not server.thread.is_alive() and server.server.raised is None


def test_what_takes_too_long_at_the_end_is_cancelled(alone):
    with running(alone, Limits(drain_seconds=0.2)) as server:
        server.wait_for(lambda: health(server)[0] == 200)
        server.brake.on()
        results = [in_thread(lambda s=s: server.complete(**LONG, stream=s)) for s in (False, True)]
        server.wait_for(lambda: len(server.async_engine._requests) == 2)
        server.server.handle_exit(signal.SIGTERM, None)
        whole, streamed = (result() for result in results)
        assert whole.status == 503 and streamed.events[-1]["error"]["message"] == "the server is shutting down"
        server.brake.off()
        server.thread.join(SECONDS)
        assert not server.thread.is_alive() and server.server.raised is None


def test_an_engine_that_fails_ends_everything_with_its_error(alone):
    with running(alone) as server:
        server.wait_for(lambda: health(server)[0] == 200)
        server.brake.on()
        server.brake.error = RuntimeError("Connection closed by peer")
        results = [in_thread(lambda s=s: server.complete(**LONG, stream=s)) for s in (False, True)]
        server.wait_for(lambda: len(server.async_engine._requests) == 2)
        server.brake.off()
        whole, streamed = (result() for result in results)
        assert whole.status == 503 and whole.json["error"]["message"] == "the engine has stopped"
        assert streamed.events[-1]["error"]["message"] == "the engine has stopped"
        server.thread.join(SECONDS)
        assert str(server.server.raised) == "Connection closed by peer"


def test_a_step_that_never_ends_is_a_lost_rank(alone):
    with running(alone, Limits(step_seconds=0.5)) as server:
        server.wait_for(lambda: health(server)[0] == 200)
        time.sleep(1.2)  # waiting for requests is no step
        assert server.complete(prompt="Once", max_tokens=2).status == 200
        server.brake.on()
        assert server.complete(**LONG).status == 503
        server.thread.join(SECONDS)
        assert isinstance(server.server.raised, EngineTimeoutError)


def test_a_model_that_cannot_be_loaded_ends_the_server(alone):
    def fail():
        raise UserError("there is no such model")

    with running(alone, before_ready=fail) as server:
        server.thread.join(SECONDS)
        assert str(server.server.raised) == "there is no such model"


def test_an_error_of_one_request_is_500_for_it_alone(alone, monkeypatch):
    made = SamplingGroup.accept_token

    def accept(group, token, logits=None):
        if group.request.params.seed == 13:
            raise ZeroDivisionError("thirteen")
        return made(group, token, logits)

    monkeypatch.setattr(SamplingGroup, "accept_token", accept)
    with running(alone) as server:
        server.wait_for(lambda: health(server)[0] == 200)
        answer = server.complete(prompt="Once", seed=13)
        assert answer.status == 500 and "thirteen" in answer.json["error"]["message"]
        (event,) = server.complete(prompt="Once", seed=13, stream=True).events
        assert event["error"]["code"] == "internal_error"
        assert server.complete(prompt="Once", seed=14).status == 200
        assert server.metric("vllm:request_success_total", finished_reason="error") == 2
        assert server.request("HEAD", "/health").status == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--max-queue-length", "0"], "--max-queue-length is 0"),
        (["--max-connections", str(10**12)], "open files, but the system allows"),
        (["--request-timeout", "nan"], "--request-timeout is nan"),
        (["--max-body-size", "many"], "'many' is not a size"),
        (["--api-key", ""], "is empty"),
        (["--load", "/nowhere", "--port", "0"], "there is no such directory"),
        (["--max-batch-size", "0"], "--max-batch-size is 0"),
        (["--tensor-model-parallel-size", "2"], "torchrun --nproc-per-node 2"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(alone, capsys, monkeypatch, arguments, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and last.startswith("opt-megatron: error: ") and message in last


def test_a_port_that_is_taken_is_a_mistake(alone, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(SystemExit):
            main(["serve", "--port", str(other.getsockname()[1])])
    assert "Address already in use" in capsys.readouterr().err


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
    while 'num_requests_running{model_name="story"} 1' not in text:
        with urllib.request.urlopen(f"{url}/metrics", timeout=SECONDS) as answer:
            text = answer.read().decode()


def test_two_tensor_parallel_ranks_serve_and_end_when_told_to(server):
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
