"""Writing a checkpoint in a thread of each rank, while training continues."""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ...files import cannot_write
from .integrity import manifest_entry


class AsyncSave:
    """A checkpoint that a thread of this rank is writing.

    Args:
        request: megatron-core's AsyncRequest for this rank's files.
        partial: the directory to write to.
    """

    def __init__(self, request: Any, partial: Path, iteration: int) -> None:
        self.partial, self.iteration = partial, iteration
        self._request = request
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=False)
        self._thread.start()

    def _write(self) -> None:
        try:
            if self._request.async_fn is not None:
                self._request.async_fn(*self._request.async_fn_args)
        except BaseException as error:  # raised in the main thread, by `wait`
            self._error = error

    @property
    def is_done(self) -> bool:
        """Whether this rank's files are written, or writing them has failed."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until this rank's files are written.

        Raises:
            UserError: writing has failed; the directory is removed.
        """
        self._thread.join()
        with removed_on_failure(self.partial):
            if self._error is not None:
                raise self._error

    def finalize(self) -> None:
        """Write megatron-core's metadata files. Collective, after all ranks have written theirs.

        Raises:
            UserError: writing has failed; the directory is removed.
        """
        with removed_on_failure(self.partial):
            for function in self._request.finalize_fns:
                function()

    def manifest_entries(self, rank: int) -> dict[str, tuple[int, str]]:
        """Size and hash of the files that this rank has written."""
        return {path.name: manifest_entry(path) for path in self.partial.glob(f"__{rank}_*.distcp")}


@contextlib.contextmanager
def removed_on_failure(partial: Path) -> Iterator[None]:
    """A block in which torch writes files into a checkpoint's directory.

    torch reports a full disk as an inconsistency of its archive, raised while it handles the operating system's error;
    where it writes a file by its name, it does not have that error either.

    Raises:
        UserError: an error in the block; the directory is removed.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        free = shutil.disk_usage(partial.parent).free
        shutil.rmtree(partial, ignore_errors=True)
        if cause is not None:
            raise cannot_write(partial.parent, cause) from error
        if "inline_container" not in str(error):
            raise
        raise UserError(f"{partial.parent}: cannot be written, with {free:,} bytes free on the disk") from error


def thread_save_strategy(background: bool) -> Any:
    """megatron-core's strategy for torch_dist, writing in this process; core's own forks a process for each file.

    Args:
        background: copy the tensors first, since training continues to change them.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    def write(transforms: list[Any], buckets: list[Any], results: queue.Queue[Any]) -> None:
        counts: queue.Queue[int] = queue.Queue()
        bucket_results: queue.Queue[tuple[int, Any]] = queue.Queue()
        written = {}
        for number, bucket in enumerate(buckets):
            counts.put(number)
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, bucket_results, counts, True)
            _, result = bucket_results.get()
            if isinstance(result, Exception):
                raise result
            written[number] = result
        results.put(written)

    class ThreadSaveStrategy(TorchDistSaveShardedStrategy):
        def _get_save_and_finalize_callbacks(self, writer: Any, *save_plan: Any) -> Any:
            request = super()._get_save_and_finalize_callbacks(writer, *save_plan)
            if request.async_fn is None:
                return request
            transforms = [writer.transforms] if hasattr(writer, "transforms") else []
            # Staged now: tensors of a GPU are copied to the host, and in the background those of a CPU are copied, too.
            buckets = writer.preload_tensors(writer.write_buckets, False)
            if background:
                buckets = [(path, key, (data, _copied(tensors))) for path, key, (data, tensors) in buckets]
            arguments = (transforms, buckets, writer.results_queue)
            return request._replace(async_fn=write, async_fn_args=arguments, preload_fn=None)

    return ThreadSaveStrategy("torch_dist", 1, thread_count=1)


def _copied(tensors: list[tuple[Any, torch.Tensor]]) -> list[tuple[Any, torch.Tensor]]:
    return [(item, tensor.clone()) for item, tensor in tensors]
