"""A session whose connection is cut, anywhere and often, says what an undisturbed one says."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loquent.clients.client import Session, UnreachableError, _returning, connect
from loquent.engine.auth import Keys
from loquent.engine.errors import ConfigError
from loquent.engine.events import Ended, Event, Final, Finalized, Partial
from loquent.engine.handover import Handed
from loquent.engine.hotwords import Hotword
from loquent.engine.limits import Limits
from loquent.engine.protocol import Resume, Start, WireError
from loquent.engine.recognizer import Recognizer
from loquent.engine.server import Server, ServerConfig

Float32 = NDArray[np.float32]
Speak = Callable[..., Float32]
Run = Callable[..., list[Event]]

SPEECH = [(1 + i % 8, 0.2) for i in range(12)] + [(0, 1.2)] + [(1 + i % 7, 0.2) for i in range(10)]


@dataclass
class Wire:
    """A TCP proxy that cuts connections after so many bytes in one direction or the other."""

    target: int
    cuts: list[tuple[str, int]]
    port: int = 0
    connections: int = 0
    pairs: list[asyncio.StreamWriter] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        direction, budget = self.cuts.pop(0) if self.cuts else ("", 0)
        try:
            there = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:  # between two servers
            writer.transport.abort()
            return
        self.pairs += [writer, there[1]]
        up = self._copy(reader, there[1], budget if direction == "up" else None)
        down = self._copy(there[0], writer, budget if direction == "down" else None)
        tasks = [asyncio.create_task(up), asyncio.create_task(down)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for end in (writer, there[1]):
            end.transport.abort()

    @staticmethod
    async def _copy(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: int | None
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while budget is None or budget > 0:
                data = await reader.read(4096)
                if not data:
                    return
                if budget is not None:
                    data = data[:budget]  # in the middle of a frame, as a dead link does
                    budget -= len(data)
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def proxy(server: Server, cuts: list[tuple[str, int]]) -> AsyncIterator[Wire]:
    wire = Wire(server.port, cuts)
    listening = await asyncio.start_server(wire.serve, "127.0.0.1", 0)
    wire.port = listening.sockets[0].getsockname()[1]
    try:
        yield wire
    finally:
        for writer in wire.pairs:
            writer.transport.abort()
        listening.close()
        await listening.wait_closed()


@asynccontextmanager
async def serving(recognizer: Recognizer, **config: Any) -> AsyncIterator[Server]:
    async with Server(recognizer, ServerConfig(port=0, **config)) as server:
        yield server


async def say(
    session: Session, pcm: Float32, packets: list[int], finalize_at: int, pause: float = 0.0005
) -> None:
    at = turn = 0
    while at < len(pcm):
        size = packets[turn % len(packets)]
        await session.send(np.round(pcm[at : at + size] * 32767).astype("<i2"))
        if at < finalize_at <= at + size:
            await session.finalize()
        at, turn = at + size, turn + 1
        await asyncio.sleep(pause)
    await session.end()


def settled(events: list[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, Partial)]


async def transcript(
    server_port: int,
    pcm: Float32,
    packets: list[int],
    finalize_at: int = 0,
    pause: float = 0.0005,
    **start: Any,
) -> tuple[list[Event], Session]:
    url = f"ws://127.0.0.1:{server_port}/v1/stream"
    events = []
    async with asyncio.timeout(30), connect(url, Start(sample_rate=16000, **start)) as session:
        speaker = asyncio.create_task(say(session, pcm, packets, finalize_at, pause))
        events = [event async for event in session]
        await speaker
    return events, session


async def come_back(url: str, token: str) -> Session:
    session = Session(url, Start(sample_rate=16000), 5.0)
    await session._open(url, Resume(token=token).encode())
    return session


@pytest.mark.parametrize("seed", range(6))
async def test_cut_anywhere_the_transcript_is_the_same(
    tiny: Recognizer, tones: Speak, seed: int
) -> None:
    rng = random.Random(seed)
    pcm = tones(SPEECH)
    packets = [rng.randrange(1, 4000) for _ in range(20)]
    finalize_at = rng.randrange(len(pcm)) if seed % 2 else 0
    start = {"chunk_ms": rng.choice([80, 160, 320]), "decoder": rng.choice(["rnnt", "ctc"])}
    cuts = [
        (way, rng.randrange(600, 40000 if way == "up" else 5000))
        for way in (rng.choice(["up", "down"]) for _ in range(rng.randrange(1, 8)))
    ]
    count = len(cuts)
    async with serving(tiny) as server:
        whole, _ = await transcript(server.port, pcm, packets, finalize_at, **start)
        assert sum(isinstance(event, Final) for event in whole) >= 2
        assert any(isinstance(event, Finalized) for event in whole) == bool(finalize_at)
        async with proxy(server, cuts) as wire:
            events, session = await transcript(
                wire.port, pcm, packets, finalize_at, resume=True, **start
            )
        assert settled(events) == settled(whole)
        if not cuts:
            assert session.connections > 1
        assert session.connections <= 1 + count
        for _ in range(200):
            if not server.sessions and not server.batcher.lanes:
                break
            await asyncio.sleep(0.01)
        assert not server.sessions
        assert not server.batcher.lanes


async def test_nothing_is_sent_twice_when_the_end_is_lost(tiny: Recognizer, tones: Speak) -> None:
    """Cut just before the last message: `ended` comes again, and the finals before it do not."""
    pcm = tones(SPEECH)
    async with serving(tiny) as server:
        url = f"ws://127.0.0.1:{server.port}/v1/stream"
        async with connect(url, Start(sample_rate=16000, resume=True)) as session:
            await say(session, pcm, [1600], 0)
            events = []
            async for event in session:
                events.append(event)
                if isinstance(event, Final) and session.connections == 1:
                    session._connection.transport.abort()
        assert isinstance(events[-1], Ended)
        assert [event.segment for event in events if isinstance(event, Final)] == [0, 1]


@pytest.mark.parametrize("code", [1000, 1001, None])
async def test_who_leaves_properly_is_not_waited_for(tiny: Recognizer, code: int | None) -> None:
    """Its seat is free at once, and its token good for nothing."""
    limits = Limits(sessions_per_key=1)
    async with serving(tiny, limits=limits, keys=Keys.from_environment(f"alice:{KEY}")) as server:
        url = f"ws://127.0.0.1:{server.port}/v1/stream"
        for _ in range(2):
            session = Session(url, Start(sample_rate=16000, resume=True), 5.0, KEY)
            await session.open()
            connection = session._connection
            if code is None:  # as a page does with a plain close()
                connection.protocol.send_close()
                connection.send_data()
                await connection.wait_closed()
            else:
                await connection.close(code)
            async with asyncio.timeout(5):
                while server.sessions:
                    await asyncio.sleep(0.01)
        assert session.ready.resume is not None
        hello = Resume(token=session.ready.resume.token).encode()
        with pytest.raises(WireError, match="not kept"):
            await Session(url, Start(sample_rate=16000), 5.0, KEY)._open(_returning(url), hello)


async def test_an_attempt_to_come_back_that_takes_too_long_is_not_the_last(
    tiny: Recognizer, tones: Speak
) -> None:
    """The client gives up a connection over which its session had just been resumed."""
    pcm = np.round(tones(SPEECH) * 32767).astype("<i2")
    async with serving(tiny) as server, proxy(server, []) as wire:
        copy = Wire._copy

        async def slow(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: int | None
        ) -> None:
            if writer in wire.pairs[2:3]:  # to the client, on its second connection
                writer.write(await reader.read(4096))  # the handshake
                await asyncio.sleep(1.2)
            await copy(reader, writer, budget)

        url = f"ws://127.0.0.1:{wire.port}/v1/stream"
        async with asyncio.timeout(30), connect(url, Start(sample_rate=16000, resume=True)) as one:
            await one.send(pcm[:30000])
            wire._copy = slow  # type: ignore[method-assign]
            one._patience = 0.5
            one._connection.transport.abort()
            await one.send(pcm[30000:])
            await one.end()
            finals = [event.text async for event in one if isinstance(event, Final)]
    assert one.connections == 2
    assert wire.connections >= 3
    assert finals == [final.text for final in tiny.transcribe(pcm)]


async def test_a_token_is_good_for_its_own_session_only(tiny: Recognizer) -> None:
    async with serving(tiny, resume_timeout=0.2) as server:
        url = f"ws://127.0.0.1:{server.port}/v1/stream"
        async with connect(url, Start(sample_rate=16000)) as plain:
            assert plain.ready.resume is None
        with pytest.raises(WireError, match="not kept") as refused:
            await come_back(url, "guess")
        assert refused.value.code == "gone"
        async with connect(url, Start(sample_rate=16000, resume=True)) as session:
            assert session.ready.resume is not None
            assert len(session.ready.resume.token) >= 32
            assert session.ready.resume.token != session.ready.session
            # The client stays away for longer than it is waited for.
            session._start = Start(sample_rate=16000)
            session._connection.transport.abort()
            with pytest.raises(UnreachableError):
                _ = [event async for event in session]
        for _ in range(300):
            if not server.sessions:
                break
            await asyncio.sleep(0.01)
        assert not server.sessions
        with pytest.raises(WireError, match="not kept"):
            await come_back(url, session.ready.resume.token)


async def test_waiting_sessions_are_bounded_and_take_no_place(tiny: Recognizer) -> None:
    async with serving(tiny, max_sessions=2, max_parked=1) as server:
        url = f"ws://127.0.0.1:{server.port}/v1/stream"
        sessions = []
        for _ in range(2):
            session = Session(url, Start(sample_rate=16000, resume=True), 5.0)
            await session.open()
            sessions.append(session)
        for session in sessions:
            session._connection.transport.abort()
        for _ in range(300):
            if server.host.connected == 0:
                break
            await asyncio.sleep(0.01)
        assert (server.host.connected, server.sessions) == (0, 1)
        async with connect(url, Start(sample_rate=16000)), connect(url, Start(sample_rate=16000)):
            assert server.host.connected == 2


KEY = "correct-horse-battery"


async def test_who_comes_back_is_not_one_more(tiny: Recognizer) -> None:
    """One place, one session of the key, no line: the old connection seems alive, or is lost."""
    one = Limits(sessions_per_key=1)
    keys = Keys.from_environment(f"alice:{KEY}")
    full = {"max_sessions": 1, "max_waiting": 0, "limits": one, "keys": keys}
    async with serving(tiny, **full) as server:
        url = f"ws://127.0.0.1:{server.port}/v1/stream"
        first = Session(url, Start(sample_rate=16000, resume=True), 5.0, KEY)
        await first.open()
        assert first.ready.resume is not None
        token = first.ready.resume.token
        with pytest.raises(UnreachableError, match="429"):
            await Session(url, Start(sample_rate=16000), 5.0, KEY).open()
        session = first
        for _ in range(3):
            successor = Session(url, Start(sample_rate=16000, resume=True), 5.0, KEY)
            await successor._open(_returning(url), Resume(token=token).encode())
            assert successor.ready.session == first.ready.session
            assert server.host.connected == 1
            session._connection.transport.abort()
            session = successor
        session._connection.transport.abort()
        while server.host.connected:
            await asyncio.sleep(0.01)
        successor = Session(url, Start(sample_rate=16000, resume=True), 5.0, KEY)
        await successor._open(_returning(url), Resume(token=token).encode())
        await successor.end()
        assert isinstance((await anext(aiter_of(successor))), Ended)
        await successor.close()
        # Nothing of it is left: the place and the seat are free.
        while server.sessions:
            await asyncio.sleep(0.01)
        async with connect(url, Start(sample_rate=16000), key=KEY):
            pass


def aiter_of(session: Session) -> Any:
    async def events() -> Any:
        while (event := await session._receive(session._connection)) is not None:
            yield event

    return events()


async def test_a_place_that_was_taken_meanwhile_is_waited_for(tiny: Recognizer) -> None:
    async with serving(tiny, max_sessions=1) as server:
        url = f"ws://127.0.0.1:{server.port}/v1/stream"
        async with connect(url, Start(sample_rate=16000, resume=True)) as session:
            session._start = Start(sample_rate=16000)  # does not come back by itself
            session._connection.transport.abort()
            while server.host.connected:
                await asyncio.sleep(0.01)
            assert session.ready.resume is not None
            hello = Resume(token=session.ready.resume.token).encode()
            async with connect(url, Start(sample_rate=16000)):
                with pytest.raises(WireError, match="taken meanwhile") as busy:
                    await session._open(_returning(url), hello)
                assert busy.value.code == "busy"
            while server.host.connected:
                await asyncio.sleep(0.01)
            await session._open(_returning(url), hello)


async def test_who_says_that_he_comes_back_cannot_start(tiny: Recognizer) -> None:
    async with serving(tiny, max_sessions=1) as server:
        url = f"ws://127.0.0.1:{server.port}/v1/stream?resume=1"
        with pytest.raises(WireError, match="expected resume"):
            await Session(url, Start(sample_rate=16000), 5.0).open()
        assert not server.host._arriving


async def test_another_server_asks_for_a_session_whose_connection_only_seems_alive(
    tiny: Recognizer, tones: Speak, tmp_path: Path
) -> None:
    pcm = np.round(tones(SPEECH) * 32767).astype("<i2")
    options = {"snapshots": tmp_path / "sessions", "share_parked": True}
    async with serving(tiny, **options) as one, serving(tiny, **options) as two:
        whole, _ = await transcript(one.port, pcm / np.float32(32767), [1600])
        url = f"ws://127.0.0.1:{one.port}/v1/stream"
        old = Session(url, Start(sample_rate=16000, resume=True), 5.0)
        await old.open()
        await old.send(pcm[:40000])
        # The network of the client has changed: nobody told the server.
        async with connect(url, Start(sample_rate=16000, resume=True)) as session:
            for name in ("ready", "_sent", "_kept"):
                setattr(session, name, getattr(old, name))
            session._url = f"ws://127.0.0.1:{two.port}/v1/stream"
            session._connection.transport.abort()
            await session.send(pcm[40000:])
            await session.end()
            events = [event async for event in session]
        assert settled(events) == settled(whole)
        assert [path.name for path in (tmp_path / "sessions").glob("*.wanted")] == []
        await old.close()


async def test_silence_is_confirmed_too(tiny: Recognizer) -> None:
    """Where nothing is said no event says how far the server is, but progress does."""
    async with serving(tiny) as server:
        url = f"ws://127.0.0.1:{server.port}/v1/stream"
        async with connect(url, Start(sample_rate=16000, resume=True)) as session:
            for _ in range(100):
                await session.send(np.zeros(1600, np.int16))
            async with asyncio.timeout(20):
                while session.progress.samples < 8 * 16000:
                    await asyncio.sleep(0.01)
            assert sum(len(data) for _, data in session._kept) <= 2 * 2 * 16000 + 3200
            await session.end()
            assert [type(event) async for event in session] == [Ended]


@pytest.mark.parametrize("seed", range(4))
async def test_restarted_anywhere_the_transcript_is_the_same(
    tiny: Recognizer, tones: Speak, seed: int, tmp_path: Path
) -> None:
    """Two servers after each other, and a third; sessions go on in each, parked ones too."""
    rng = random.Random(seed)
    pcm = tones(SPEECH)
    packets = [rng.randrange(1, 3000) for _ in range(20)]
    finalize_at = rng.randrange(len(pcm)) if seed % 2 else 0
    start = {"chunk_ms": rng.choice([80, 160]), "decoder": rng.choice(["rnnt", "ctc"])}
    folder = tmp_path / "sessions"
    async with serving(tiny) as server:
        whole, _ = await transcript(server.port, pcm, packets, finalize_at, **start)
    async with contextlib.AsyncExitStack() as proxies:
        server = Server(tiny, ServerConfig(port=0, snapshots=folder))
        await server.__aenter__()
        wire = await proxies.enter_async_context(proxy(server, []))
        talking = asyncio.create_task(
            transcript(wire.port, pcm, packets, finalize_at, 0.02, resume=True, **start)
        )
        for _ in range(2):
            await asyncio.sleep(rng.uniform(0.01, 0.3))
            if rng.random() < 0.5:  # the client is away while the server stops
                for writer in wire.pairs:
                    writer.transport.abort()
            await server.__aexit__()
            server = Server(tiny, ServerConfig(port=0, snapshots=folder))
            await server.__aenter__()
            wire.target = server.port
        try:
            events, session = await talking
        finally:
            await server.__aexit__()
    assert settled(events) == settled(whole)
    assert session.connections > 1
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == []


async def test_a_server_that_stops_while_it_fetches_a_session_passes_it_on(
    tiny: Recognizer, tones: Speak, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has taken out of the folder is nowhere else."""
    pcm, packets = tones(SPEECH), [800] * 20
    async with serving(tiny) as server:
        whole, _ = await transcript(server.port, pcm, packets, 0)
    config = ServerConfig(port=0, snapshots=tmp_path / "sessions")
    fetching = threading.Event()
    async with contextlib.AsyncExitStack() as proxies:
        server = Server(tiny, config)
        await server.__aenter__()
        wire = await proxies.enter_async_context(proxy(server, []))
        talking = asyncio.create_task(transcript(wire.port, pcm, packets, 0, 0.02, resume=True))
        await asyncio.sleep(0.2)
        await server.__aexit__()
        server = Server(tiny, config)
        await server.__aenter__()
        folder = server.host.folder
        assert folder is not None
        take = folder.take

        def slowly(token: str) -> Handed | None:
            handed = take(token)
            fetching.set()
            time.sleep(0.3)
            return handed

        monkeypatch.setattr(folder, "take", slowly)
        wire.target = server.port
        await asyncio.to_thread(fetching.wait, 10)
        await server.__aexit__()
        async with Server(tiny, config) as server:
            wire.target = server.port
            events, _ = await talking
    assert settled(events) == settled(whole)


def test_a_folder_that_others_may_read_is_refused(tiny: Recognizer, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        Server(tiny, ServerConfig(snapshots=tmp_path))


async def test_files_in_the_folder_are_private_small_and_of_an_age(
    tiny: Recognizer, tmp_path: Path
) -> None:
    folder = tmp_path / "sessions"
    async with serving(tiny, snapshots=folder) as server:
        url = f"ws://127.0.0.1:{server.port}/v1/stream"
        session = Session(url, Start(sample_rate=16000, resume=True), 5.0)
        await session.open()
        await session.send(np.zeros(16000, np.int16))
    [file] = folder.iterdir()
    assert session.ready.resume is not None
    token = session.ready.resume.token
    assert token not in file.name
    assert token.encode() not in file.read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.stat().st_size < 400_000
    os.utime(file, (0, 0))
    async with serving(tiny, snapshots=folder) as server:
        assert list(folder.iterdir()) == []
        with pytest.raises(WireError, match="not kept"):
            await come_back(f"ws://127.0.0.1:{server.port}/v1/stream", token)
    await session.close()


async def test_servers_that_share_a_folder_take_each_other_s_sessions(
    tiny: Recognizer, tones: Speak, tmp_path: Path
) -> None:
    """As workers behind one port do: every new connection comes to the other one."""
    pcm = tones(SPEECH)
    options = {"snapshots": tmp_path / "sessions", "share_parked": True}
    async with serving(tiny, **options) as one, serving(tiny, **options) as two:
        whole, _ = await transcript(one.port, pcm, [1600], len(pcm) // 3)
        cuts = [("up", 30000), ("down", 2500), ("up", 40000)]
        async with proxy(one, cuts) as wire:
            original = wire.serve

            async def alternate(r: asyncio.StreamReader, w: asyncio.StreamWriter) -> None:
                wire.target = (one, two)[wire.connections % 2].port
                await original(r, w)

            listening = await asyncio.start_server(alternate, "127.0.0.1", 0)
            port = listening.sockets[0].getsockname()[1]
            events, session = await transcript(port, pcm, [1600], len(pcm) // 3, resume=True)
            listening.close()
    assert settled(events) == settled(whole)
    assert session.connections > 2


async def test_a_server_that_moves_out_leaves_its_sessions_to_another(
    tiny: Recognizer, tones: Speak, tmp_path: Path
) -> None:
    """Those that can be resumed; the others stay, and new ones are taken."""
    pcm = tones(SPEECH)
    options = {"snapshots": tmp_path / "sessions", "share_parked": True}
    async with serving(tiny, **options) as one, serving(tiny, **options) as two:
        whole, _ = await transcript(one.port, pcm, [1600])
        async with proxy(one, []) as wire:
            talks = [
                asyncio.create_task(transcript(wire.port, pcm, [1600], pause=0.01, resume=resume))
                for resume in (True, None)
            ]
            await asyncio.sleep(0.3)
            wire.target = two.port
            one.host.move_out()
            (moved, session), (stayed, other) = await asyncio.gather(*talks)
        assert (session.connections, other.connections) == (2, 1)
        assert settled(moved) == settled(stayed) == settled(whole)
        again, _ = await transcript(one.port, pcm, [1600])
        assert settled(again) == settled(whole)


async def test_a_session_that_was_just_starting_is_handed_over(
    tiny: Recognizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    started = threading.Event()
    real = Recognizer.hotwords

    def slow(self: Recognizer, hotwords: Any) -> Any:
        if hotwords:
            started.set()
            time.sleep(0.3)  # as a long list may take
        return real(self, hotwords)

    monkeypatch.setattr(Recognizer, "hotwords", slow)
    folder = tmp_path / "sessions"
    start = Start(sample_rate=16000, resume=True, hotwords=(Hotword(phrase="bana"),))
    async with serving(tiny, snapshots=folder) as server:
        session = Session(f"ws://127.0.0.1:{server.port}/v1/stream", start, 5.0)
        opening = asyncio.create_task(session.open())
        assert await asyncio.to_thread(started.wait, 5.0)
    await opening
    assert session.ready.resume is not None
    assert len(list(folder.iterdir())) == 1
    assert not [record for record in caplog.records if record.exc_info]
    await session.close()
