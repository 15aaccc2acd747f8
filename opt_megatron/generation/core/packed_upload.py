"""Numbers on their way from the host to a device: all that a step needs at a time, in one transfer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(device: torch.device, *lists: Sequence[int]) -> tuple[Tensor, ...]:
    """Each list as a tensor [numbers] int64 on the device; a GPU fetches them without keeping the host waiting."""
    packed = torch.tensor([number for numbers in lists for number in numbers], dtype=torch.int64)
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return packed.split([len(numbers) for numbers in lists])


def upload_tensor(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the host on the device, in the same way."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
