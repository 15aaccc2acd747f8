"""The ranks of a launch find each other: a store that all of them are connected to.

torch's own rendezvous waits half an hour for a rank that never comes, and forever at a port that another program
listens on. Here the ranks wait `start_seconds` for each other, and say who has not come.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..errors import LaunchError, shorten
from .agreement import first_difference
from .launch_environment import START_TIMEOUT, LaunchEnvironment

T = TypeVar("T")
_SECONDS_BETWEEN_TRIES = 0.1
_SECONDS_TO_REACH_AGENT = 20
_GRACE_SECONDS = 1.0  # after a failure rank 0 stays so long, because it has the store in which the others read of it
_FAILED = "opt_megatron/start/failed"


def meet(environment: LaunchEnvironment, facts: Mapping[str, object], timeout: timedelta) -> dist.Store:
    """The store of the launch, once all ranks have come; called on all of them.

    Args:
        facts: what must be the same on all ranks, as JSON has it, for the process groups to be made at all.
        timeout: of the store, from then on.

    Raises:
        LaunchError: ranks are missing or differ, or rank 0 cannot be reached. Where all have come, on all of them.
    """
    deadline = time.monotonic() + environment.start_seconds
    store = _connect(environment, deadline, timeout)
    try:
        _wait_for_all(store, environment, {"WORLD_SIZE": environment.world_size, **facts}, deadline)
    except LaunchError as error:
        store.set(_FAILED, str(error))
        if environment.rank == 0:
            time.sleep(_GRACE_SECONDS)
        raise
    except RuntimeError:
        raise LaunchError("rank 0 has ended before all ranks had started") from None
    return store


def _connect(environment: LaunchEnvironment, deadline: float, timeout: timedelta) -> dist.Store:
    if environment.has_agent:
        return _connect_to_agent(environment, timeout)
    address, port, is_host = environment.master_addr, environment.master_port, environment.rank == 0
    listener = _listen(port) if is_host else None
    _wait_for_listener(
        environment,
        deadline,
        f"rank {environment.rank} has not reached rank 0 at MASTER_ADDR={address}, MASTER_PORT={port} "
        f"within {environment.start_seconds} s: start all ranks with these two",
    )
    return _in_time(
        lambda: dist.TCPStore(
            address,
            port,
            environment.world_size,
            is_host,
            timeout,
            wait_for_workers=False,
            master_listen_fd=None if listener is None else listener.detach(),
        ),
        deadline,
        f"what listens at MASTER_ADDR={address}, MASTER_PORT={port} does not answer as rank 0 would: set another port "
        "on all ranks",
    )


def _connect_to_agent(environment: LaunchEnvironment, timeout: timedelta) -> dist.Store:
    """torchrun's store, which is there before the ranks are.

    Raises:
        LaunchError: it is not: the variables have been left by another launch.
    """
    seconds = min(environment.start_seconds, _SECONDS_TO_REACH_AGENT)
    deadline = time.monotonic() + seconds
    message = (
        f"TORCHELASTIC_USE_AGENT_STORE is set, but no torchrun answers at MASTER_ADDR={environment.master_addr}, "
        f"MASTER_PORT={environment.master_port} within {seconds} s: start the ranks with torchrun, or unset it"
    )
    _wait_for_listener(environment, deadline, message)
    return _in_time(lambda: next(rendezvous("env://", timeout=timeout))[0], deadline, message)


def _listen(port: int) -> socket.socket:
    try:
        return listen(port)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise LaunchError(
            f"rank 0 cannot listen on MASTER_PORT={port} ({reason}): set another port on all ranks"
        ) from None


def listen(port: int) -> socket.socket:
    """A socket that listens on all addresses of this machine, on a free port if `port` is 0.

    Raises:
        OSError: the port is in use, or this user may not listen on it.
    """
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _wait_for_listener(environment: LaunchEnvironment, deadline: float, message: str) -> None:
    """Return when something listens where the store should be; torch would print a line at each try.

    Raises:
        LaunchError: there is no such host; nothing listens by the deadline (`message` and the system's reason).
    """
    address, port = environment.master_addr, environment.master_port
    while True:
        try:
            socket.create_connection((address, port), max(0.1, deadline - time.monotonic())).close()
            return
        except (socket.gaierror, UnicodeError):
            raise LaunchError(f"MASTER_ADDR={address[:100]!r} is no host that can be found") from None
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(f"{message} ({error.strerror or error})") from None
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _in_time(action: Callable[[], T], deadline: float, message: str) -> T:
    """What the action returns, which may hang in a call that Python cannot interrupt.

    Raises:
        LaunchError: it has not returned by the deadline, or failed.
    """
    results: list[T] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            results.append(action())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.1, deadline - time.monotonic()))
    if not results:
        raise LaunchError(message)
    return results[0]


def _wait_for_all(
    store: dist.Store, environment: LaunchEnvironment, facts: Mapping[str, object], deadline: float
) -> None:
    """Compare this rank's facts with those of each other one."""
    keys = [f"opt_megatron/start/{rank}" for rank in range(environment.world_size)]
    store.set(keys[environment.rank], json.dumps(facts))
    for rank, key in enumerate(keys):
        while not store.check([key]):
            if store.check([_FAILED]):
                raise LaunchError(store.get(_FAILED).decode())
            if time.monotonic() > deadline:
                missing = [f"rank {rank}" for rank, key in enumerate(keys) if not store.check([key])]
                raise LaunchError(
                    f"{shorten(missing)} of {len(keys)} ranks did not start within {environment.start_seconds} s: "
                    f"start them too, or set {START_TIMEOUT} to more seconds"
                )
            time.sleep(_SECONDS_BETWEEN_TRIES)
        theirs = json.loads(store.get(key))
        difference = first_difference({f"rank {environment.rank}": facts, f"rank {rank}": theirs})
        if difference is not None:
            raise LaunchError(f"{difference}: start all ranks alike")
