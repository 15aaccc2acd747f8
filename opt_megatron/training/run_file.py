"""run.yaml: the options of a run, written into its directory so that it can be repeated."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..files import open_input, write_text_atomically

RUN_FILE = "run.yaml"
HEADER = "Options of this run, written by opt-megatron train."


def check_run_file(directory: Path) -> None:
    """Raise UserError if the directory holds a run.yaml that no run has written."""
    path = directory / RUN_FILE
    if path.exists():
        with open_input(path) as file:
            if HEADER not in file.readline(1000).decode(errors="replace"):
                raise UserError(f"--save {directory}: holds a {RUN_FILE} of something else: use another directory")


def write_run_file(directory: Path, text: str) -> None:
    """Write it, or replace that of an earlier part of the run.

    Raises:
        UserError: it cannot be written.
    """
    write_text_atomically(directory / RUN_FILE, text)
