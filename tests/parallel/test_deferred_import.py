"""What importing Megatron-core leaves for later, and that it is the real thing when it is used."""

import builtins
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from opt_megatron.parallel import deferred_import
from opt_megatron.parallel.deferred_import import DeferredName, deferred_imports

ROOT = Path(__file__).parents[2]
_HEAVY = ("sympy", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.utils.tensorboard")
_OF_AN_IMPORT = f"""
import builtins, sys
original = builtins.__import__
import opt_megatron
opt_megatron.OPT
assert builtins.__import__ is original
assert not [name for name in {_HEAVY} if name in sys.modules]
import torch
from megatron.core import utils
from megatron.core.distributed import FullyShardedDataParallel
assert utils.HAVE_DTENSOR and not isinstance(torch.ones(1), utils.DTensor)
assert "torch.distributed.tensor" not in sys.modules

from torch.distributed.tensor import DTensor, Shard
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
sharded = DTensor.from_local(torch.ones(2), torch.distributed.init_device_mesh("cpu", (1,)), [Shard(0)])
assert isinstance(sharded, utils.DTensor) and not isinstance(torch.ones(1), utils.DTensor)
assert utils.to_local_if_dtensor(sharded).tolist() == [1, 1]
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel as sharded_parallel
class Derived(FullyShardedDataParallel): pass
assert Derived.__mro__[1] is sharded_parallel and issubclass(Derived, FullyShardedDataParallel)

from opt_megatron.parallel.core_compat import prepare_training
prepare_training(torch.device("cpu"))
from megatron.core.transformer import fsdp_dtensor_checkpoint
assert fsdp_dtensor_checkpoint.torch is not torch, "core's patches do not reach a deferred module"
"""


@pytest.mark.skipif(version("megatron-core") not in deferred_import._CORE_VERSIONS, reason="imports all at once")
def test_importing_opt_leaves_what_generation_does_not_use():
    command = [sys.executable, "-W", "ignore", "-c", _OF_AN_IMPORT]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_deferred_name_is_imported_when_it_is_used(monkeypatch):
    name = DeferredName("fractions", "Fraction")
    monkeypatch.delitem(sys.modules, "fractions", raising=False)
    assert not isinstance(1, name) and "fractions" not in sys.modules
    assert name(1, 2).denominator == 2 and name.from_float(0.5) == name(1, 2)
    assert isinstance(name(1, 2), name) and not isinstance(1, name)


def test_other_versions_of_core_and_other_importers_are_left_alone(monkeypatch):
    original = builtins.__import__
    with deferred_imports():
        from torch.utils.tensorboard import SummaryWriter  # this module is none of core's
    assert isinstance(SummaryWriter, type)
    monkeypatch.setattr(deferred_import, "version", lambda package: "0.19.2")
    with deferred_imports():
        assert builtins.__import__ is original
