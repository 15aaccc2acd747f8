"""`WaitingGroups`: the sequence groups that have no blocks of the KV cache."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from ..decoding.sequences import SequenceGroup


class WaitingGroups:
    """Groups by their clients; each client's in the order of arrival, those that were preempted first."""

    def __init__(self) -> None:
        self._of_client: dict[int, deque[SequenceGroup]] = {}  # none of them is empty

    def __bool__(self) -> bool:
        return bool(self._of_client)

    def __iter__(self) -> Iterator[SequenceGroup]:
        return (group for groups in self._of_client.values() for group in groups)

    def extend(self, groups: Iterable[SequenceGroup]) -> None:
        """Append groups that have arrived."""
        for group in groups:
            self._of_client.setdefault(group.request.client, deque()).append(group)

    def put_back(self, group: SequenceGroup) -> None:
        """Put a group before all others of its client."""
        self._of_client.setdefault(group.request.client, deque()).appendleft(group)

    def next(self, num_running: Counter[int]) -> SequenceGroup:
        """The first group of the client with the fewest running sequences; of equal ones the request that came first.

        Args:
            num_running: running sequences of each client.
        """
        first = [groups[0] for groups in self._of_client.values()]
        return min(first, key=lambda group: (num_running[group.request.client], group.request_id))

    def take(self, group: SequenceGroup) -> None:
        """Take out the first group of a client."""
        client = group.request.client
        self._of_client[client].remove(group)
        if not self._of_client[client]:
            del self._of_client[client]

    def remove(self, request_id: int) -> list[SequenceGroup]:
        """Take out all groups of a request."""
        removed = [group for group in self if group.request_id == request_id]
        for group in removed:
            self.take(group)
        return removed
