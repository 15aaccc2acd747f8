"""A full disk is called that, whatever torch makes of the system's error, and half a checkpoint is removed."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opt_megatron.errors import UserError
from opt_megatron.training.checkpointing.async_save import removed_on_failure


class FullDisk(io.BytesIO):
    """A file on a disk that has room for 4 kB more."""

    def write(self, data: object) -> int:  # type: ignore[override]
        if self.tell() > 4096:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda tensor: torch.save(tensor, FullDisk()), "cannot be written: No space left on device"),
        (lambda tensor: torch.save(tensor, "/dev/full"), "cannot be written, with [0-9,]+ bytes free on the disk"),
    ],
)
def test_a_full_disk_is_called_that(tmp_path: Path, save: Callable[[torch.Tensor], None], message: str) -> None:
    partial = tmp_path / ".iter_0000004.partial"
    partial.mkdir()
    with pytest.raises(UserError, match=message), removed_on_failure(partial):
        save(torch.zeros(10_000))
    assert not partial.exists()
