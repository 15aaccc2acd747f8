"""Ranks that are silent, that end, and of which rank 0 tells; the other rank is the far end of a connection."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from opt_megatron.parallel import heartbeat
from opt_megatron.parallel.heartbeat import LostRankPolicy, Watch
from opt_megatron.parallel.launch_environment import LaunchEnvironment


@pytest.fixture
def ends():
    pair = socket.socketpair()
    yield pair
    for end in pair:
        end.close()


def test_a_silent_rank_is_lost_and_the_others_are_told(ends):
    ours, _ = ends
    other, other_end = socket.socketpair()
    lost: list[str] = []
    answers = threading.Event()

    def answer() -> None:  # rank 2 lives
        while not answers.is_set():
            other_end.send(b"\xff\xff\xff\xff")
            answers.wait(0.01)

    thread = threading.Thread(target=answer)
    thread.start()
    Watch({1: ours, 2: other}, LostRankPolicy(0.4, lost.append)).run()
    answers.set()
    thread.join()
    assert len(lost) == 1 and lost[0].startswith("rank 1 has given no sign of life for 0.4 s (--step-timeout)")
    received = other_end.recv(4096)
    assert received[:4] == b"\xff\xff\xff\xff" and received[-4:] == b"\1\0\0\0"
    other.close()
    other_end.close()


def test_a_rank_that_has_ended_is_not_missed(ends):
    ours, theirs = ends
    theirs.close()
    Watch({1: ours}, LostRankPolicy(0.4, pytest.fail)).run()


def test_what_rank_0_tells_may_come_in_pieces(ends):
    ours, theirs = ends
    lost: list[str] = []
    theirs.send(b"\xff\xff\xff\xff\7\0")
    threading.Timer(0.1, lambda: theirs.send(b"\0\0")).start()
    Watch({0: ours}, LostRankPolicy(0.8, lost.append)).run()
    assert lost[0].startswith("rank 7 has given no sign of life")


def test_ranks_connect_and_a_stranger_is_not_taken_for_one(monkeypatch):
    """The ranks are threads, with a store in memory."""
    store, watched = dist.HashStore(), {}
    connect = heartbeat._connect

    def connect_after_a_stranger(store: dist.Store, launch: LaunchEnvironment) -> dict[int, socket.socket]:
        with socket.create_connection(("127.0.0.1", int(store.get(heartbeat._KEY).split()[1]))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(20))
        return connect(store, launch)

    def watch(rank: int) -> None:
        launch = LaunchEnvironment(rank, 3, "127.0.0.1", 1, has_agent=False, start_seconds=9)
        peers = heartbeat.connect(store, launch)
        watched[rank] = sorted(peers)

    monkeypatch.setattr(heartbeat, "_connect", connect_after_a_stranger)
    with ThreadPoolExecutor() as pool:
        list(pool.map(watch, range(3)))
    assert watched == {0: [1, 2], 1: [0], 2: [0]}
