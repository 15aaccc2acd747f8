"""Run and convert Meta's OPT language models on Megatron-core.

Importing this package is cheap: torch and Megatron-core are imported by the modules that use them.
"""

from .version import __version__

__all__ = ["__version__"]
