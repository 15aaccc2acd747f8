"""Saving and resuming a run, complete or not at all.

A checkpoint is written under its partial name and renamed once every rank has flushed its files: a directory with
the final name is complete. Tensors are copied and then written by a thread while training continues; `finish`, at a
later step, does the rest when all ranks are ready. Before a checkpoint is read, its manifest is verified, and an
older one is used if it is damaged (`integrity.py`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint.formats.megatron_ranks import TRACKER, iteration_name
from ...errors import CheckpointError
from ...files import (
    cannot_write,
    claim_directory,
    is_claimed,
    partial_path,
    publish_directory,
    recover_directory,
    write_text_atomically,
)
from ...files.claimed_directory import JOURNAL
from ...parallel.context import ParallelContext, on_all_ranks
from ...parallel.core_compat import own_async_writer, prepare_training
from ..optimizer import TrainingOptimizer
from .async_save import AsyncSave, removed_on_failure, thread_save_strategy
from .integrity import MANIFEST_FILE, manifest_entry, saved_checkpoints
from .sharded_state import has_old_names, layout_of, restore_random_state, sharded_state

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


@dataclass
class TrainingState:
    """What a checkpoint contains besides parameters and optimizer.

    Attributes:
        iteration: steps made.
        consumed_samples: sequences that these steps have taken, on all ranks.
        skipped: steps among them that were not applied.
        run: the options that must not change when the run is resumed (model, data, batch sizes).
    """

    iteration: int = 0
    consumed_samples: int = 0
    skipped: int = 0
    run: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Values for the checkpoint's common part."""
        return {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "skipped": self.skipped,
            "run": json.dumps(self.run or {}),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingState:
        """The state that `to_dict` gave."""
        numbers = {name: int(values[name]) for name in ("iteration", "consumed_samples", "skipped")}
        return cls(**numbers, run=json.loads(values["run"]))


class CheckpointManager:
    """Writes and reads the checkpoints of one run. Every rank has one, and all call the same methods.

    Args:
        directory: the run's directory (SAVE); created by the first save.
        keep: keep this many of the newest checkpoints; 0 keeps all.
        companions: files to put beside the weights (config and tokenizer), name -> bytes.
        background: write while training continues.
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
        self._pending: AsyncSave | None = None

    def save(self, model: MegatronModule, optimizer: TrainingOptimizer, state: TrainingState) -> None:
        """Start to write a checkpoint, after finishing the one before if it is still being written. Collective.

        Raises (here or in `finish`):
            UserError: the directory cannot be written.
        """
        from megatron.core import dist_checkpointing

        self.finish()
        partial = partial_path(self.directory / iteration_name(state.iteration))
        on_all_ranks(self._parallel, lambda: self._create_partial(partial) if self._parallel.is_leader else None)
        with removed_on_failure(partial):
            request = dist_checkpointing.save(
                sharded_state(model, optimizer, self._parallel, is_loading=False)
                | {"training": state.to_dict(), "layout": layout_of(self._parallel)},
                str(partial),
                sharded_strategy=thread_save_strategy(self._background),
                async_sharded_save=True,
                **own_async_writer(),
            )
        self._pending = AsyncSave(request, partial, state.iteration)
        if not self._background:
            self.finish()

    def _create_partial(self, partial: Path) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            claim_directory(partial)
            for name, content in self._companions.items():
                (partial / name).write_bytes(content)
        except OSError as error:
            raise cannot_write(self.directory, error) from None

    def remove_unfinished(self) -> None:
        """Remove the directories that a killed run left behind while it was writing them."""
        for path in self.directory.glob(".iter_*.partial") if self._parallel.is_leader else ():
            recover_directory(path.with_name(path.name[1:].removesuffix(".partial")))
            if is_claimed(path):
                shutil.rmtree(path, ignore_errors=True)

    @property
    def is_ready_here(self) -> bool:
        """Whether this rank has written its files, or has none to write."""
        return self._pending is None or self._pending.is_done

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint has been started and not been finished."""
        return self._pending is not None

    def finish(self) -> int | None:
        """Wait for the checkpoint that is being written and publish it; returns its iteration (None: there is none).

        Collective. It does not block once all ranks are `is_ready_here`.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        on_all_ranks(self._parallel, pending.wait)
        pending.finalize()
        manifest: dict[str, tuple[int, str]] = {}
        for entries in self._parallel.gather_objects(pending.manifest_entries(self._parallel.rank)):
            manifest |= entries
        on_all_ranks(self._parallel, lambda: self._publish(pending, manifest) if self._parallel.is_leader else None)
        return pending.iteration

    def _publish(self, pending: AsyncSave, manifest: dict[str, tuple[int, str]]) -> None:
        target, partial = self.directory / iteration_name(pending.iteration), pending.partial
        try:
            for path in sorted(partial.iterdir()):
                if path.name not in manifest and path.name != JOURNAL:
                    manifest[path.name] = manifest_entry(path)
            write_text_atomically(partial / MANIFEST_FILE, json.dumps(manifest, indent=1), fsync=True)
            # A directory of this name is left from a run that has been resumed from an earlier step.
            publish_directory(partial, target, replace=True, fsync=True)
            write_text_atomically(self.directory / TRACKER, str(pending.iteration), fsync=True)
        except OSError as error:
            raise cannot_write(target, error) from None
        self._remove_old(pending.iteration)

    def _remove_old(self, newest: int) -> None:
        if self._keep:
            older = [path for iteration, path in saved_checkpoints(self.directory) if iteration <= newest]
            for path in older[self._keep :]:
                shutil.rmtree(path, ignore_errors=True)

    def read_state(self, path: Path) -> tuple[TrainingState, bool]:
        """The state of the run in a checkpoint, and whether it was written at the present layout. Collective.

        Raises:
            CheckpointError: on every rank.
        """
        from megatron.core import dist_checkpointing

        def read() -> tuple[TrainingState, bool]:
            with _as_checkpoint_errors(path):
                common = dist_checkpointing.load_common_state_dict(str(path))
                return TrainingState.from_dict(common["training"]), common["layout"] == layout_of(self._parallel)

        return on_all_ranks(self._parallel, read)

    def load(self, path: Path, model: MegatronModule, optimizer: TrainingOptimizer, *, same_layout: bool) -> None:
        """Fill model, optimizer and (at the same layout) random states from an intact checkpoint. Collective.

        Args:
            same_layout: as `read_state` returned it.

        Raises:
            CheckpointError: on every rank; the checkpoint does not fit the run.
        """
        from megatron.core import dist_checkpointing

        def read() -> dict[str, Any]:
            with _as_checkpoint_errors(path):
                wanted = sharded_state(
                    model,
                    optimizer,
                    self._parallel,
                    is_loading=True,
                    with_random_state=same_layout,
                    norms_by_old_names=has_old_names(path),
                )
                return dist_checkpointing.load(wanted, str(path))

        loaded = on_all_ranks(self._parallel, read)
        model.load_state_dict(loaded["model"], strict=True)
        optimizer.load_state_dict(loaded["optimizer"])
        if same_layout:
            restore_random_state(loaded["random_state"], self._parallel.device)


@contextlib.contextmanager
def _as_checkpoint_errors(path: Path) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is a BaseException; core raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: cannot be resumed from: {type(error).__name__}: {reason}") from error
