"""Saving and resuming a run, complete or not at all.

A checkpoint is written under its partial name and renamed once every rank has flushed its files: a directory with
the final name is complete. Tensors are copied and then written by a thread while training continues; `finish`, at a
later step, does the rest when all ranks are ready. Before a checkpoint is read, its manifest is verified, and an
older one is used if it is damaged (`integrity.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ...parallel.context import ParallelContext, on_all_ranks
from ...parallel.core_compat import own_async_writer, prepare_training
from ..optimizer import TrainingOptimizer
from .async_save import AsyncSave, removed_on_failure, thread_save_strategy
from .run_checkpoints import RunCheckpoints, TrainingState
from .sharded_state import has_old_names, layout_of, restore_random_state, sharded_state

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


class CheckpointManager(RunCheckpoints):
    """Writes and reads the checkpoints of one run. Every rank has one, and all call the same methods.

    Args:
        directory, keep, companions: as for RunCheckpoints.
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
        super().__init__(directory, parallel, keep=keep, companions=companions or {})
        self._background = background
        self._pending: AsyncSave | None = None

    def save(self, model: MegatronModule, optimizer: TrainingOptimizer, state: TrainingState) -> None:
        """Start to write a checkpoint, after finishing the one before if it is still being written. Collective.

        Raises (here or in `finish`):
            UserError: the directory cannot be written.
        """
        from megatron.core import dist_checkpointing

        self.finish()
        partial = self._partial_path(state.iteration)
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
        written, iteration = pending.partial, pending.iteration
        is_leader = self._parallel.is_leader
        on_all_ranks(self._parallel, lambda: self._publish(written, iteration, manifest) if is_leader else None)
        return pending.iteration

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
