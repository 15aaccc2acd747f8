"""What a launcher tells each process: torchrun's variables, checked. Imports no torch, so errors come at once."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from ..errors import LaunchError, shorten

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
START_TIMEOUT = "OPT_MEGATRON_START_TIMEOUT"
_START_SECONDS, _START_SECONDS_OF_AGENT = 20, 600  # an agent ends all ranks if one of them fails
_MAXIMUM = 2**16 - 1  # of ports, and more than there are ranks or seconds


@dataclass(frozen=True)
class LaunchEnvironment:
    """This process among the ranks that a launcher has started.

    Attributes:
        master_addr, master_port: where rank 0 is found (with torchrun, where its store is).
        has_agent: torchrun watches the ranks, and has a store for them.
        start_seconds: how long the ranks wait for each other at the start.
    """

    rank: int
    world_size: int
    master_addr: str
    master_port: int
    has_agent: bool
    start_seconds: float


def launch_environment() -> LaunchEnvironment | None:
    """The launcher's variables; None without a launcher, for one process alone.

    Raises:
        LaunchError: some are missing, no numbers or out of range.
    """
    given = [name for name in _VARIABLES if os.environ.get(name)]
    if not {"RANK", "WORLD_SIZE"} & set(given):
        return None
    missing = [name for name in _VARIABLES if name not in given]
    if missing:
        raise LaunchError(
            f"the environment sets {', '.join(given)}, but not {', '.join(missing)}: start the ranks with torchrun, or "
            f"set {', '.join(_VARIABLES)} and LOCAL_RANK for each (for one process alone, none of them)"
        )
    world_size = _integer("WORLD_SIZE", 1, _MAXIMUM)
    if "LOCAL_RANK" in os.environ:
        _integer("LOCAL_RANK", 0, world_size - 1)
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    seconds = _START_SECONDS_OF_AGENT if has_agent else _START_SECONDS
    return LaunchEnvironment(
        rank=_integer("RANK", 0, world_size - 1),
        world_size=world_size,
        master_addr=os.environ["MASTER_ADDR"],
        master_port=_integer("MASTER_PORT", 1, _MAXIMUM),
        has_agent=has_agent,
        start_seconds=_integer(START_TIMEOUT, 1, _MAXIMUM) if START_TIMEOUT in os.environ else seconds,
    )


def world_size_from_environment() -> int:
    """The number of processes that a launcher has started; 1 without one.

    Raises:
        LaunchError: as `launch_environment`.
    """
    environment = launch_environment()
    return 1 if environment is None else environment.world_size


def local_rank() -> int:
    """This process's rank on its machine, from torchrun's or Slurm's environment; 0 without a launcher.

    Raises:
        LaunchError: it is no number.
    """
    name = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in os.environ), None)
    return 0 if name is None else _integer(name, 0, _MAXIMUM)


def local_world_size() -> int:
    """The number of ranks on this machine, from torchrun's or Slurm's environment; 1 without a launcher.

    Raises:
        LaunchError: it is no number.
    """
    name = next((name for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE") if name in os.environ), None)
    return 1 if name is None else _integer(name, 1, _MAXIMUM)


def check_network_interfaces() -> None:
    """Check the network interfaces that gloo is told to use, which otherwise ends in an error of its own.

    Raises:
        LaunchError: this machine has none of this name.
    """
    names = {name for _, name in socket.if_nameindex()}
    unknown = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name not in {*names, ""}]
    if unknown:
        raise LaunchError(
            f"the environment says GLOO_SOCKET_IFNAME={unknown[0][:40]!r}, which is no network interface of "
            f"{socket.gethostname()}: it has {shorten(sorted(names))}"
        )


def order_cuda_kernels(tensor_model_parallel_size: int, device: str | None) -> None:
    """Have CUDA start kernels in the order of their launches, by CUDA_DEVICE_MAX_CONNECTIONS=1 where it is not set.

    Megatron-core asks for it where tensor parallel ranks communicate while they compute (on GPUs before Blackwell).

    Called before CUDA is started, which reads the variable then.

    Args:
        device: "cpu" or "cuda"; None is not known yet.
    """
    if tensor_model_parallel_size > 1 and device != "cpu":
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _integer(name: str, minimum: int, maximum: int) -> int:
    value = os.environ[name]
    is_number = value.isascii() and value.isdecimal() and len(value) < 20
    if not is_number or not minimum <= int(value) <= maximum:
        raise LaunchError(
            f"the environment says {name}={value[:20]!r}, which is not a whole number from {minimum} to {maximum}"
        )
    return int(value)
