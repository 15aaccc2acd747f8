"""The ranks of a launch find each other, or say why they do not; the ranks are threads of this process."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from opt_megatron.errors import LaunchError
from opt_megatron.parallel import rendezvous
from opt_megatron.parallel.launch_environment import LaunchEnvironment

LONG, SHORT = 60, 0.4  # seconds


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch):
    monkeypatch.setattr(rendezvous, "_GRACE_SECONDS", 0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meet(rank: int, world_size: int, port: int, seconds: float = LONG, device: str = "cpu", address: str = "127.0.0.1"):
    """The store, or the error's text."""
    environment = LaunchEnvironment(rank, world_size, address, port, has_agent=False, start_seconds=seconds)
    try:
        return rendezvous.meet(environment, {"device": device}, timedelta(seconds=seconds))
    except LaunchError as error:
        return str(error)


def meet_all(*ranks: dict) -> list:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [future.result() for future in [pool.submit(meet, **arguments) for arguments in ranks]]


def test_all_ranks_get_one_store():
    port = free_port()
    first, second = meet_all(*({"rank": rank, "world_size": 2, "port": port} for rank in range(2)))
    first.set("key", "value")
    assert second.get("key") == b"value"


def test_ranks_that_do_not_come_are_named():
    port = free_port()
    results = meet_all(*({"rank": rank, "world_size": 4, "port": port, "seconds": SHORT} for rank in (0, 2)))
    assert results[0].startswith("rank 1, rank 3 of 4 ranks did not start within 0.4 s")
    assert results[1] == results[0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"world_size": 3}, "rank 1 has WORLD_SIZE 3, rank 0 2"),
        ({"device": "cuda"}, "rank 1 has device cuda, rank 0 cpu"),
    ],
)
def test_ranks_that_cannot_form_a_group_are_told_the_difference(other, message):
    port = free_port()
    results = meet_all(*({"rank": rank, "world_size": 2, "port": port, **(other if rank else {})} for rank in range(2)))
    assert results[0].startswith(message) and "rank 1 has" in results[1] + results[0]
    assert all("start all ranks alike" in result for result in results)


def test_a_port_that_another_program_has():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert meet(0, 2, port).startswith(f"rank 0 cannot listen on MASTER_PORT={port} (Address already in use)")
        assert "does not answer as rank 0 would: set another port" in meet(1, 2, port, seconds=SHORT)


def test_a_rank_0_that_cannot_be_reached():
    assert "has not reached rank 0 at MASTER_ADDR=127.0.0.1" in meet(1, 2, free_port(), seconds=SHORT)
    for rank in range(2):
        told = meet(rank, 2, free_port(), address="no such host")
        assert told == "MASTER_ADDR='no such host' is no host that can be found"


def test_a_torchrun_that_is_not_there():
    left_behind = LaunchEnvironment(0, 1, "127.0.0.1", free_port(), has_agent=True, start_seconds=SHORT)
    with pytest.raises(LaunchError, match=r"no torchrun answers at .* or unset it \(Connection refused\)"):
        rendezvous.meet(left_behind, {}, timedelta(seconds=LONG))
