"""Writing Megatron's indexed token files (.bin and .idx), complete or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import cannot_write, created_directory, file_lock, fsync_path, partial_path
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
        self._partial = [partial_path(target) for target in self._targets]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> IndexedWriter:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        busy = f"{self._targets[0]}: another process is writing it just now"
        with contextlib.ExitStack() as stack:
            stack.enter_context(created_directory(self._partial[0].parent))
            stack.enter_context(file_lock(self._partial[0], busy))
            self._builder = IndexedDatasetBuilder(str(self._partial[0]), np.dtype(self.dtype).type)
            self._stack = stack.pop_all()
        return self

    def add(self, chunk: EncodedChunk) -> None:
        """Append the documents of a chunk."""
        ends = np.cumsum(chunk.lengths, dtype=np.int64)
        for end, length in zip(ends, chunk.lengths, strict=True):
            self._builder.add_document(chunk.tokens[end - length : end], [length])

    def publish(self) -> None:
        """Write the index and rename both files to their final names, the index last."""
        self._builder.finalize(str(self._partial[1]))
        for partial in self._partial:
            fsync_path(partial)
        self._targets[1].unlink(missing_ok=True)  # the old index must not appear beside the new .bin
        for partial, target in zip(self._partial, self._targets, strict=True):
            partial.rename(target)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        with self._stack:
            with contextlib.suppress(OSError):  # the disk is full, which `error` says; the file is removed
                self._builder.data_file.close()
            for partial in self._partial:
                partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(self._targets[0], error) from error
