"""A step of the engine that has been started, and whose output is read when it is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..step import StepOutput
from .scheduler import ScheduledGroup


class LaunchedStep:
    """What a step computes for its groups.

    On a GPU the chosen tokens are copied to the host behind the step, without waiting for either.

    Args:
        output: on the device.

    Attributes:
        scheduled: the groups.
        is_read_later: after the next step has been started.
    """

    def __init__(self, scheduled: Sequence[ScheduledGroup], output: StepOutput, *, is_read_later: bool = False) -> None:
        self.scheduled, self.is_read_later = scheduled, is_read_later
        self._rows = output.rows
        self._tokens = output.tokens
        self._event: torch.cuda.Event | None = None
        if output.tokens.device.type == "cuda" and len(output.tokens):
            self._tokens = output.tokens.to("cpu", non_blocking=True)  # in pinned memory
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[list[Tensor]]:
        """For each group, each of its sequences' outputs on the CPU (`SequenceGroup.process_outputs`)."""
        if self._event is not None:
            self._event.synchronize()
        rows = self._rows.cpu() if len(self._rows) else self._rows
        outputs: list[list[Tensor]] = []
        next_token = next_row = 0
        for _, sequences, _ in self.scheduled:
            mine = []
            for sequence in sequences:
                count = sequence.num_logits
                if sequence.sampling is not None:
                    mine.append(self._tokens[next_token : next_token + count])
                    next_token += count
                else:
                    mine.append(rows[next_row : next_row + count])
                    next_row += count
            outputs.append(mine)
        return outputs
