"""The groups of a process share a network device."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

from opt_megatron.parallel.context import ParallelContext
from opt_megatron.parallel.gloo_device import gloo_groups_on_device_of


def test_megatrons_groups_use_the_device_of_the_control_group(alone: ParallelContext) -> None:
    getters = (parallel_state.get_tensor_model_parallel_group, parallel_state.get_pipeline_model_parallel_group)
    for group in (getters[0](), getters[1](), parallel_state.get_data_parallel_group()):
        options = group._get_backend(torch.device("cpu")).options
        assert options._devices[0] is alone.control_group._get_backend(torch.device("cpu")).options._devices[0]
        assert options._timeout == distributed_c10d.default_pg_timeout


@pytest.mark.parametrize("backend", [SimpleNamespace(), SimpleNamespace(options=SimpleNamespace(_devices=[]))])
def test_torch_makes_the_devices_where_it_tells_none(backend: SimpleNamespace) -> None:
    original = distributed_c10d.ProcessGroupGloo
    with gloo_groups_on_device_of(mock.Mock(_get_backend=lambda device: backend)):
        assert distributed_c10d.ProcessGroupGloo is original


def test_an_error_leaves_torch_as_it_was(alone: ParallelContext) -> None:
    original = distributed_c10d.ProcessGroupGloo
    with pytest.raises(ZeroDivisionError), gloo_groups_on_device_of(alone.control_group):
        assert issubclass(distributed_c10d.ProcessGroupGloo, original)
        assert distributed_c10d.ProcessGroupGloo is not original
        raise ZeroDivisionError
    assert distributed_c10d.ProcessGroupGloo is original
