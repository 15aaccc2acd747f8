"""Worker processes encode chunks in order, without reading the whole input ahead."""

from __future__ import annotations

from collections.abc import Iterator

from opt_megatron.checkpoint.locate import EMBEDDED_DIRECTORY
from opt_megatron.data.document_encoder import encode_in_order
from opt_megatron.data.jsonl import Chunk


def test_workers_read_only_a_little_ahead() -> None:
    given_out = []

    def chunks() -> Iterator[Chunk]:
        for n in range(1000):
            given_out.append(n)
            yield Chunk("x", n + 1, [b'{"text": "a wolf"}\n'])

    encoded = encode_in_order(chunks(), EMBEDDED_DIRECTORY, "text", "uint16", False, 2)
    assert next(encoded).lengths == [2] and len(given_out) <= 6
    encoded.close()
