"""Server processes that are killed, and that follow each other, with people talking meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from loquent.clients.client import Session, UnreachableError, connect
from loquent.engine.events import Ended, Event, Final, Finalized, Partial
from loquent.engine.protocol import Start, WireError
from loquent.engine.recognizer import Recognizer

Int16 = NDArray[np.int16]
PACKET = 1600

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@dataclass
class Talk:
    """One client: what it says, and what it has heard of it."""

    session: Session
    pcm: Int16
    pace: float  # seconds between two packets
    finalize_at: int = -1
    at: int = 0
    events: list[Event] = field(default_factory=list)
    error: Exception | None = None

    async def run(self) -> None:
        speaker = asyncio.create_task(self._speak())
        try:
            self.events.extend([event async for event in self.session])
        except (UnreachableError, WireError) as exc:
            self.error = exc
        finally:
            speaker.cancel()
            await asyncio.gather(speaker, return_exceptions=True)

    async def _speak(self) -> None:
        for at in range(0, len(self.pcm), PACKET):
            await self.session.send(self.pcm[at : at + PACKET])
            self.at = at
            if at <= self.finalize_at < at + PACKET:
                await self.session.finalize()
            await asyncio.sleep(self.pace)
        await self.session.end()

    @property
    def finals(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Final)]

    @property
    def settled(self) -> list[Event]:
        return [event for event in self.events if not isinstance(event, Partial)]


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def server_of(session: Session, workers: list[int]) -> int:
    """The worker at the other end of the session's connection."""
    here, there = session._connection.local_address[1], session._connection.remote_address[1]
    pair = f":{there:04X} 0100007F:{here:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()
    [inode] = [line.split()[9] for line in lines if pair in line]
    for worker in workers:
        for file in Path(f"/proc/{worker}/fd").iterdir():
            if str(file.readlink()) == f"socket:[{inode}]":
                return worker
    raise AssertionError(f"no worker has {pair}")


@pytest.fixture(scope="module")
def morning() -> tuple[Int16, list[str]]:
    """The sample that comes with Loquent, and what the bundled model hears in it."""
    sample = files("loquent.engine") / "samples" / "morning.flac"
    pcm, _ = soundfile.read(str(sample), dtype="int16")
    return pcm, [final.text for final in Recognizer.load("en").transcribe(pcm)]


@linux
@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="needs SO_REUSEPORT")
async def test_a_worker_that_is_killed_takes_only_its_own_sessions_with_it(
    serve: Any, morning: tuple[Int16, list[str]]
) -> None:
    pcm, finals = morning
    program, url = await asyncio.to_thread(serve, "--workers", "2", "--bundle", "en")
    workers = children_of(program.process.pid)
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        by_worker: dict[int, list[Talk]] = defaultdict(list)
        talks: list[Talk] = []
        kinds: set[tuple[int, bool | None]] = set()
        while len(talks) < 6 or len(kinds) < 4:
            # The kernel spreads them by chance: until both have those that resume, and others.
            start = Start(sample_rate=16000, resume=len(talks) % 2 == 0)
            session = Session(url, start, 10.0)
            await session.open()
            tasks.create_task(session.pump())
            talks.append(Talk(session, pcm, pace=0.03))
            worker = server_of(session, workers)
            by_worker[worker].append(talks[-1])
            kinds.add((worker, start.resume))
        running = [tasks.create_task(talk.run()) for talk in talks]
        while min(talk.session.progress.processed for talk in talks) < 4.0:
            await asyncio.sleep(0.05)
        killed, other = workers
        os.kill(killed, signal.SIGKILL)
        await asyncio.wait(running)
        for talk in by_worker[other]:
            assert talk.error is None
            assert talk.finals == finals
            assert talk.session.connections == 1
        for talk in by_worker[killed]:
            assert talk.finals == finals[: len(talk.finals)] != finals
            if talk.session._start.resume:
                # It came back to a server, which says that nobody has the session any more.
                assert isinstance(talk.error, WireError)
                assert talk.error.code == "gone"
            else:
                assert isinstance(talk.error, UnreachableError)
        # Another worker has taken its place, and hears as well.
        while set(children_of(program.process.pid)) <= {other, killed}:
            await asyncio.sleep(0.05)
        workers = children_of(program.process.pid)
        seen: set[int] = set()
        while len(seen) < 2:
            async with connect(url, Start(sample_rate=16000)) as session:
                worker = server_of(session, workers)
                if worker not in seen:
                    talk = Talk(session, pcm, pace=0.0)
                    await talk.run()
                    assert talk.finals == finals
                    seen.add(worker)
            await asyncio.sleep(0.02)
        for talk in talks:
            await talk.session.close()
    program.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(program.wait) == 0
    assert "Traceback" not in program.err


SPEECH = [(1 + i % 8, 0.2) for i in range(12)] + [(0, 1.2)] + [(1 + i % 7, 0.2) for i in range(10)]
STARTS = [
    Start(sample_rate=16000, chunk_ms=80, decoder="rnnt", resume=True),
    Start(sample_rate=16000, chunk_ms=160, decoder="ctc", resume=True),
    Start(sample_rate=16000, chunk_ms=320, resume=True),
    Start(sample_rate=16000, chunk_ms=160, decoder="rnnt-beam", resume=True),
]


async def say_all(
    url: str, pcm: Int16, starts: list[Start], *, pace: float, stagger: float, finalize_at: int
) -> list[Talk]:
    """One client for each start, each beginning a little later than the one before."""

    async def one(number: int, start: Start) -> Talk:
        await asyncio.sleep(number * stagger)
        async with connect(url, start) as session:
            talk = Talk(session, pcm, pace, finalize_at if number % 2 else -1)
            await talk.run()
            return talk

    return await asyncio.gather(*(one(number, start) for number, start in enumerate(starts)))


async def restarted(
    serve: Any, flags: list[str], pcm: Int16, starts: list[Start], rng: random.Random
) -> tuple[list[Talk], list[Talk]]:
    """What is heard without, and with two restarts at random moments."""
    program, url = await asyncio.to_thread(serve, *flags)
    port = url.removesuffix("/v1/stream").rpartition(":")[2]
    finalize_at = rng.randrange(len(pcm))
    whole = await say_all(url, pcm, starts, pace=0.0, stagger=0.0, finalize_at=finalize_at)
    pace = 0.03
    talking = asyncio.create_task(
        say_all(url, pcm, starts, pace=pace, stagger=0.1, finalize_at=finalize_at)
    )
    spoken = pace * len(pcm) / PACKET
    await asyncio.sleep(0.4)
    for _ in range(2):
        await asyncio.sleep(rng.uniform(0.05, 0.4) * spoken)
        program.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(program.wait) == 0
        assert "Traceback" not in program.err
        program, _ = await asyncio.to_thread(serve, *flags, "--port", port)
    talks = await talking
    program.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(program.wait) == 0
    return whole, talks


@pytest.mark.parametrize(("workers", "seed"), [("1", 0), pytest.param("2", 3, marks=linux)])
async def test_a_server_that_is_restarted_goes_on_in_mid_word(
    serve: Any, tones: Callable[..., NDArray[np.float32]], tmp_path: Path, workers: str, seed: int
) -> None:
    pcm = np.round(tones(SPEECH) * 32767).astype(np.int16)
    folder = tmp_path / "sessions"
    flags = ["--snapshots", str(folder), "--workers", workers]
    async with asyncio.timeout(60):
        whole, talks = await restarted(serve, flags, pcm, STARTS, random.Random(seed))
    for undisturbed, talk in zip(whole, talks, strict=True):
        assert talk.error is None
        assert len(talk.finals) >= 2
        assert isinstance(talk.events[-1], Ended)
        assert talk.events[-1].reason == "end"
        assert talk.settled == undisturbed.settled
        assert talk.session.connections > 1
    assert sum(isinstance(event, Finalized) for talk in talks for event in talk.events) == 2
    assert list(folder.iterdir()) == []


async def test_the_bundled_model_is_restarted_while_somebody_speaks(
    serve: Any, morning: tuple[Int16, list[str]], tmp_path: Path
) -> None:
    pcm, finals = morning
    flags = ["--bundle", "en", "--snapshots", str(tmp_path / "sessions")]
    starts = [Start(sample_rate=16000, resume=True), Start(sample_rate=16000, resume=True)]
    async with asyncio.timeout(60):
        whole, talks = await restarted(serve, flags, pcm, starts, random.Random(7))
    assert [talk.settled for talk in talks] == [talk.settled for talk in whole]
    assert talks[0].finals == finals
    assert all(talk.session.connections > 1 for talk in talks)
