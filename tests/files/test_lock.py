"""A lock excludes other processes until the block ends, on files and on directories that are renamed."""

from __future__ import annotations

from pathlib import Path

import pytest

from opt_megatron.errors import UserError
from opt_megatron.files import file_lock


@pytest.mark.parametrize("is_directory", [True, False])
def test_a_lock_is_exclusive_survives_a_rename_and_is_released(tmp_path: Path, is_directory: bool) -> None:
    path = tmp_path / "x"
    if is_directory:
        path.mkdir()
    with file_lock(path, "somebody writes x"):
        for name in ("x", "y"):
            path = path.rename(tmp_path / name)
            with pytest.raises(UserError, match="somebody writes x"), file_lock(path, "somebody writes x"):
                pass
    with file_lock(path, "somebody writes x"):
        pass
