"""The server on loopback, with a real recogniser (the one that hears tones) and real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from tests.engine.loopback import (
    START,
    bystander,
    caption,
    client,
    close_code_of,
    decode,
    encode,
    frame,
    is_subsequence,
    lanes_of,
    no_sessions,
    of_kind,
    on_the_wire,
    raw_messages,
    raw_session,
    receive_all,
    serving,
    until,
)
from websockets.exceptions import ConnectionClosed, InvalidStatus

from loquent.engine.batcher import Batcher
from loquent.engine.events import Ended, Event, Final
from loquent.engine.hotwords import Hotword
from loquent.engine.lane import HIGH_WATER, Lane
from loquent.engine.limits import Limits
from loquent.engine.pool import Pool, Slot
from loquent.engine.protocol import END, FINALIZE, MAX_MESSAGE, SetHotwords, Start
from loquent.engine.recognizer import Recognizer
from loquent.engine.server import Server, ServerConfig

Float32 = NDArray[np.float32]
Message = dict[str, Any]
Speak = Callable[..., Float32]
Run = Callable[..., list[Event]]

SPEECH = [(0, 0.3), (1, 0.4), (2, 0.3), (0, 0.1), (3, 0.5), (4, 0.3), (0, 1.2), (5, 0.4), (7, 0.4)]


@pytest.fixture
def speech(tones: Speak) -> Float32:
    """Five seconds with a pause long enough to end a segment."""
    return tones(SPEECH)


@pytest.fixture
def expected(tiny: Recognizer, speech: Float32, run: Run) -> list[Message]:
    """What `bystander` must hear: the offline result of the same samples."""
    pcm = decode(encode(speech, "s16le"), "s16le")
    events = run(tiny, tiny.stream(chunk_ms=160), pcm, [1600])
    assert len([event for event in events if isinstance(event, Final)]) == 2
    return of_kind(on_the_wire(events), "final", "ended")


# Server == offline.


@pytest.mark.parametrize("seed", range(3))
async def test_the_server_hears_what_the_offline_recogniser_hears(
    tiny: Recognizer, tones: Speak, run: Run, seed: int
) -> None:
    """Sessions of all kinds at once, in packets of any size, cut anywhere even inside a sample."""
    rng = random.Random(seed)
    kinds = [
        (encoding, rate, chunk_ms, decoder)
        for encoding in ("s16le", "f32le")
        for rate, chunk_ms, decoder in [(16000, 40, "rnnt"), (48000, 320, "ctc"), (8000, 160, None)]
    ]
    async with serving(tiny) as server:
        jobs, wanted = [], []
        for encoding, rate, chunk_ms, decoder in kinds:
            spoken = [(rng.randrange(9), rng.uniform(0.05, 1.0)) for _ in range(10)]
            data = encode(tones(spoken, sample_rate=rate), encoding)
            stream = tiny.stream(sample_rate=rate, chunk_ms=chunk_ms, decoder=decoder)
            wanted.append(on_the_wire(run(tiny, stream, decode(data, encoding), [777])))
            start = Start(
                sample_rate=rate,
                encoding=encoding,  # type: ignore[arg-type]
                chunk_ms=chunk_ms,
                decoder=decoder,
            )
            packets = [rng.randint(0, 4000) for _ in range(20)] + [1]
            jobs.append(caption(server, start, data, packets))
        for got, want in zip(await asyncio.gather(*jobs), wanted, strict=True):
            assert of_kind(got, "final", "ended") == of_kind(want, "final", "ended")
            assert len(of_kind(want, "final")) > 0
            # A newer partial replaces one that waits; none is made up, none comes out of order.
            assert is_subsequence(of_kind(got, "partial"), of_kind(want, "partial"))
            for message in got:
                if message["type"] != "ended":
                    assert message["end"] <= message["processed"] + 1.0
                    assert message["processed"] <= message["received"]


async def test_one_byte_at_a_time(tiny: Recognizer, tones: Speak, run: Run) -> None:
    data = encode(tones([(1, 0.3), (2, 0.2)]), "s16le")
    want = on_the_wire(run(tiny, tiny.stream(), decode(data, "s16le"), [100]))
    async with serving(tiny, limits=Limits(messages_per_second=0)) as server:
        got = await caption(server, Start(sample_rate=16000), data, [1])
    assert of_kind(got, "final", "ended") == of_kind(want, "final", "ended")


async def test_ready_says_what_was_chosen(tiny: Recognizer) -> None:
    async with serving(tiny) as server, client(server, subprotocols=["loquent.v1"]) as connection:
        assert connection.subprotocol == "loquent.v1"
        await connection.send(Start(sample_rate=8000, chunk_ms=80, decoder="ctc").encode())
        ready = json.loads(await connection.recv())
        assert len(ready.pop("session")) == 16
        assert ready == {
            "type": "ready",
            "protocol": 1,
            "bundle": "tiny",
            "decoder": "ctc",
            "chunk_ms": 80,
            "latency_ms": pytest.approx(tiny.stream(chunk_ms=80).latency_ms),
            "sample_rate": 8000,
            "language": "xx",
        }


async def test_partials_come_while_audio_is_still_to_come(tiny: Recognizer, tones: Speak) -> None:
    async with serving(tiny) as server, client(server) as connection:
        await connection.send(Start(sample_rate=16000, chunk_ms=40).encode())
        await connection.send(encode(tones([(1, 0.5)]), "s16le"))
        types = [json.loads(await connection.recv())["type"] for _ in range(2)]
        assert types == ["ready", "partial"]


async def test_finalize_settles_what_was_sent_and_goes_on(tiny: Recognizer, tones: Speak) -> None:
    data = encode(tones([(0, 0.2), (3, 0.2), (4, 0.1)]), "s16le")
    async with serving(tiny) as server, client(server) as connection:
        await connection.send(Start(sample_rate=16000).encode())
        for text in ("", "kiwi", "kiwi", ""):
            if text:
                await connection.send(data)
            await connection.send(FINALIZE)
            said = []
            while (message := json.loads(await connection.recv()))["type"] != "finalized":
                said += of_kind([message], "final")
            assert [final["text"] for final in said] == [text] * bool(text)
            assert all(final["reason"] == "finalize" for final in said)
        assert message["position"] == message["received"] == message["processed"] == 1.0
        await connection.send(END)
        assert of_kind(await receive_all(connection), "ended", "final") == [
            {"type": "ended", "duration": 1.0, "segments": 2, "reason": "end"}
        ]


async def test_hotwords_come_with_the_start_and_change(tiny: Recognizer, tones: Speak) -> None:
    data = encode(tones([(0, 0.2), (3, 0.2), (4, 0.1)]), "s16le")
    muwi = (Hotword(phrase="muwi", boost=10),)
    start = Start(sample_rate=16000, decoder="rnnt-beam", hotwords=muwi)
    async with serving(tiny) as server, client(server) as connection:
        await connection.send(start.encode())
        said = []
        for hotwords in (None, (), muwi):
            if hotwords is not None:
                await connection.send(SetHotwords(hotwords=hotwords).encode())
            await connection.send(data)
            await connection.send(FINALIZE)
            while (message := json.loads(await connection.recv()))["type"] != "finalized":
                said += of_kind([message], "final")
        texts = [final["text"] for final in said]
        assert texts[1] == "kiwi"
        assert texts[0] == texts[2] != "kiwi"
        await connection.send('{"type": "hotwords", "hotwords": ["xylophone"]}')
        error = (await receive_all(connection))[-1]
    assert (error["type"], error["code"]) == ("error", "bad_config")
    assert "cannot spell the character 'x'" in error["message"]


async def test_a_session_without_audio(tiny: Recognizer) -> None:
    async with serving(tiny) as server:
        messages = await caption(server, Start(sample_rate=16000), b"", [1])
    assert messages == [{"type": "ended", "duration": 0.0, "segments": 0, "reason": "end"}]


async def test_a_minute_of_silence(tiny: Recognizer) -> None:
    async with serving(tiny) as server:
        data = bytes(2 * 16000 * 60)
        messages = await caption(server, Start(sample_rate=16000), data, [6400])
    assert messages == [{"type": "ended", "duration": 60.0, "segments": 0, "reason": "end"}]


# Clients that misbehave.

NAN = struct.pack("<f", float("nan")) * 100


@pytest.mark.parametrize(
    ("messages", "code", "close_code", "said"),
    [
        (["hello"], "bad_json", 1003, "'hello'"),
        (["\0\x1b[2J"], "bad_json", 1003, "expected JSON"),
        (['{"type": "stop"}'], "bad_type", 1002, "'stop'"),
        ([b"\0\0"], "bad_type", 1002, "expected start"),
        ([START, START], "bad_type", 1002, "expected audio or finalize or hotwords or end"),
        ([START, b"\0\0", END, b"\0\0"], "bad_type", 1002, "nothing more"),
        (['{"type": "start"}'], "bad_config", 1008, "sample_rate"),
        ([Start(sample_rate=7999).encode()], "bad_config", 1008, "8000 to 48000"),
        ([Start(sample_rate=10**30).encode()], "bad_config", 1008, "8000 to 48000"),
        ([Start(sample_rate=-1).encode()], "bad_config", 1008, "8000 to 48000"),
        ([Start(sample_rate=16000, chunk_ms=50).encode()], "bad_config", 1008, "320"),
        ([Start(sample_rate=16000, chunk_ms=float("nan")).encode()], "bad_json", 1003, "NaN"),
        ([Start(sample_rate=16000, decoder="magic").encode()], "bad_config", 1008, "ctc"),
        ([Start(sample_rate=16000, language="qq").encode()], "bad_config", 1008, "xx"),
        ([Start(sample_rate=16000, right_context_ms=1).encode()], "bad_config", 1008, "40"),
        (
            [Start(sample_rate=16000, encoding="f32le").encode(), NAN],
            "bad_audio",
            1003,
            "not finite",
        ),
        ([START, bytes(MAX_MESSAGE + 2)], "too_big", 1009, str(MAX_MESSAGE)),
    ],
)
async def test_a_mistake_ends_that_session_with_a_reason_and_no_other(
    tiny: Recognizer,
    speech: Float32,
    expected: list[Message],
    caplog: pytest.LogCaptureFixture,
    messages: list[str | bytes],
    code: str,
    close_code: int,
    said: str,
) -> None:
    async with serving(tiny) as server:
        innocent = asyncio.create_task(bystander(server, speech))
        async with client(server) as connection:
            with contextlib.suppress(ConnectionClosed):
                for message in messages:
                    await connection.send(message)
            got = await receive_all(connection)
            assert connection.close_code == close_code
        errors = [message for message in got if message["type"] == "error"]
        assert [error["code"] for error in errors] == [code]
        assert got[-1] == errors[0]
        assert said in errors[0]["message"]
        assert await innocent == expected
        await no_sessions(server)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_text_that_is_not_utf8(
    tiny: Recognizer, speech: Float32, expected: list[Message]
) -> None:
    async with serving(tiny) as server:
        reader, writer = await raw_session(server)
        writer.write(frame(b"\xff\xfe\xfd", opcode=1))
        assert await close_code_of(reader) == 1007
        writer.close()
        assert await bystander(server, speech) == expected
        await no_sessions(server)


async def test_a_message_of_100_megabytes(
    tiny: Recognizer, speech: Float32, expected: list[Message]
) -> None:
    async with serving(tiny) as server:
        innocent = asyncio.create_task(bystander(server, speech))
        async with client(server) as connection:
            await connection.send(START)
            with contextlib.suppress(ConnectionClosed):
                await connection.send(bytes(100_000_000))
            await receive_all(connection)
            assert connection.close_code == 1009
        assert await innocent == expected
        await no_sessions(server)


async def test_the_header_of_a_huge_message_is_enough(tiny: Recognizer) -> None:
    async with serving(tiny) as server:
        reader, writer = await raw_session(server)
        writer.write(frame(b"", length=100_000_000))
        assert await close_code_of(reader) == 1009
        writer.close()
        await no_sessions(server)


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_half_a_frame_and_then_nothing(
    tiny: Recognizer,
    speech: Float32,
    expected: list[Message],
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    async with serving(tiny) as server:
        innocent = asyncio.create_task(bystander(server, speech))
        _, writer = await raw_session(server)
        writer.write(frame(START.encode(), opcode=1))
        writer.write(frame(encode(speech, "s16le"))[:1001])
        await writer.drain()
        await lanes_of(server)
        if how == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        assert await innocent == expected
        await no_sessions(server)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_half_a_frame_that_never_ends(tiny: Recognizer) -> None:
    async with serving(tiny, idle_timeout=0.3) as server:
        reader, writer = await raw_session(server)
        writer.write(frame(START.encode(), opcode=1))
        writer.write(frame(bytes(1000))[:500])
        assert await close_code_of(reader) == 1000
        writer.close()
        await no_sessions(server)


async def test_a_client_that_vanishes_in_mid_stream(
    tiny: Recognizer, speech: Float32, expected: list[Message]
) -> None:
    async with serving(tiny) as server:
        async with client(server) as connection:
            await connection.send(START)
            await connection.send(encode(speech, "s16le"))
            await connection.recv()
            connection.transport.abort()
        assert await bystander(server, speech) == expected
        await no_sessions(server)


async def test_a_client_that_closes_before_the_end(tiny: Recognizer, speech: Float32) -> None:
    async with serving(tiny) as server:
        async with client(server) as connection:
            await connection.send(START)
            await connection.send(encode(speech, "s16le"))
            await connection.close()
        await no_sessions(server)


async def test_idle_before_start(tiny: Recognizer) -> None:
    async with serving(tiny, idle_timeout=0.2) as server, client(server) as connection:
        [error] = await receive_all(connection)
        assert (error["code"], connection.close_code) == ("idle", 1008)
        assert "0.2 s" in error["message"]


async def test_idle_in_mid_stream_keeps_what_was_said(
    tiny: Recognizer, speech: Float32, expected: list[Message]
) -> None:
    async with serving(tiny, idle_timeout=0.3) as server, client(server) as connection:
        await connection.send(Start(sample_rate=16000, chunk_ms=160).encode())
        await connection.send(encode(speech, "s16le"))
        messages = await receive_all(connection)
        assert connection.close_code == 1000
    assert of_kind(messages, "final", "ended") == [
        {**message, "reason": "idle"} if message["type"] == "ended" else message
        for message in expected
    ]


async def test_waiting_for_the_end_is_not_idle(tiny: Recognizer, tones: Speak) -> None:
    """After `end` the client has nothing to say, however long the rest takes."""
    data = encode(tones([(1 + i % 8, 0.3) for i in range(400)]), "s16le")
    async with serving(tiny, idle_timeout=0.05) as server:
        messages = await caption(server, Start(sample_rate=16000, chunk_ms=40), data, [MAX_MESSAGE])
    assert messages[-1]["type"] == "ended"
    assert messages[-1]["duration"] == 120.0


async def test_no_room(tiny: Recognizer, speech: Float32, expected: list[Message]) -> None:
    async with serving(tiny, max_sessions=1, wait_timeout=0.2) as server:
        async with client(server) as first:
            await first.send(START)
            await first.recv()
            with pytest.raises(InvalidStatus) as refused:
                await client(server).__aenter__()
            assert refused.value.response.status_code == 503
            assert refused.value.response.headers["Retry-After"] == "5"
            # A page could not read that, so it is told over the WebSocket.
            async with client(server, origin=f"http://127.0.0.1:{server.port}") as page:
                [error] = await receive_all(page)
                assert (error["code"], error["retry_after"]) == ("busy", 5)
                assert page.close_code == 1013
        await no_sessions(server)
        assert await bystander(server, speech) == expected


# Flow control.


async def test_a_client_much_faster_than_the_engine_is_slowed_down_and_loses_nothing(
    tiny: Recognizer, tones: Speak, run: Run
) -> None:
    rng = random.Random(1)
    spoken = [(rng.randrange(9), rng.uniform(0.1, 0.6)) for _ in range(500)]
    data = encode(tones(spoken), "s16le")
    assert len(data) / 32000 > 100
    events = run(tiny, tiny.stream(), decode(data, "s16le"), [16000])
    packet = 3200
    async with serving(tiny) as server:
        # The engine stands still, as on a machine that is much too slow.
        gate = threading.Event()
        server.batcher._executor.submit(gate.wait)
        try:
            client = asyncio.create_task(caption(server, Start(sample_rate=16000), data, [packet]))
            [lane] = await lanes_of(server)
            await until(lambda: lane.waiting >= HIGH_WATER)
            await asyncio.sleep(0.3)  # time enough for all of it to arrive, if it were let in
            assert HIGH_WATER <= lane.waiting <= HIGH_WATER + packet / 32000
        finally:
            gate.set()
        messages = await client
    assert of_kind(messages, "final", "ended") == of_kind(on_the_wire(events), "final", "ended")


async def test_a_slow_reader_costs_nobody_anything_and_loses_nothing(
    tiny: Recognizer, tones: Speak, run: Run, speech: Float32, expected: list[Message]
) -> None:
    rng = random.Random(2)
    spoken = [(rng.randrange(1, 9), 0.3) if i % 2 else (0, 0.9) for i in range(1000)]
    data = encode(tones(spoken), "s16le")
    seconds = len(data) / 32000
    events = run(tiny, tiny.stream(), decode(data, "s16le"), [16000])
    async with serving(tiny) as server:
        reader, writer = await raw_session(server, small_buffers=True)
        writer.write(frame(START.encode(), opcode=1))

        async def send() -> None:
            for at in range(0, len(data), 6400):
                writer.write(frame(data[at : at + 6400]))
                await writer.drain()
            writer.write(frame(END.encode(), opcode=1))

        sender = asyncio.create_task(send())
        # Its lane comes to a stand with unread events ...
        [lane] = await lanes_of(server)
        before = -1.0
        while lane.processed != before:
            before = lane.processed
            await asyncio.sleep(0.3)
        assert 0 < lane.processed < seconds - 30
        assert lane.waiting < HIGH_WATER + 1
        # ... while the others are served, ...
        async with asyncio.timeout(30):
            assert await bystander(server, speech) == expected
        # ... and goes on where it stopped.
        messages = [json.loads(text) async for text in raw_messages(reader)]
        await sender
        writer.close()
        await no_sessions(server)
    assert of_kind(messages, "final", "ended") == of_kind(on_the_wire(events), "final", "ended")


async def test_a_client_that_never_reads_is_cut_off(
    tiny: Recognizer, tones: Speak, speech: Float32, expected: list[Message]
) -> None:
    data = encode(tones([(1 + i % 8, 0.2) for i in range(1000)]), "s16le")
    async with serving(tiny, send_timeout=0.5) as server:
        _, writer = await raw_session(server, small_buffers=True)
        writer.write(frame(Start(sample_rate=16000, chunk_ms=80).encode().encode(), opcode=1))
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(data), 6400):
                writer.write(frame(data[at : at + 6400]))
                await writer.drain()
        assert await bystander(server, speech) == expected
        await no_sessions(server)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


# Failures inside.


async def finals_of(lane: Lane) -> list[Event]:
    events: list[Event] = []
    while not events or not isinstance(events[-1], Ended):
        events += [event for event, _ in await lane.events()]
    return [event for event in events if isinstance(event, Final | Ended)]


async def test_one_broken_stream_in_a_batch_does_not_break_the_others(
    tiny: Recognizer, speech: Float32, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    want = [
        event
        for event in run(tiny, tiny.stream(), speech, [1600])
        if isinstance(event, Final | Ended)
    ]
    async with Batcher(tiny) as batcher:
        streams = [tiny.stream() for _ in range(3)]
        lanes = [batcher.add(stream, 16000) for stream in streams]
        # The second has a row that does not exist.
        streams[1].encoder_state = Slot(Pool(()), 1_000_000)
        results = asyncio.gather(*map(finals_of, lanes), return_exceptions=True)
        for lane in lanes:
            await lane.feed(speech)
            lane.finish()
        async with asyncio.timeout(30):
            first, second, third = await results
        assert first == want
        assert third == want
        assert isinstance(second, Exception)
        with pytest.raises(type(second)):
            await lanes[1].feed(speech)
    assert "a batch of 3 streams failed" in caplog.text


async def test_when_the_engine_fails_every_client_is_told_and_the_server_lives_on(
    tiny_bundle: Path, speech: Float32, expected: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    recognizer = Recognizer.load(tiny_bundle)

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory in /secret/place")

    async with serving(recognizer) as server, contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(client(server)) for _ in range(3)]
        for connection in connections:
            await connection.send(START)
            await connection.recv()
        with monkeypatch.context() as patch:
            patch.setattr(recognizer._encoder, "advance", fail)
            for connection in connections:
                await connection.send(encode(speech, "s16le"))
            for connection in connections:
                async with asyncio.timeout(30):
                    [error] = await receive_all(connection)
                assert (error["code"], connection.close_code) == ("internal", 1011)
                assert "secret" not in error["message"]
        await no_sessions(server)
        assert await bystander(server, speech) == expected


async def test_small_batches_serve_everybody(tiny: Recognizer, tones: Speak, run: Run) -> None:
    rng = random.Random(5)
    pcms = [tones([(rng.randrange(9), rng.uniform(0.2, 0.9)) for _ in range(8)]) for _ in range(7)]
    async with Batcher(tiny, max_batch=2) as batcher:
        lanes = [batcher.add(tiny.stream(), 16000) for _ in pcms]
        results = asyncio.gather(*map(finals_of, lanes))
        for lane, pcm in zip(lanes, pcms, strict=True):
            await lane.feed(pcm)
            lane.finish()
        async with asyncio.timeout(30):
            got = await results
    for pcm, finals in zip(pcms, got, strict=True):
        events = run(tiny, tiny.stream(), pcm, [1600])
        assert finals == [event for event in events if isinstance(event, Final | Ended)]


async def test_rounds_take_turns(tiny: Recognizer, tones: Speak) -> None:
    """A round has room for one stream of three; nobody gets two chunks ahead of another."""
    chunk = 0.16
    pcm = tones([(1 + i % 8, 0.2) for i in range(40)])
    async with Batcher(tiny, max_batch=1) as batcher:
        lanes = [batcher.add(tiny.stream(chunk_ms=160), 16000) for _ in range(3)]
        gate = threading.Event()
        batcher._executor.submit(gate.wait)
        for lane in lanes:
            await lane.feed(pcm)
            lane.finish()
        results = asyncio.gather(*map(finals_of, lanes))
        gate.set()
        seen = set()
        async with asyncio.timeout(30):
            while not results.done():
                processed = [lane.processed for lane in lanes]
                seen.add(min(processed))
                if max(processed) < len(pcm) / 16000:
                    assert max(processed) - min(processed) < 1.5 * chunk
                await asyncio.sleep(0)
        await results
        assert len(seen) > 20, "the streams were not watched closely enough"


async def test_nobody_waits_for_a_closed_batcher(tiny: Recognizer) -> None:
    async with Batcher(tiny) as batcher:
        lane = batcher.add(tiny.stream(), 16000)
        waiter = asyncio.create_task(lane.events())
        await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="closed"):
        await waiter


# Stopping.


async def test_stopping_gives_sessions_the_rest_of_their_text(
    tiny: Recognizer, speech: Float32, expected: list[Message]
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with serving(tiny) as server:
            talking = await stack.enter_async_context(client(server))
            await talking.send(Start(sample_rate=16000, chunk_ms=160).encode())
            await talking.send(encode(speech, "s16le"))
            silent = await stack.enter_async_context(client(server))
            [lane] = await lanes_of(server)
            await until(lambda: lane.received >= len(speech) / 16000)
        messages = await receive_all(talking)
        assert of_kind(messages, "final", "ended") == [
            *expected[:-1],
            {**expected[-1], "reason": "stopping"},
        ]
        assert talking.close_code == 1001
        assert await receive_all(silent) == []
        assert silent.close_code == 1001
    assert server.sessions == 0


async def test_stopping_does_not_wait_for_ever(tiny: Recognizer, tones: Speak) -> None:
    data = encode(tones([(1 + i % 8, 0.2) for i in range(1000)]), "s16le")
    async with asyncio.timeout(30):
        async with serving(tiny, drain_timeout=0.3) as server:
            _, writer = await raw_session(server, small_buffers=True)
            writer.write(frame(Start(sample_rate=16000, chunk_ms=80).encode().encode(), opcode=1))
            for at in range(0, len(data), 6400):
                writer.write(frame(data[at : at + 6400]))
            [lane] = await lanes_of(server)
            await until(lambda: lane.processed > 50)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_the_port_is_taken(tiny: Recognizer) -> None:
    async with serving(tiny) as server:
        with pytest.raises(OSError, match="in use"):
            async with Server(tiny, ServerConfig(port=server.port)):
                pass


# Recording.


@pytest.mark.parametrize("encoding", ["s16le", "f32le"])
async def test_recordings_hold_what_was_sent(
    tiny: Recognizer, speech: Float32, tmp_path: Path, encoding: str
) -> None:
    data = encode(speech, encoding)
    start = Start(sample_rate=22050, encoding=encoding)  # type: ignore[arg-type]
    async with serving(tiny, record=tmp_path / "new" / "folder") as server:
        await caption(server, start, data, [1001])
    [path] = (tmp_path / "new" / "folder").iterdir()
    heard, rate = soundfile.read(path, dtype="int16" if encoding == "s16le" else "float32")
    assert rate == 22050
    assert heard.tobytes() == data


async def test_a_recording_that_fails_is_logged_and_hurts_nobody(
    tiny: Recognizer,
    speech: Float32,
    expected: list[Message],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("not a folder")
    async with serving(tiny, record=tmp_path / "file") as server:
        assert await bystander(server, speech) == expected
    assert "cannot record" in caplog.text
