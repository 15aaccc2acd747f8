"""Reading PyTorch's pickled files without running anything that they contain.

`weights_only=True` rebuilds tensors and plain containers; `argparse.Namespace`, which Megatron-LM's files
hold, is allowed by name. The tensors are mapped from the file and read when they are touched.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError


def load_mapped(path: Path) -> Any:
    """The object in a file that torch.save wrote, its tensors mapped and not yet read.

    Raises:
        CheckpointError: the file is damaged, is of the format before torch 1.6 (which cannot be mapped), or
            holds something other than tensors, containers and namespaces.
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: is truncated, or not a file that torch.save wrote in the format of torch 1.6 or later"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # unpickling a damaged or hostile file can raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read safely as tensors: {reason[:200]}") from None
