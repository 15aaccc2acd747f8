"""The only patches of Megatron-core's CUDA assumptions, and the quiet, late import of it.

Every patch names what it replaces and why. On a machine with CUDA none of them is applied.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import queue
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch

_prepared = False
_prepared_for_training = False


def prepare_megatron() -> None:
    """Import Megatron-core once, without its import warnings, and patch it when there is no CUDA.

    It warns that apex and TransformerEngine are absent and that its own fallbacks are used. That is the
    intended state on a CPU, and nothing a user can act on.
    """
    global _prepared
    if _prepared:
        return
    # Advice to developers of Megatron-core (0.19: that GPTModel will be replaced, how to spell specs), and a
    # remark of torch's on CUDA_HOME where there is a toolkit and no GPU.
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.models.gpt  # noqa: F401  (brings in all that this project uses)
    # Core's own default for cuda_graph_scope triggers its own deprecation warning, once per config.
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    # Core still calls a collective under the name that torch is about to drop.
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor). is deprecated")
    # Advice for overlapping communication on a GPU, given once per process in training.
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
    if not torch.cuda.is_available():
        _place_on_cpu()
        _track_cpu_random_state()
    _prepared = True


def _place_on_cpu() -> None:
    """`torch.cuda.current_device` -> the CPU.

    Core passes its result as `device=` in tensor_parallel/mappings.py (gathers and reduce-scatters),
    utils.GlobalMemoryBuffer and pipeline receives. Without CUDA the call raises; no caller wants a number.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")


def _track_cpu_random_state() -> None:
    """Core's RNG tracker saves and restores CUDA generator states; on a CPU, dropout draws from torch's
    default generator, so the tracker must save and restore that one."""
    from megatron.core.tensor_parallel import random as core_random

    class CPURNGStatesTracker(core_random.CudaRNGStatesTracker):
        """Named random states of the CPU generator, with core's interface (add, fork, get_states)."""

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
            if outer_name != "default-rng":  # a fork inside a fork: the outer one goes on from here
                self.states_[outer_name] = outer_state
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(self.states_.get(outer_name, outer_state))
                self._current_state_name = outer_name

    core_random._CUDA_RNG_STATE_TRACKER = CPURNGStatesTracker()
    core_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def prepare_training() -> None:
    """What training needs beside `prepare_megatron`: schedules, data sets and checkpoints on a CPU; once."""
    global _prepared_for_training
    if _prepared_for_training:
        return
    prepare_megatron()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import dist_checkpointing  # noqa: F401
        from megatron.core.dist_checkpointing.strategies import filesystem_async
    # torch.distributed's tensors that checkpoints are written from, and storages that they are read from.
    for message in (
        "TypedStorage is deprecated",
        "Please use DTensor instead",
        "torch.distributed is disabled",
        "`load_state_dict` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")
    # Core passes the writers' results through a manager process, which it spawns at every save; here the writers
    # are threads (training/checkpointing.py), and a queue within the process does.
    for name in ("_get_write_results_queue", "get_write_results_queue"):  # in 0.16, in 0.19
        if hasattr(filesystem_async, name):
            setattr(filesystem_async, name, queue.Queue)
    if not torch.cuda.is_available():
        _let_schedules_run_on_cpu()
        _let_recomputation_run_on_cpu()
        torch.cuda.synchronize = lambda device=None: None  # before tensors are written to a checkpoint
        torch.cuda.current_stream = lambda device=None: None  # core 0.19 asks, before it waits for no events on it
    _prepared_for_training = True


def own_async_writer() -> dict[str, str]:
    """Arguments of `dist_checkpointing.save` by which core's own writer makes an asynchronous checkpoint.

    From 0.19 on another one, of NVIDIA's resiliency extension, is the default; 0.16 knows no choice.
    """
    from megatron.core import dist_checkpointing

    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def _let_schedules_run_on_cpu() -> None:
    """`torch.zeros(..., device="cuda")` in pipeline_parallel/schedules.py, a counter of tokens -> the CPU."""

    class TorchOnCPU(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def zeros(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            return torch.zeros(*size, device="cpu" if device == "cuda" else device, **kwargs)

    importlib.import_module("megatron.core.pipeline_parallel.schedules").torch = TorchOnCPU("torch")


def _let_recomputation_run_on_cpu() -> None:
    """Recomputed activations must see the random numbers of the first time: the CPU generator's, saved and set in
    place of a GPU's by tensor_parallel/random.py."""
    from megatron.core.tensor_parallel import random as core_random

    core_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    core_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


@contextlib.contextmanager
def cuda_calls_stay_on_cpu() -> Iterator[None]:
    """Inside the block, and only without CUDA, `Tensor.cuda()` returns the tensor itself.

    `LanguageModule.setup_embeddings_and_output_layer` calls `.cuda()` on the last stage's tied weight
    before it all-reduces it.
    """
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.cuda
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    try:
        yield
    finally:
        torch.Tensor.cuda = original
