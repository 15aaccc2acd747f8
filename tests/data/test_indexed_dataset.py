"""Indexed files that are missing or damaged are refused before training starts."""

from __future__ import annotations

from pathlib import Path

from indexed_corpora import build, counting, refused, write

from opt_megatron.data.options import DataOptions
from opt_megatron.parallel.context import ParallelContext


def test_files_that_are_missing_or_damaged(tmp_path: Path, alone: ParallelContext) -> None:
    prefix = write(tmp_path / "a_text_document", counting(9, 7))
    options = DataOptions([prefix], split="1")
    assert f"did you mean {prefix}?" in refused(alone, DataOptions([str(tmp_path / "a")]))
    assert f"did you mean {prefix}?" in refused(alone, DataOptions([f"{prefix}.bin"]))
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    whole_idx, whole_bin = idx.read_bytes(), bin_.read_bytes()
    length_of_first = whole_idx[34] + 1
    for damaged, words in (
        (b"", "is no index of Megatron's format"),
        (b"XX" + whole_idx[2:], "is no index of Megatron's format"),
        (whole_idx[:9] + b"\2" + whole_idx[10:], "version 2 "),
        (whole_idx[:17] + b"\7" + whole_idx[18:], "dtype code 7 "),
        (whole_idx[:-8], "it is damaged"),
        (whole_idx[:34] + bytes([length_of_first]) + whole_idx[35:], "contradict each other"),
        (whole_idx[:-8] + b"\1" + whole_idx[-7:], "last document does not end"),
    ):
        idx.write_bytes(damaged)
        assert words in refused(alone, options)
    idx.write_bytes(whole_idx)
    bin_.write_bytes(whole_bin[:-2])
    assert "has 124 bytes, but its index says 126" in refused(alone, options)
    bin_.write_bytes(whole_bin)
    build(alone, options)
    bin_.unlink()
    assert "a_text_document.bin: there is no such file" in refused(alone, options)
