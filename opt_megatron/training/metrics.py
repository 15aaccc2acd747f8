"""What a run reports: progress lines on the terminal, metrics.jsonl, and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..config import OPTConfig
from ..data.jsonl import parse_object
from ..errors import MissingPackageError, printable
from ..files import cannot_write, read_bounded, write_text_atomically

METRICS_FILE = "metrics.jsonl"
_MOST_BYTES = 2**30  # a line takes about 250 bytes


class MetricsLogger:
    """Writes the metrics of a run; the leader has one, the other ranks have none.

    Args:
        directory: of metrics.jsonl, which is continued at `iteration` when a run is resumed: lines of later steps,
            of a run that was killed after its last checkpoint, are dropped.
        tensorboard: directory for TensorBoard's events.
        stream: for the lines; default: stderr.

    Raises:
        UserError: TensorBoard is asked for and not installed, or metrics.jsonl cannot be written.
    """

    def __init__(
        self, directory: Path | None, tensorboard: Path | None, iteration: int = 0, stream: TextIO | None = None
    ) -> None:
        self._stream = stream or sys.stderr
        self._board = _open_board(tensorboard, iteration) if tensorboard else None
        self._file = _continue_metrics(directory / METRICS_FILE, iteration) if directory else None

    def print_line(self, text: str) -> None:
        """Print one line, on stderr unless another stream was given."""
        print(printable(text), file=self._stream, flush=True)

    def record(self, kind: str, iteration: int, values: dict[str, Any]) -> None:
        """Write one entry to metrics.jsonl and TensorBoard.

        Args:
            kind: "train" or "valid".
            values: numbers by name; those that JSON cannot hold are written as strings.

        Raises:
            UserError: the disk is full, or metrics.jsonl cannot be written for another reason.
        """
        clean = {name: value if _is_finite(value) else str(value) for name, value in values.items()}
        if self._file:
            try:
                self._file.write(json.dumps({"kind": kind, "iteration": iteration, **clean}) + "\n")
                self._file.flush()
            except OSError as error:
                raise cannot_write(Path(self._file.name), error) from None
        if self._board:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(f"{kind}/{name}", value, iteration)
            self._board.flush()

    def close(self) -> None:
        """Flush and close the files."""
        for sink in (self._file, self._board):
            if sink is not None:
                with contextlib.suppress(OSError):  # `record` has flushed all, or has reported what it could not write
                    sink.close()


def read_metrics(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a metrics.jsonl that hold an entry, each with its entry.

    Other lines, such as half a line of a run that was killed while it wrote, are left out.

    Raises:
        OSError: the file cannot be read.
    """
    for line in read_bounded(path, _MOST_BYTES).decode(errors="replace").split("\n"):
        try:
            entry = parse_object(line)
        except ValueError:
            continue
        if isinstance(entry.get("iteration"), int) and "kind" in entry:
            yield line, entry


def training_line(iteration: int, last: int, values: dict[str, Any], seconds_left: float) -> str:
    """The progress line about the steps since the previous one: those of `_IN_LINES` that `values` has."""
    number = f"iteration {iteration:>{len(str(last))}}/{last}"
    return " | ".join([number, *_parts_of_line(values), f"{format_duration(seconds_left)} left"])


def validation_line(iteration: int, values: dict[str, Any]) -> str:
    """The line about a validation."""
    return f"iteration {iteration}: validation {', '.join(_parts_of_line(values))}"


_IN_LINES = {
    "loss": "loss {:.4f}",
    "perplexity": "perplexity {:.2f}",
    "accuracy": "accuracy {:.3f}",
    "lr": "lr {:.3e}",
    "grad_norm": "grad norm {:.3f}",
    "projected_gradient": "projected gradient {:+.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "tflops_per_rank": "{:.3f} TFLOP/s a rank",
}


def _parts_of_line(values: dict[str, Any]) -> list[str]:
    return [text.format(values[name]) for name, text in _IN_LINES.items() if name in values]


def perplexity_of(loss: float) -> float:
    """e ** loss (nats); infinity if it is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def format_duration(seconds: float) -> str:
    """Seconds as hours:minutes:seconds."""
    whole = int(seconds) if math.isfinite(seconds) else 0
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def flops_per_token(config: OPTConfig, seq_length: int) -> float:
    """Floating-point operations that training needs for one token, without recomputation of activations.

    72 L h^2 (1 + s / (6 h) + V / (12 L h)) for s tokens of context: Narayanan et al. 2021 (arXiv:2104.04473),
    equation 3, whose 96 counts a second forward pass. OPT's MLP is 4 h wide, as theirs.
    """
    layers, h, s, v = config.num_layers, config.hidden_size, seq_length, config.vocab_size
    return 72 * layers * h**2 * (1 + s / (6 * h) + v / (12 * layers * h))


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)  # JSON has no NaN


def _continue_metrics(path: Path, iteration: int) -> TextIO:
    kept = []
    if path.exists():
        kept = [line + "\n" for line, entry in read_metrics(path) if entry["iteration"] <= iteration]
    write_text_atomically(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def _open_board(directory: Path, iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingPackageError("tensorboard", "--tensorboard-dir", "train") from None
    return SummaryWriter(str(directory), purge_step=iteration + 1)
