"""The checkpoints of a MeZO run: the name of what it began with and the log of its steps, a few files of some bytes a
step, which the leader writes at once."""

from __future__ import annotations

from pathlib import Path

from ...checkpoint.mezo.run_files import RUN_FILE, MezoRun, read_run, run_files
from ...checkpoint.mezo.steps import MezoStep
from ...errors import CheckpointError
from ...parallel.context import ParallelContext, on_all_ranks
from .run_checkpoints import RunCheckpoints, TrainingState


class MezoCheckpoints(RunCheckpoints):
    """Writes and reads the checkpoints of one run. Every rank has one, and all call the same methods.

    Args:
        run: what the steps are repeated from.
        directory, keep, companions: as for RunCheckpoints.
    """

    is_ready_here = True  # nothing is written in the background

    def __init__(
        self, run: MezoRun, directory: Path, parallel: ParallelContext, *, keep: int, companions: dict[str, bytes]
    ) -> None:
        super().__init__(directory, parallel, keep=keep, companions=companions)
        self._run = run
        self._published: int | None = None

    @property
    def is_writing(self) -> bool:
        """Whether `finish` has something to report."""
        return self._published is not None

    def save(self, steps: list[MezoStep], state: TrainingState) -> None:
        """Write a checkpoint. Collective.

        Raises:
            UserError: on every rank; the directory cannot be written.
        """
        partial, files = self._partial_path(state.iteration), run_files(self._run, steps, state.to_dict())

        def write() -> None:
            self._create_partial(partial, files)
            self._publish(partial, state.iteration, {})

        on_all_ranks(self._parallel, write if self._parallel.is_leader else lambda: None)
        self._published = state.iteration

    def finish(self) -> int | None:
        """The iteration of the checkpoint that has been written since the last call."""
        published, self._published = self._published, None
        return published

    def read(self, path: Path) -> tuple[TrainingState, list[MezoStep]]:
        """The state of the run in an intact checkpoint, and its steps. Collective.

        Raises:
            CheckpointError: on every rank; it does not belong to this run.
        """

        def read() -> tuple[TrainingState, list[MezoStep]]:
            run, steps, training = read_run(path)
            if run.base_digest != self._run.base_digest or run.epsilon != self._run.epsilon:
                raise CheckpointError(
                    f"{path}: belongs to a run from other weights, or with another --mezo-epsilon "
                    f"({run.base}, {run.epsilon:g}): use the same, or another --save"
                )
            return TrainingState.from_dict(training), steps

        return on_all_ranks(self._parallel, read)


def is_mezo_checkpoint(path: Path) -> bool:
    """Whether a run's checkpoint is one of MeZO."""
    return (path / RUN_FILE).is_file()
