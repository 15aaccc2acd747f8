"""Writing Megatron's indexed token files (.bin and .idx), complete or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

import numpy as np

from ..errors import UserError
from ..files import PartialDirectory, fsync_path
from .document_encoder import EncodedChunk


class IndexedWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx` with megatron-core's builder, under other names until `publish`.

    Args:
        vocab_size: decides the dtype of the ids (uint16 where they fit).
        force: replace files of this name.

    Attributes:
        dtype: name of the NumPy dtype of the ids.

    Raises:
        UserError: the files exist and `force` is not set, another process is writing them, or writing fails.
    """

    def __init__(self, prefix: str, vocab_size: int, *, force: bool) -> None:
        from ..parallel.core_compat import import_core

        self._targets = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
        for target in self._targets:
            if target.exists() and not force:
                raise UserError(f"{target}: exists already; --force replaces it")
        import_core()
        from megatron.core.datasets.indexed_dataset import DType

        self.dtype: str = DType.optimal_dtype(vocab_size).__name__
        self._partial = PartialDirectory(Path(prefix))

    def __enter__(self) -> IndexedWriter:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        with contextlib.ExitStack() as stack:
            partial = stack.enter_context(self._partial)
            self._files = [partial.path / target.name for target in self._targets]
            self._builder = IndexedDatasetBuilder(str(self._files[0]), np.dtype(self.dtype).type)
            self._stack = stack.pop_all()
        return self

    def add(self, chunk: EncodedChunk) -> None:
        """Append the documents of a chunk."""
        ends = np.cumsum(chunk.lengths, dtype=np.int64)
        for end, length in zip(ends, chunk.lengths, strict=True):
            self._builder.add_document(chunk.tokens[end - length : end], [length])

    def publish(self) -> None:
        """Write the index and rename both files to their final names, the index last."""
        self._builder.finalize(str(self._files[1]))
        for file in self._files:
            fsync_path(file)
        self._targets[1].unlink(missing_ok=True)  # the old index must not appear beside the new .bin
        for file, target in zip(self._files, self._targets, strict=True):
            file.rename(target)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # the disk is full, which `error` says; the file is removed
            self._builder.data_file.close()
        self._stack.__exit__(kind, error, trace)
