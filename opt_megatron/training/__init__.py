"""Training: data, objective, optimizer, loop, save and resume."""

from ..parallel.core_warnings import silence_core

silence_core()  # before a module of this package imports Megatron-core
