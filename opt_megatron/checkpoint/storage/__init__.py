"""Tensor storage: lazy tensors over memory-mapped safetensors and torch.save files, and writing the latter."""
