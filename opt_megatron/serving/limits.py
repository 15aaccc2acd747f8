"""`Limits`: how much one server accepts, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one server.

    Attributes:
        queue_length: continuations that may wait for a place in the batch. A request counts `best_of` of them for
            each prompt, not only the `n` that it returns.
        body_bytes: size of a request body.
        request_seconds: from the arrival of a request to its last token.
        body_seconds: for a body to arrive.
        step_seconds: for one step of the engine, after which a rank counts as lost.
        drain_seconds: for the running requests to finish once the server is shutting down.
    """

    queue_length: int = 1024
    body_bytes: int = 2 << 20
    request_seconds: float = 600.0
    body_seconds: float = 30.0
    step_seconds: float = 300.0
    drain_seconds: float = 20.0
