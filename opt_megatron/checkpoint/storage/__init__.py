"""Tensor storage: lazy tensors over safetensors and torch.save files, and writing the latter."""
