"""A run's checkpoints as directories: one is written under its partial name and renamed when it is whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.formats.megatron_ranks import TRACKER, iteration_name
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
from ...parallel.context import ParallelContext
from .integrity import MANIFEST_FILE, manifest_entry, saved_checkpoints


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


class RunCheckpoints:
    """Creates, publishes and removes the directories of one run's checkpoints; the leader does it.

    Args:
        directory: the run's directory (SAVE); created by the first save.
        keep: keep this many of the newest checkpoints; 0 keeps all.
        companions: files to put beside the weights (config and tokenizer), name -> bytes.
    """

    def __init__(self, directory: Path, parallel: ParallelContext, *, keep: int, companions: dict[str, bytes]) -> None:
        self.directory = directory
        self._parallel, self._keep, self._companions = parallel, keep, companions

    def _partial_path(self, iteration: int) -> Path:
        return partial_path(self.directory / iteration_name(iteration))

    def _create_partial(self, partial: Path, files: dict[str, bytes] | None = None) -> None:
        """Create the directory, with the companions and other files, name -> bytes."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            claim_directory(partial)
            for name, content in (self._companions | (files or {})).items():
                (partial / name).write_bytes(content)
        except OSError as error:
            raise cannot_write(self.directory, error) from None

    def remove_unfinished(self) -> None:
        """Remove the directories that a killed run left behind while it was writing them."""
        for path in self.directory.glob(".iter_*.partial") if self._parallel.is_leader else ():
            recover_directory(path.with_name(path.name[1:].removesuffix(".partial")))
            if is_claimed(path):
                shutil.rmtree(path, ignore_errors=True)

    def _publish(self, partial: Path, iteration: int, manifest: dict[str, tuple[int, str]]) -> None:
        """Give a whole directory its name, and its manifest the files that are not in it yet."""
        target = self.directory / iteration_name(iteration)
        try:
            for path in sorted(partial.iterdir()):
                if path.name not in manifest and path.name != JOURNAL:
                    manifest[path.name] = manifest_entry(path)
            write_text_atomically(partial / MANIFEST_FILE, json.dumps(manifest, indent=1), fsync=True)
            # A directory of this name is left from a run that has been resumed from an earlier step.
            publish_directory(partial, target, replace=True, fsync=True)
            write_text_atomically(self.directory / TRACKER, str(iteration), fsync=True)
        except OSError as error:
            raise cannot_write(target, error) from None
        self._remove_old(iteration)

    def _remove_old(self, newest: int) -> None:
        if self._keep:
            older = [path for iteration, path in saved_checkpoints(self.directory) if iteration <= newest]
            for path in older[self._keep :]:
                shutil.rmtree(path, ignore_errors=True)
