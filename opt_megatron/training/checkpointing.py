"""Saving and resuming with megatron-core's dist_checkpointing (torch_dist), whole or not at all.

    SAVE/iter_0000200/     .metadata  __0_0.distcp ...  common.pt  metadata.json    core's
                           config.json  vocab.json ...                             so that `--load` reads it
                           manifest.json                                           size and hash of every file
    SAVE/latest_checkpointed_iteration.txt                                         as in Megatron-LM, for people
    SAVE/.iter_0000300.partial/                                                    being written

A checkpoint is written under its partial name and renamed once every rank has flushed its files: what has the
final name is complete. Tensors are copied and written by a thread while training goes on; `finish`, at a following
step, does the rest when all ranks are ready. Reading verifies the manifest first, and falls back to the
newest checkpoint that is whole.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.formats.torch_dist import INDEX_FILE
from ..errors import CheckpointError, UserError
from ..files import cannot_write, partial_path, replace_directory, write_text_atomically
from ..parallel.context import ParallelContext, on_all_ranks
from ..parallel.core_compat import own_async_writer, prepare_training
from .optimizer import TrainingOptimizer
from .saved import MANIFEST_FILE, file_entry, saved_checkpoints

LATEST_FILE = "latest_checkpointed_iteration.txt"


@dataclass
class TrainingState:
    """What a checkpoint holds beside parameters and optimizer.

    Attributes:
        iteration: steps made. consumed_samples: sequences of all ranks they took.
        skipped: steps among them that were not applied.
        run: of the settings, those that must not change or that others need to know (model, data, objective).
    """

    iteration: int = 0
    consumed_samples: int = 0
    skipped: int = 0
    run: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the checkpoint's common part."""
        return {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "skipped": self.skipped,
            "run": json.dumps(self.run or {}),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingState:
        """From one."""
        numbers = {name: int(values[name]) for name in ("iteration", "consumed_samples", "skipped")}
        return cls(**numbers, run=json.loads(values["run"]))


class Checkpoints:
    """The checkpoints of one run in one directory. Every rank has one and calls the same methods.

    Args:
        directory: SAVE above; made when something is saved.
        keep: so many of the newest are kept, 0 keeps all.
        companions: files to put beside the weights (config and tokenizer), name -> bytes.
        background: write while training goes on.
    """

    def __init__(
        self,
        directory: Path,
        parallel: ParallelContext,
        *,
        keep: int = 0,
        companions: dict[str, bytes] | None = None,
        background: bool = True,
    ) -> None:
        prepare_training(parallel.device)
        self.directory = directory
        self._parallel, self._keep, self._background = parallel, keep, background
        self._companions = companions or {}
        self._writing: _Writing | None = None

    def save(self, model: nn.Module, optimizer: TrainingOptimizer, state: TrainingState) -> None:
        """Begin to write, after finishing the former checkpoint if it is still being written.

        Raises (here or in `finish`):
            UserError: the directory cannot be written.
        """
        from megatron.core import dist_checkpointing

        self.finish()
        partial = partial_path(self.directory / _name_of(state.iteration))
        on_all_ranks(self._parallel, lambda: self._make_partial(partial) if self._parallel.is_leader else None)
        request = dist_checkpointing.save(
            _sharded_state(model, optimizer, self._parallel, is_loading=False)
            | {"training": state.as_dict(), "layout": _layout(self._parallel)},
            str(partial),
            sharded_strategy=_threaded_strategy(self._background),
            async_sharded_save=True,
            **own_async_writer(),
        )
        self._writing = _Writing(request, partial, state.iteration)
        if not self._background:
            self.finish()

    def _make_partial(self, partial: Path) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for name, content in self._companions.items():
                (partial / name).write_bytes(content)
        except OSError as error:
            raise cannot_write(self.directory, error) from None

    def remove_unfinished(self) -> None:
        """Remove what a run that was killed had begun to write."""
        for path in self.directory.glob(".iter_*") if self._parallel.is_leader else ():
            shutil.rmtree(path, ignore_errors=True)

    @property
    def is_ready_here(self) -> bool:
        """This rank has nothing left to write, or has written it."""
        return self._writing is None or self._writing.is_done

    @property
    def is_writing(self) -> bool:
        """A checkpoint has been begun and not been finished."""
        return self._writing is not None

    def finish(self) -> int | None:
        """Wait for the checkpoint that is being written and give it its name; returns its iteration.

        Collective: call it on every rank, at once when all are `is_ready_here`.
        """
        if self._writing is None:
            return None
        writing, self._writing = self._writing, None
        on_all_ranks(self._parallel, writing.wait)
        writing.finalize()
        entries = self._parallel.gather_objects(writing.hashes(self._parallel.rank))
        merged = {name: entry for entry in entries for name, entry in (entry or {}).items()}
        on_all_ranks(self._parallel, lambda: self._publish(writing, merged) if self._parallel.is_leader else None)
        return writing.iteration

    def _publish(self, writing: _Writing, entries: dict[str, Any]) -> None:
        target = self.directory / _name_of(writing.iteration)
        try:
            write_text_atomically(writing.partial / INDEX_FILE, json.dumps(_index_of(writing.partial)), fsync=True)
            for path in sorted(writing.partial.iterdir()):
                if path.name not in entries:
                    entries[path.name] = file_entry(path)
            write_text_atomically(writing.partial / MANIFEST_FILE, json.dumps(entries, indent=1), fsync=True)
            # An older directory of this name belongs to a run that was resumed from an earlier step.
            replace_directory(writing.partial, target, fsync=True)
            write_text_atomically(self.directory / LATEST_FILE, str(writing.iteration), fsync=True)
        except OSError as error:
            raise cannot_write(target, error) from None
        self._forget_old(writing.iteration)

    def _forget_old(self, newest: int) -> None:
        if self._keep:
            older = [path for iteration, path in saved_checkpoints(self.directory) if iteration <= newest]
            for path in older[self._keep :]:
                shutil.rmtree(path, ignore_errors=True)

    def read_state(self, path: Path) -> tuple[TrainingState, bool]:
        """What a checkpoint says of its run, and whether it was written at this layout.

        Raises:
            CheckpointError: on every rank.
        """
        from megatron.core import dist_checkpointing

        def read() -> tuple[TrainingState, bool]:
            with _told_as_checkpoint_errors(path):
                common = dist_checkpointing.load_common_state_dict(str(path))
                return TrainingState.from_dict(common["training"]), common["layout"] == _layout(self._parallel)

        return on_all_ranks(self._parallel, read)

    def load(self, path: Path, model: nn.Module, optimizer: TrainingOptimizer, *, same_layout: bool) -> None:
        """Fill model, optimizer and (at the same layout) random states from a checkpoint that `newest_whole` gave.

        Args:
            same_layout: what `read_state` has said.

        Raises:
            CheckpointError: on every rank; the checkpoint does not fit the run.
        """
        from megatron.core import dist_checkpointing

        def read() -> dict[str, Any]:
            with _told_as_checkpoint_errors(path):
                wanted = _sharded_state(
                    model, optimizer, self._parallel, is_loading=True, with_random_state=same_layout
                )
                return dist_checkpointing.load(wanted, str(path))

        loaded = on_all_ranks(self._parallel, read)
        model.load_state_dict(loaded["model"], strict=True)
        optimizer.load_state_dict(loaded["optimizer"])
        if same_layout:
            _restore_random_state(loaded["random_state"])


@contextlib.contextmanager
def _told_as_checkpoint_errors(path: Path) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is a BaseException; core raises many kinds
        told = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: cannot be resumed from: {type(error).__name__}: {told}") from error


class _Writing:
    """A checkpoint that a thread of this rank is writing."""

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
        except BaseException as error:  # told to the main thread, in `wait`
            self._error = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until this rank's files are written."""
        self._thread.join()
        if self._error is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise UserError(f"{self.partial.parent}: the checkpoint could not be written: {self._error}")

    def finalize(self) -> None:
        """core's part after all ranks have written: the metadata files."""
        for function in self._request.finalize_fns:
            function()

    def hashes(self, rank: int) -> dict[str, tuple[int, str]]:
        """Size and hash of the files that this rank has written."""
        return {path.name: file_entry(path) for path in self.partial.glob(f"__{rank}_*.distcp")}


def _threaded_strategy(background: bool) -> Any:
    """core's strategy for torch_dist, writing in this process: core would fork one process for each file."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    def write(transforms: list[Any], buckets: list[Any], results: queue.Queue) -> None:
        counts, answers = queue.Queue(), queue.Queue()
        gathered = {}
        for number, bucket in enumerate(buckets):
            counts.put(number)
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, answers, counts, True)
            _, answer = answers.get()
            if isinstance(answer, Exception):
                raise answer
            gathered[number] = answer
        results.put(gathered)

    class Threaded(TorchDistSaveShardedStrategy):
        def _get_save_and_finalize_callbacks(self, writer: Any, *planned: Any) -> Any:
            request = super()._get_save_and_finalize_callbacks(writer, *planned)
            if request.async_fn is None:
                return request
            transforms = [writer.transforms] if hasattr(writer, "transforms") else []
            # Staged now: a GPU's tensors are copied to the host, and a CPU's too when training goes on changing them.
            buckets = writer.preload_tensors(writer.write_buckets, False)
            if background:
                buckets = [(path, key, (data, _copied(tensors))) for path, key, (data, tensors) in buckets]
            arguments = (transforms, buckets, writer.results_queue)
            return request._replace(async_fn=write, async_fn_args=arguments, preload_fn=None)

    return Threaded("torch_dist", 1, thread_count=1)


def _copied(tensors: list[tuple[Any, torch.Tensor]]) -> list[tuple[Any, torch.Tensor]]:
    return [(item, tensor.clone()) for item, tensor in tensors]


def _sharded_state(
    model: nn.Module,
    optimizer: TrainingOptimizer,
    parallel: ParallelContext,
    *,
    is_loading: bool,
    with_random_state: bool = True,
) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    model_state = model.sharded_state_dict()
    optimizer_state = optimizer.sharded_state_dict(model_state, is_loading=is_loading)
    sharded = {"model": model_state, "optimizer": optimizer_state}
    if with_random_state:
        place = (
            parallel.pipeline_model_parallel_rank,
            parallel.tensor_model_parallel_rank,
            parallel.data_parallel_rank,
        )
        sharded["random_state"] = ShardedObject("random_state", _random_state(), _layout(parallel), place)
    return sharded


def _index_of(path: Path) -> dict[str, Any]:
    """Where each shard of each of the model's tensors is (read by checkpoint/formats/torch_dist.py)."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(path).read_metadata()  # which this process has just written
    where = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
    index: dict[str, Any] = {}
    for name, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata) or name.startswith("optimizer."):
            continue
        chunks = []
        for chunk in tensor.chunks:
            place = where[name, tuple(chunk.offsets)]
            chunks.append(
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    "file": place.relative_path,
                    "start": place.offset,
                    "length": place.length,
                }
            )
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        index[name] = {"shape": list(tensor.size), "dtype": dtype, "chunks": chunks}
    return index


def _layout(parallel: ParallelContext) -> tuple[int, int, int]:
    return (
        parallel.pipeline_model_parallel_size,
        parallel.tensor_model_parallel_size,
        parallel.data_parallel_size,
    )


def _random_state() -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _name_of(iteration: int) -> str:
    return f"iter_{iteration:07d}"
