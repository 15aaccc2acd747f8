"""The launcher's variables: complete, missing, and wrong."""

import os
import socket

import pytest

from opt_megatron.errors import LaunchError
from opt_megatron.parallel.launch_environment import (
    check_network_interfaces,
    launch_environment,
    order_cuda_kernels,
    world_size_from_environment,
)

VARIABLES = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (*VARIABLES, "TORCHELASTIC_USE_AGENT_STORE", "OPT_MEGATRON_START_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_alone_needs_none_whatever_the_machine_sets_for_all(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert launch_environment() is None and world_size_from_environment() == 1


def test_they_are_read_and_an_agent_is_waited_for_longer(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    found = launch_environment()
    assert (found.rank, found.world_size, found.master_addr, found.master_port) == (1, 2, "node1", 29500)
    assert not found.has_agent and found.start_seconds < 30
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert launch_environment().start_seconds >= 300
    monkeypatch.setenv("OPT_MEGATRON_START_TIMEOUT", "7")
    assert launch_environment().start_seconds == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "sets WORLD_SIZE, MASTER_ADDR, MASTER_PORT, but not RANK"),
        ({"WORLD_SIZE": None}, "but not WORLD_SIZE"),
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "but not MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "x"}, "RANK='x'.*from 0 to 1"),
        ({"RANK": "2"}, "RANK='2'.*from 0 to 1"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "²"}, "RANK='²'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9999"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK='2'.*from 0 to 1"),
        ({"LOCAL_RANK": "gpu"}, "LOCAL_RANK='gpu'"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc'"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999'.*to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT='0'.*from 1"),
        ({"OPT_MEGATRON_START_TIMEOUT": "soon"}, "OPT_MEGATRON_START_TIMEOUT='soon'"),
    ],
)
def test_a_mistake_is_one_line_with_the_variable(monkeypatch, changes, message):
    for name, value in {**VARIABLES, **changes}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=message) as caught:
        launch_environment()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tp", "device", "given", "expected"),
    [(2, None, None, "1"), (2, "cuda", "8", "8"), (2, "cpu", None, None), (1, "cuda", None, None)],
)
def test_the_order_of_cuda_kernels(
    monkeypatch: pytest.MonkeyPatch, tp: int, device: str | None, given: str | None, expected: str | None
) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setattr(os, "environ", {} if given is None else {name: given})
    order_cuda_kernels(tp, device)
    assert os.environ.get(name) == expected


def test_a_network_interface_that_is_not_there(monkeypatch):
    name = socket.if_nameindex()[0][1]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
    check_network_interfaces()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", f"{name},nosuch0")
    with pytest.raises(LaunchError, match=f"GLOO_SOCKET_IFNAME='nosuch0', which is no network .* it has .*{name}"):
        check_network_interfaces()
