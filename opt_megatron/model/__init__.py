"""OPT as Megatron-core specs: `opt_model.build_model(config, parallel, dtype)` gives this rank's part."""

from ..parallel.core_compat import prepare_megatron

prepare_megatron()  # before any module of this package imports Megatron-core
