"""The patches of Megatron-core: made for a CPU, undone for a GPU, and never made in torch itself."""

import torch
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as core_random

from opt_megatron.parallel.context import init_parallel
from opt_megatron.parallel.core_compat import prepare_megatron


def test_core_computes_on_the_chosen_device():
    of_torch = torch.cuda.current_device, torch.cuda.synchronize, torch.zeros
    prepare_megatron(torch.device("cuda", 0))
    assert mappings.torch is torch
    assert type(core_random._CUDA_RNG_STATE_TRACKER) in (type(None), core_random.CudaRNGStatesTracker)
    init_parallel(device="cpu")
    assert mappings.torch is not torch and mappings.torch.Tensor is torch.Tensor
    assert mappings.torch.cuda.current_device() == torch.device("cpu") and not mappings.torch.cuda.is_available()
    assert mappings.torch.zeros(2, device="cuda").device == torch.device("cpu")
    assert core_random.get_cuda_rng_tracker().is_initialized()
    assert of_torch == (torch.cuda.current_device, torch.cuda.synchronize, torch.zeros)
