"""Imports of Megatron-core that are made when their names are first used. Imports neither torch nor Megatron-core.

Core imports some packages at its top whose names a forward pass asks for nothing but "is this tensor one of them?".
Within `deferred_imports`, such a `from module import Class` in core gives a `DeferredName` in place of the class, and
the module is imported when the name is first used. `sys.modules` is left alone: whoever imports the module gets the
real one.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

# What core does with a name has been read in these versions alone; others import everything at once.
_CORE_VERSIONS = ("0.16.1",)
_TENSOR = "torch.distributed.tensor"
_FSDP_CHECKPOINT = "megatron.core.transformer.fsdp_dtensor_checkpoint"
_FSDP = "megatron.core.distributed.fsdp.mcore_fsdp_adapter"
_TORCH_FSDP = "torch.distributed.fsdp"
_TENSORBOARD = "torch.utils.tensorboard"
# (module of core, module that it imports) -> the module that defines the names.
_DEFERRED = {
    # isinstance(tensor, DTensor) in norms and sums of gradients. The module brings sympy and symbolic shapes.
    ("megatron.core.utils", "torch.distributed._tensor"): _TENSOR,
    ("megatron.core.utils", "torch.distributed.tensor.placement_types"): _TENSOR,
    ("megatron.core.distributed.finalize_model_grads", "torch.distributed._tensor"): _TENSOR,
    # Fully sharded data parallelism, which this project does not offer; it needs DTensor at once.
    ("megatron.core.distributed", _FSDP): _FSDP,
    ("megatron.core.distributed.torch_fully_sharded_data_parallel", _TORCH_FSDP): _TORCH_FSDP,
    ("megatron.core.optimizer", _FSDP_CHECKPOINT): _FSDP_CHECKPOINT,
    ("megatron.core.optimizer.distrib_optimizer", _FSDP_CHECKPOINT): _FSDP_CHECKPOINT,
    # isinstance(writer, SummaryWriter) where core writes its timers; they are not used here.
    ("megatron.core.timers", _TENSORBOARD): _TENSORBOARD,
}
_deferred_modules: set[str] = set()


class DeferredName:
    """Stands for a class or function of a module that is imported when the name is called or an attribute is read.

    `isinstance(x, name)` imports nothing: as long as the module has not been imported, nothing is an instance.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._imported()(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._imported(), attribute)

    def __instancecheck__(self, instance: object) -> bool:
        return self._module in sys.modules and isinstance(instance, self._imported())

    def __subclasscheck__(self, subclass: type) -> bool:
        return self._module in sys.modules and issubclass(subclass, self._imported())

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
        return (self._imported(),)

    def _imported(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)


@contextlib.contextmanager
def deferred_imports() -> Iterator[None]:
    """Within the block, the imports of `_DEFERRED` that core's modules make are deferred; all others are untouched."""
    if version("megatron-core") not in _CORE_VERSIONS:
        yield
        return
    original = builtins.__import__

    def import_or_defer(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        module = _deferred_module(name, globals or {}, level)
        if module is None:
            return original(name, globals, locals, fromlist, level)
        _deferred_modules.add(module)
        return SimpleNamespace(**{each: DeferredName(module, each) for each in fromlist})

    builtins.__import__ = import_or_defer
    try:
        yield
    finally:
        builtins.__import__ = original


def deferred_modules() -> list[str]:
    """The modules whose import has been deferred so far."""
    return sorted(_deferred_modules)


def _deferred_module(name: str, importer: dict[str, Any], level: int) -> str | None:
    """The module that an import statement of core is about, or None if it must be imported now.

    Args:
        importer: the globals of the module with the statement.
        level: the number of dots before `name`.
    """
    if not str(importer.get("__name__")).startswith("megatron.core"):
        return None
    absolute = importlib.util.resolve_name("." * level + name, importer.get("__package__"))
    module = _DEFERRED.get((importer["__name__"], absolute))
    if module is None or module in sys.modules:
        return None
    # Core goes on without TensorBoard where it is not installed.
    return None if module == _TENSORBOARD and importlib.util.find_spec("tensorboard") is None else module
