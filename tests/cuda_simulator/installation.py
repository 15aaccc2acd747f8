"""Turn this process into one of a machine with GPUs; must be imported before torch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from .build_guard import load_guard

load_guard()  # builds it the first time, and raises CannotSimulate where it cannot

import torch  # noqa: E402

from .device import install_cuda  # noqa: E402
from .distributed import install_distributed  # noqa: E402
from .functions import Functions, attention_in_one_launch  # noqa: E402
from .operations import Operations  # noqa: E402
from .tensors import Generator, is_pinned, pin  # noqa: E402


def install(devices: int = 1) -> None:
    """Turn this process into one of a machine with GPUs, for good: there is no way back.

    Call it once, before the program under test is imported, since that may take functions of torch by name.

    Args:
        devices: how many GPUs torch.cuda reports (local ranks need one each).
    """
    install_cuda(devices)
    install_distributed()
    torch.Generator = Generator
    torch.Tensor.pin_memory = lambda tensor, device=None: pin(tensor.clone())
    torch.Tensor.is_pinned = lambda tensor, device=None: is_pinned(tensor)
    functional = torch.nn.functional
    functional.scaled_dot_product_attention = attention_in_one_launch(functional.scaled_dot_product_attention)
    torch.inference_mode = _no_grad_instead
    _keep_marks_of_moved_parameters()
    _enter_modes_on_every_thread()


def _no_grad_instead(mode: Any = True) -> Any:
    """Inference tensors have no version counter, which wrappers need."""
    if callable(mode):
        return torch.no_grad()(mode)
    return torch.no_grad() if mode else contextlib.nullcontext()


def _keep_marks_of_moved_parameters() -> None:
    """`module.cuda()` replaces parameters by wrappers; ties and attributes (Megatron's marks) stay, as on a GPU."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    original = torch.nn.Module._apply

    def _apply(module: torch.nn.Module, function: Callable, recurse: bool = True) -> torch.nn.Module:
        former = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        original(module, function, recurse)
        for name, old in former.items():
            new, tied = module._parameters[name], vars(old).get("moved_to")
            if tied is not None and (tied.device, tied.dtype) == (new.device, new.dtype):
                module._parameters[name] = tied
            elif new is not old:
                vars(new).update({key: value for key, value in vars(old).items() if key not in ("held", "moved_to")})
                old.moved_to = new
        return module

    torch.nn.Module._apply = _apply


def _enter_modes() -> None:
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") arrives as a copy from the CPU
    Functions().__enter__()
    Operations().__enter__()


def _enter_modes_on_every_thread() -> None:
    """Modes belong to a thread: this one enters them now, others as they start."""
    _enter_modes()
    start = threading.Thread.start

    def start_with_modes(thread: threading.Thread) -> None:
        run = thread.run

        def run_with_modes() -> None:
            _enter_modes()
            run()

        thread.run = run_with_modes
        start(thread)

    threading.Thread.start = start_with_modes
