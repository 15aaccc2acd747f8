"""Training: setup of data, model and optimizer, the loop, metrics, saving and resuming."""

from ..parallel.core_warnings import silence_core

silence_core()  # before a module of this package imports Megatron-core
