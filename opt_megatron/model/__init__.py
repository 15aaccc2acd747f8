"""OPT as Megatron-core specs: `opt_model.build_model(config, parallel, dtype)` gives this rank's part."""

from ..parallel.core_warnings import silence_core

silence_core()  # before a module of this package imports Megatron-core
