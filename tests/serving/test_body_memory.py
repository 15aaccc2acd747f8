"""Bodies that arrive slowly, and the memory that they take together."""

import asyncio
import select

from raw_http import connect, post
from running_server import running

from opt_megatron.serving.body_memory import SMALL_BODY, BodyMemory
from opt_megatron.serving.limits import Limits


def withdrawn(max_bytes: int, sizes: list[int], *, num_arrived: int = 0) -> list[int]:
    """Which of the bodies, the first `num_arrived` of which have arrived, lose their memory, by their indices."""
    memory = BodyMemory(max_bytes)
    ended: list[int] = []

    async def receive(index: int, size: int) -> None:
        with memory.reserve() as reservation:
            try:
                async with asyncio.timeout(60) as reservation.timeout:
                    memory.grow(reservation, size)
                    if index >= num_arrived:
                        await asyncio.sleep(60)
            except TimeoutError:
                assert reservation.is_withdrawn and reservation.size == 0
                ended.append(index)
            finally:
                memory.end_arrival(reservation)
            await asyncio.sleep(60)

    async def run() -> None:
        tasks = []
        for index, size in enumerate(sizes):
            tasks.append(asyncio.create_task(receive(index, size)))
            for _ in range(3):
                await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert memory._used == 0 and not memory._arriving

    asyncio.run(run())
    return ended


def test_the_body_that_has_been_arriving_for_the_longest_makes_room():
    large = 10 * SMALL_BODY
    assert withdrawn(3 * large, [large] * 5) == [0, 1]
    assert withdrawn(3 * large, [large] * 5, num_arrived=2) == [2, 3]
    assert withdrawn(3 * large, [large] * 4, num_arrived=3) == [3]
    assert withdrawn(3 * large, [SMALL_BODY] * 40 + [large] * 3) == []


def test_slow_bodies_are_refused_and_ordinary_requests_are_served(alone):
    size = 4 * SMALL_BODY
    with running(alone, Limits(body_bytes=size)) as server:
        server.wait_for(lambda: server.request("GET", "/health").status == 200)
        held = [connect(server) for _ in range(18)]
        for connection in held:
            connection.sendall(post("/v1/completions", b'{"prompt":"' + b"a" * (size - 20) + b'"}')[:-1])
        server.wait_for(lambda: len(select.select(held, [], [], 0)[0]) == 2)
        answered = select.select(held, [], [], 0)[0]
        assert all(b" 503 " in connection.recv(4096) for connection in answered)
        assert server.complete(prompt="Once", max_tokens=1).status == 200
        first = next(connection for connection in held if connection not in answered)
        first.sendall(b"}")
        assert first.recv(4096).startswith(b"HTTP/1.1 400 ")  # read to its end: too many tokens
        for connection in held:
            connection.close()
