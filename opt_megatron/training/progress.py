"""What a run says while it runs: a line for people, metrics.jsonl for programs, TensorBoard for both."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from ..errors import UserError
from ..files import write_text_atomically

METRICS_FILE = "metrics.jsonl"


class Progress:
    """Writes what the leader is told; other ranks have none.

    Args:
        directory: of metrics.jsonl, which is continued at `iteration` when a run is resumed: lines of later steps,
            of a run that was killed after its last checkpoint, are dropped.
        tensorboard: directory for TensorBoard's events.
        stream: for the lines; default stderr.

    Raises:
        UserError: TensorBoard is wanted and not installed.
    """

    def __init__(
        self, directory: Path | None, tensorboard: Path | None, iteration: int = 0, stream: TextIO | None = None
    ) -> None:
        self._stream = stream or sys.stderr
        self._board = _open_board(tensorboard, iteration) if tensorboard else None
        self._file = _continue_metrics(directory / METRICS_FILE, iteration) if directory else None
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """One line for people."""
        print(text, file=self._stream, flush=True)

    def record(self, kind: str, iteration: int, values: dict[str, Any]) -> None:
        """One entry for programs. `kind` is "train" or "valid"."""
        clean = {name: value if _is_finite(value) else str(value) for name, value in values.items()}
        if self._file:
            self._file.write(json.dumps({"kind": kind, "iteration": iteration, **clean}) + "\n")
            self._file.flush()
        if self._board:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(f"{kind}/{name}", value, iteration)
            self._board.flush()

    def close(self) -> None:
        """Flush and close the files."""
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()


def training_line(iteration: int, last: int, values: dict[str, Any], seconds_left: float) -> str:
    """The progress line of a step."""
    return (
        f"iteration {iteration:>{len(str(last))}}/{last} | loss {values['loss']:.4f} | "
        f"perplexity {perplexity(values['loss']):.2f} | lr {values['lr']:.3e} | grad norm {values['grad_norm']:.3f} | "
        f"{values['tokens_per_second']:,.0f} tokens/s | {values['tflops_per_rank']:.3f} TFLOP/s a rank | "
        f"{duration(seconds_left)} left"
    )


def perplexity(loss: float) -> float:
    """e ** loss (nats), infinity where that is no number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def duration(seconds: float) -> str:
    """hours:minutes:seconds"""
    whole = int(seconds) if math.isfinite(seconds) else 0
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)  # JSON has no NaN


def _continue_metrics(path: Path, iteration: int) -> TextIO:
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["iteration"] <= iteration:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # half a line, of a run that was killed while writing it
                continue
    write_text_atomically(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def _open_board(directory: Path, iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard-dir needs the package tensorboard: pip install -e '.[train]'") from None
    return SummaryWriter(str(directory), purge_step=iteration + 1)
