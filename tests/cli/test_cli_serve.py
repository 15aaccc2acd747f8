"""opt-megatron serve: mistakes that end it before it serves."""

import socket

import pytest

from opt_megatron.cli import main


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
        (["--allowed-origins", "page.example"], "must be * or scheme, host and port alone"),
        (["--load", "/nowhere", "--port", "0"], "there is no such directory"),
        (["--watermark-key", "7"], "watermark_key is 7, but nothing is marked"),
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
