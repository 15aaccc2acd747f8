"""The command loop: one rank leads, the others follow.

The leader runs a program that the other ranks do not run, and sends a command whenever all ranks have something to
compute together; a follower waits for commands, and executes one after the other until the leader stops.

    commands = CommandLoop(parallel, execute)
    if parallel.is_leader:
        with commands.leading():
            ...  commands.send(Command.FORWARD, numbers)  ...
    else:
        commands.follow()

A command is a small broadcast of integers, filled up to a fixed size:

    [command, how many numbers follow, number, number, ...]

Numbers beyond that size (a long piece of a prompt) follow in a second broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .context import ParallelContext

STOP, KEEP_ALIVE, SHARE = -1, -2, -3  # commands of the loop itself
_HEADER_SIZE = 2
_INLINE_SIZE = 510  # numbers in the first broadcast: 4 KiB with the header


class CommandLoop:
    """Sends the leader's commands, and executes them on the followers.

    Args:
        execute: (command, numbers) -> what a follower does; commands are 0 or above.

    Attributes:
        has_followers: there are other ranks; without them nothing needs to be sent.
    """

    def __init__(self, parallel: ParallelContext, execute: Callable[[int, list[int]], object]) -> None:
        self.has_followers = parallel.world_size > 1
        self._parallel = parallel
        self._execute = execute
        self._buffer = torch.zeros(_HEADER_SIZE + _INLINE_SIZE, dtype=torch.int64)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """On the leader: stop the followers at the end of the block, also after an error."""
        try:
            yield
        finally:
            self.send(STOP)

    def follow(self) -> None:
        """On a follower: execute commands until the leader stops."""
        while True:
            command, numbers = self._receive()
            if command == STOP:
                return
            if command >= 0:
                self._execute(command, numbers)

    def follow_shared(self) -> Iterator[list[int]]:
        """`follow`, and yield what the leader shares. Closed early, it still follows until the leader stops."""
        while True:
            command, numbers = self._receive()
            if command == STOP:
                return
            if command == SHARE:
                try:
                    yield numbers
                except GeneratorExit:
                    self.follow()  # the leader's steps need all ranks
                    raise
            elif command >= 0:
                self._execute(command, numbers)

    def share(self, numbers: Sequence[int]) -> None:
        """On the leader: numbers for followers that read `follow_shared`; the others ignore them."""
        self.send(SHARE, numbers)

    def keep_alive(self) -> None:
        """On the leader: send a command without effect, so that no follower times out while there is no work."""
        self.send(KEEP_ALIVE)

    def send(self, command: int, numbers: Sequence[int] = ()) -> None:
        """On the leader: send a command for the followers to execute; the leader executes it itself."""
        if not self.has_followers:
            return
        inline = numbers[:_INLINE_SIZE]
        self._buffer[: _HEADER_SIZE + len(inline)] = torch.tensor([command, len(numbers), *inline])
        self._parallel.broadcast_integers(self._buffer)
        if len(numbers) > _INLINE_SIZE:
            self._parallel.broadcast_integers(torch.tensor(numbers[_INLINE_SIZE:]))

    def _receive(self) -> tuple[int, list[int]]:
        self._parallel.broadcast_integers(self._buffer)
        command, count, *inline = self._buffer.tolist()
        rest = torch.zeros(max(0, count - _INLINE_SIZE), dtype=torch.int64)
        if len(rest):
            self._parallel.broadcast_integers(rest)
        return command, inline[:count] + rest.tolist()
