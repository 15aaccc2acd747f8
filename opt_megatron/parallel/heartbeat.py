"""Heartbeats: a rank that is stopped, or whose machine is lost, ends the others, whatever they are doing.

A collective waits half an hour for a rank that gives no sign, and no connection tells of a stopped process. Every rank
therefore has a thread that sends a message to rank 0, and rank 0's to every other rank, at least once a second; where
nothing has come for too long, the rank counts as lost. A rank that ends closes its connection, and is not missed.

    int32, little-endian: -1, or the number of a rank that is lost (from rank 0)
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from ..errors import LaunchError
from .launch_environment import LaunchEnvironment
from .rendezvous import listen

_MESSAGE = struct.Struct("<i")
_ALIVE = -1
_MOST_SECONDS_BETWEEN_BEATS = 1.0
_SECONDS_TO_CONNECT, _SECONDS_FOR_HELLO = 30.0, 2.0
_TOKEN_BYTES = 16
_HELLO_BYTES = _TOKEN_BYTES + _MESSAGE.size
_KEY = "opt_megatron/heartbeat"


@dataclass(frozen=True)
class LostRankPolicy:
    """What happens when a rank gives no sign of life.

    Attributes:
        seconds: after which it is lost. They are counted in the beats of this process: one that was stopped itself, as
            the whole job may be, does not blame the others.
        on_lost: called once, in a thread, with a sentence about the lost rank; to end this process.
    """

    seconds: float
    on_lost: Callable[[str], object]


def watch_ranks(store: dist.Store, launch: LaunchEnvironment, policy: LostRankPolicy) -> None:
    """Begin to watch the other ranks, in a thread that ends with the process; called on all ranks.

    Raises:
        LaunchError: the ranks cannot connect.
    """
    if launch.world_size > 1:
        watch = Watch(connect(store, launch), policy)
        threading.Thread(target=watch.run, name="heartbeat", daemon=True).start()


def connect(store: dist.Store, launch: LaunchEnvironment) -> dict[int, socket.socket]:
    """A connection of rank 0 to every other rank: the other rank -> connection.

    Raises:
        LaunchError: the ranks cannot connect.
    """
    try:
        return _accept(store, launch.world_size) if launch.rank == 0 else _connect(store, launch)
    except OSError as error:
        raise LaunchError(f"rank {launch.rank} cannot connect to the others for heartbeats: {error}") from None


def _accept(store: dist.Store, world_size: int) -> dict[int, socket.socket]:
    """The connections of the other ranks; those that do not know the token are not of this job."""
    peers: dict[int, socket.socket] = {}
    token = secrets.token_hex(_TOKEN_BYTES // 2)
    with listen(0) as listener:
        listener.settimeout(_SECONDS_TO_CONNECT)
        store.set(_KEY, f"{token} {listener.getsockname()[1]}")
        while len(peers) < world_size - 1:
            connection, _ = listener.accept()
            hello = _read_hello(connection)
            if hello.startswith(token.encode()):
                peers[_MESSAGE.unpack(hello[_TOKEN_BYTES:])[0]] = connection
            else:
                connection.close()
    return peers


def _read_hello(connection: socket.socket) -> bytes:
    """Token and rank from a new connection, or an empty string if it does not send as many bytes."""
    connection.settimeout(_SECONDS_FOR_HELLO)
    hello = b""
    with contextlib.suppress(OSError):
        while len(hello) < _HELLO_BYTES and (received := connection.recv(_HELLO_BYTES - len(hello))):
            hello += received
    return hello if len(hello) == _HELLO_BYTES else b""


def _connect(store: dist.Store, launch: LaunchEnvironment) -> dict[int, socket.socket]:
    token, port = store.get(_KEY).split()
    connection = socket.create_connection((launch.master_addr, int(port)), _SECONDS_TO_CONNECT)
    connection.sendall(token + _MESSAGE.pack(launch.rank))
    return {0: connection}


class Watch:
    """Sends beats to some ranks, and watches theirs.

    Args:
        peers: rank -> connection.
    """

    def __init__(self, peers: dict[int, socket.socket], policy: LostRankPolicy) -> None:
        self._peers = {rank: _Peer(connection) for rank, connection in peers.items()}
        self._policy = policy
        self._interval = min(_MOST_SECONDS_BETWEEN_BEATS, policy.seconds / 4)

    def run(self) -> None:
        """Return when the other ranks have ended, or one of them is lost."""
        lost = None
        while self._peers and lost is None:
            time.sleep(self._interval)
            lost = self._beat()
        if lost is not None:
            for peer in self._peers.values():
                peer.send(lost)
            self._policy.on_lost(
                f"rank {lost} has given no sign of life for {self._policy.seconds:g} s (--step-timeout): its process "
                "is stopped, or its machine is lost"
            )

    def _beat(self) -> int | None:
        """Exchange messages with all ranks; returns the rank that is lost, if one is."""
        for rank, peer in list(self._peers.items()):
            peer.send(_ALIVE)
            try:
                messages = peer.receive()
            except EOFError:
                del self._peers[rank]  # it has ended; if it had more to do, a collective fails
                continue
            peer.silent_seconds = 0.0 if messages else peer.silent_seconds + self._interval
            told = [number for number in messages if number != _ALIVE]
            if told or peer.silent_seconds > self._policy.seconds:
                return told[0] if told else rank
        return None


class _Peer:
    """The connection to another rank."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._incomplete = b""
        self.silent_seconds = 0.0

    def send(self, message: int) -> None:
        with contextlib.suppress(OSError):  # `receive` finds that the rank has ended
            self._connection.send(_MESSAGE.pack(message))

    def receive(self) -> list[int]:
        """The messages that have come since the last call.

        Raises:
            EOFError: the rank has ended.
        """
        try:
            received = self._connection.recv(4096)
        except BlockingIOError:
            return []
        except OSError:
            raise EOFError from None
        if not received:
            raise EOFError
        received = self._incomplete + received
        end = len(received) // _MESSAGE.size * _MESSAGE.size
        self._incomplete = received[end:]
        return [number for (number,) in _MESSAGE.iter_unpack(received[:end])]
