"""The only patches of Megatron-core, and the quiet, late import of it.

Core assumes CUDA in many places. `prepare_megatron(device)`, which `init_parallel` calls with the device that it
chose, makes core compute on a CPU, whether or not the machine has a GPU; for a CUDA device nothing is patched.
The patches are made in core's own modules; torch itself is patched only within `cuda_calls_stay_on_cpu`. Every patch
names what it replaces and why.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import queue
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from .core_warnings import silence_core
from .deferred_import import deferred_imports, deferred_modules

_patches: list[tuple[Any, str, Any]] = []  # owner, attribute, original value: what `prepare_megatron` replaced
_FACTORIES = ("empty", "full", "ones", "tensor", "zeros")
_TRAINING_MODULES = (
    "megatron.core.distributed",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
)


def import_core(*modules: str) -> None:
    """Import Megatron-core (all that inference uses, and `modules`) without its import warnings.

    Called before modules that import core themselves, it saves some two seconds where there is no GPU.
    """
    silence_core()
    with warnings.catch_warnings(), _without_compiler(), deferred_imports():
        warnings.simplefilter("ignore")
        for name in ("megatron.core.models.gpt", *modules):
            importlib.import_module(name)


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Without a GPU, core's functions that it decorates with torch.compile stay as they are.

    The decorator imports a compiler at once, which takes a second, and OPT on a CPU calls none of the forty functions.
    (`megatron.core.jit.disable_jit_fuser` comes too late: importing that module imports core first.)
    """
    original = torch.compile
    if not torch.cuda.is_available():
        setattr(torch, "compile", lambda function, **_: function)  # noqa: B010  (mypy: overloaded)
    try:
        yield
    finally:
        torch.compile = original


def prepare_megatron(device: torch.device) -> None:
    """Import Megatron-core and make it compute on `device`. May be called again, also with another device."""
    import_core()
    if device.type != "cpu":
        while _patches:
            setattr(*_patches.pop())
        return
    _let_modules_see_a_cpu()
    _track_cpu_random_state()


def prepare_training(device: torch.device) -> None:
    """`prepare_megatron`, with what training needs as well: schedules and checkpoints."""
    import_core(*_TRAINING_MODULES)
    import_core(*deferred_modules())  # training uses some of them, and patches reach only modules that are there
    # torch.distributed's tensors that checkpoints are written from, and storages that they are read from.
    for message in (
        "TypedStorage is deprecated",
        "Please use DTensor instead",
        "torch.distributed is disabled",
        "`load_state_dict` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")
    # Core passes the writers' results through a manager process, which it spawns at every save; here the writers
    # are threads (training/checkpointing/async_save.py), and a queue within the process is enough.
    filesystem_async = sys.modules["megatron.core.dist_checkpointing.strategies.filesystem_async"]
    for name in ("_get_write_results_queue", "get_write_results_queue"):  # in 0.16, in 0.19
        if hasattr(filesystem_async, name):
            setattr(filesystem_async, name, queue.Queue)
    prepare_megatron(device)


def _replace(owner: Any, name: str, value: Any) -> None:
    _patches.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


class _CudaWithoutGPU(types.ModuleType):
    """torch.cuda as Megatron-core sees it: no GPU, and the CPU as the current device.

    Core passes `current_device()` as `device=` in tensor_parallel/mappings.py (gathers and reduce-scatters),
    utils.GlobalMemoryBuffer and pipeline receives; no caller wants a number. It calls `synchronize()` before tensors
    are written to a checkpoint, and 0.19 asks for `current_stream()` before it waits for no events on it.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def is_available() -> bool:
        return False

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(device: Any = None) -> None:
        return None

    @staticmethod
    def current_stream(device: Any = None) -> None:
        return None


class _TorchOnCPU(types.ModuleType):
    """torch as Megatron-core sees it: `cuda` is the above, and a tensor for "cuda" is made on the CPU.

    (pipeline_parallel/schedules.py counts tokens in `torch.zeros(..., device="cuda")`.)
    """

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaWithoutGPU("torch.cuda")
        for name in _FACTORIES:
            setattr(self, name, _made_on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _made_on_cpu(factory: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


_TORCH_ON_CPU = _TorchOnCPU()


def _let_modules_see_a_cpu() -> None:
    """The name `torch` in the modules of Megatron-core that have been imported -> `_TorchOnCPU`."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core.") and getattr(module, "torch", None) is torch:
            _replace(module, "torch", _TORCH_ON_CPU)


def _track_cpu_random_state() -> None:
    """Core's RNG tracker saves and restores CUDA generator states; on a CPU, dropout draws from torch's
    default generator, so the tracker must save and restore that one."""
    from megatron.core.tensor_parallel import random as core_random

    if any(owner is core_random and name == "_CUDA_RNG_STATE_TRACKER" for owner, name, _ in _patches):
        return
    _replace(core_random, "_CUDA_RNG_STATE_TRACKER", _cpu_tracker())
    _replace(core_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)
    # Recomputed activations must see the random numbers of the first time.
    _replace(core_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _replace(core_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))


def _cpu_tracker() -> Any:
    from megatron.core.tensor_parallel import random as core_random

    class CPURNGStatesTracker(core_random.CudaRNGStatesTracker):
        """Named random states of the CPU generator, with core's interface (add, fork, get_states)."""

        _current_state_name: str

        def add(self, name: str, seed: int) -> None:
            """Remember the state that `seed` gives under `name`, leaving the current state alone."""
            if name in self.states_ or seed in self.seeds_:
                raise ValueError(f"random state {name!r} or seed {seed} exists already")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = core_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            """Draw from the named state inside the block, and from the former one after it."""
            if name not in self.states_:
                raise ValueError(f"random state {name!r} was not added: call init_parallel first")
            outer_name, outer_state = self._current_state_name, torch.get_rng_state()
            if outer_name != "default-rng":  # nested: the outer state continues from here
                self.states_[outer_name] = outer_state
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(self.states_.get(outer_name, outer_state))
                self._current_state_name = outer_name

    return CPURNGStatesTracker()


def own_async_writer() -> dict[str, str]:
    """Arguments of `dist_checkpointing.save` by which core's own writer makes an asynchronous checkpoint.

    From 0.19 on another one, of NVIDIA's resiliency extension, is the default; 0.16 has no such argument.
    """
    from megatron.core import dist_checkpointing

    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


@contextlib.contextmanager
def cuda_calls_stay_on_cpu(device: torch.device) -> Iterator[None]:
    """Inside the block, if `device` is a CPU, `Tensor.cuda()` returns the tensor itself.

    `LanguageModule.setup_embeddings_and_output_layer` calls `.cuda()` on the last stage's tied weight
    before it all-reduces it.
    """
    if device.type != "cpu":
        yield
        return
    original = torch.Tensor.cuda
    setattr(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor)  # noqa: B010  (mypy: a method)
    try:
        yield
    finally:
        setattr(torch.Tensor, "cuda", original)  # noqa: B010
