"""Who gets a place on a full server: the line, and the limit that the measured load sets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from loquent.clients.client import UnreachableError, connect
from loquent.engine.admission import Line
from loquent.engine.events import Ended, Event
from loquent.engine.protocol import Start
from loquent.engine.recognizer import Recognizer
from loquent.engine.server import Server, ServerConfig
from loquent.engine.stream import Stream


async def test_first_come_first_served() -> None:
    free = 0
    line = Line(lambda granted: None if free > granted else "full", length=3, patience=5.0)
    order: list[str] = []

    async def come(name: str) -> None:
        why = await line.enter(name)
        order.append(f"{name}: {why}")

    tasks = []
    for name in "abcd":
        tasks.append(asyncio.create_task(come(name)))
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert order == ["d: full"], "the line is bounded"
    free = 2
    await asyncio.sleep(0.3)
    assert order[1:] == ["a: None", "b: None"]
    assert line.waiting == 1
    assert line.take("a") is None
    free = 3
    await tasks[2]
    assert order[-1] == "c: None"
    tasks[3].result()


async def test_patience_ends_and_whoever_leaves_frees_the_line() -> None:
    line = Line(lambda granted: "full", length=1, patience=0.15)
    began = time.monotonic()
    assert await line.enter("a") == "full"
    assert time.monotonic() - began < 2.0
    task = asyncio.create_task(line.enter("b"))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    assert line.waiting == 0


async def test_a_client_in_line_gets_the_place_that_becomes_free(tiny: Recognizer) -> None:
    async with Server(tiny, ServerConfig(port=0, max_sessions=1)) as server:
        url = f"ws://127.0.0.1:{server.port}/v1/stream"

        async def second() -> list[Event]:
            async with connect(url, Start(sample_rate=16000)) as session:
                await session.end()
                return [event async for event in session]

        async with asyncio.timeout(20):
            async with connect(url, Start(sample_rate=16000)):
                waiting = asyncio.create_task(second())
                await asyncio.sleep(0.3)
                assert not waiting.done()
            assert await waiting == [Ended(duration=0.0, segments=0)]


class Costly:
    """A recogniser that takes 20 ms for every stream, whatever their number."""

    def __init__(self, recognizer: Recognizer) -> None:
        self._recognizer = recognizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recognizer, name)

    def step(self, streams: Iterable[Stream]) -> None:
        streams = list(streams)
        time.sleep(0.02 * len(streams))
        self._recognizer.step(streams)


async def test_no_more_are_let_in_than_can_be_served(tiny: Recognizer) -> None:
    """At 160 ms and 20 ms each the ninth would fall behind; a margin of 15 % leaves six."""
    config = ServerConfig(port=0, chunk_ms=160, wait_timeout=0.0, max_load=0.85)
    stop = asyncio.Event()

    async def talk(url: str, begun: asyncio.Event) -> float:
        worst = 0.0
        start = Start(sample_rate=16000, chunk_ms=160, resume=True)
        async with connect(url, start) as session:
            begun.set()
            begin, sent = time.monotonic(), 0
            while not stop.is_set():
                await session.send(np.zeros(1600, np.int16))
                sent += 1
                worst = max(worst, session.progress.lag)
                await asyncio.sleep(max(0.0, begin + 0.1 * sent - time.monotonic()))
            return worst

    async with Server(Costly(tiny), config) as server:  # type: ignore[arg-type]
        url = f"ws://127.0.0.1:{server.port}/v1/stream"
        talking: list[asyncio.Task[float]] = []
        refused = None
        while refused is None and len(talking) < 12:
            begun = asyncio.Event()
            task = asyncio.create_task(talk(url, begun))
            await asyncio.wait(
                [task, asyncio.create_task(begun.wait())], return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                refused = task.exception()
            else:
                talking.append(task)
            await asyncio.sleep(0.1)
        assert isinstance(refused, UnreachableError)
        assert "503" in str(refused)
        assert "load" in str(refused)
        # Fewer where other programs slow this one down: the measurement includes them.
        assert 2 <= len(talking) <= 7
        await asyncio.sleep(2.0)
        stop.set()
        lags = await asyncio.gather(*talking)
        assert max(lags) < 2.0


@pytest.mark.parametrize("max_load", [0.0, 0.85])
async def test_an_empty_server_always_has_room(tiny: Recognizer, max_load: float) -> None:
    async with Server(tiny, ServerConfig(port=0, max_load=max_load)) as server:
        server.batcher.meter.round(0.32, 1, 10.0)
        url = f"ws://127.0.0.1:{server.port}/v1/stream"
        async with connect(url, Start(sample_rate=16000)) as session:
            assert session.ready.session
