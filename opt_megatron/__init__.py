"""Run, convert, train, serve and study Meta's OPT language models on Megatron-core.

Importing this package is cheap: torch and Megatron-core are imported by the modules that use them, and `OPT`
(api.py) when it is first used.
"""

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .api import OPT

__all__ = ["__version__", "OPT"]


def __getattr__(name: str) -> Any:
    if name == "OPT":
        from .parallel.core_compat import import_core

        import_core()
        from .api import OPT

        return OPT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
