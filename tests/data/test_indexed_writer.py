"""The pair of files is written by one process at a time, with ids as small as the vocabulary allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from opt_megatron.data.document_encoder import EncodedChunk
from opt_megatron.data.indexed_writer import IndexedWriter
from opt_megatron.errors import UserError


def documents(prefix: str) -> list[list[int]]:
    """What megatron-core reads from the files."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(prefix)
    assert data.document_indices.tolist() == list(range(len(data) + 1))
    return [data[n].tolist() for n in range(len(data))]


def test_two_runs_do_not_write_the_same_files(tmp_path: Path) -> None:
    with (
        IndexedWriter(str(tmp_path / "p"), 4096, force=False),
        pytest.raises(UserError, match="another process is writing it just now"),
        IndexedWriter(str(tmp_path / "p"), 4096, force=False),
    ):
        pass


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    with IndexedWriter(str(tmp_path / "small"), 65_499, force=False) as small:
        assert small.dtype == "uint16"
    with IndexedWriter(str(tmp_path / "large"), 65_500, force=False) as large:
        assert large.dtype == "int32"
        large.add(EncodedChunk(np.array([1, 70_000, 3], large.dtype), [2, 1], 0, []))
        large.publish()
    assert documents(str(tmp_path / "large")) == [[1, 70_000], [3]]
