"""POST /v1/audio/transcriptions over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from websockets.asyncio.client import connect

from loquent.engine import rest, upload
from loquent.engine.auth import Keys
from loquent.engine.events import Event, Final
from loquent.engine.limits import Limits
from loquent.engine.recognizer import Recognizer
from loquent.engine.server import Server, ServerConfig
from loquent.engine.wire.session import Refused
from loquent.engine.wire.transcription import PATH, MultipartForm, Options

S16 = Callable[..., bytes]
Texts = Callable[..., list[str]]
Fields = dict[str, Any]
BOUNDARY = "b0undary"
TYPE = f"multipart/form-data; boundary={BOUNDARY}"
KEY = "0123456789abcdef"


def form(fields: Fields) -> bytes:
    """A multipart body; bytes are files."""
    body = b""
    for name, values in fields.items():
        for value in values if isinstance(values, list) else [values]:
            more = '; filename="talk.wav"' if isinstance(value, bytes) else ""
            data = value if isinstance(value, bytes) else str(value).encode()
            head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
            body += head.encode() + data + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def request(body: bytes, path: str = PATH, **headers: str) -> bytes:
    names = {"Host": "x", "Content-Type": TYPE, "Content-Length": str(len(body))}
    names |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in names.items() if v), "", ""]
    return "\r\n".join(lines).encode() + body


async def answer(server: Server, data: bytes, packet: int = 1 << 20) -> tuple[int, Any]:
    """Status and body of what the server says to these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    async with asyncio.timeout(30):
        for at in range(0, len(data), packet):
            writer.write(data[at : at + packet])
            await writer.drain()
            if packet < 100:
                await asyncio.sleep(0)
        whole = await reader.read(-1)
    writer.close()
    await writer.wait_closed()
    head, _, body = whole.partition(b"\r\n\r\n")
    text = body.decode()
    return int(head.split()[1]), json.loads(text) if text.startswith("{") else text


def serving(tiny: Recognizer, **config: Any) -> Server:
    return Server(tiny, ServerConfig(port=0, chunk_ms=160, **config))


@pytest.fixture
def wav(s16: S16) -> bytes:
    buffer = io.BytesIO()
    pcm = np.frombuffer(s16(16000), "<i2")
    soundfile.write(buffer, pcm, 16000, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


async def test_every_format(tiny: Recognizer, wav: bytes, texts: Texts) -> None:
    finals = texts(16000)
    async with serving(tiny) as server:

        async def get(**fields: Any) -> Any:
            status, body = await answer(server, request(form({"file": wav, **fields})))
            assert status == 200
            return body

        usage = {"type": "duration", "seconds": 4}
        assert await get() == {"text": " ".join(finals), "usage": usage}
        assert await get(response_format="text") == " ".join(finals) + "\n"
        assert (await get(response_format="vtt")).startswith("WEBVTT\n")
        assert "-->" in await get(response_format="srt")
        verbose = await get(response_format="verbose_json", model="whisper-1")
        assert [segment["text"] for segment in verbose["segments"]] == [f" {t}" for t in finals]
        assert "words" not in verbose
        assert verbose["duration"] == pytest.approx(3.9)
        granular = {"timestamp_granularities[]": ["word"]}
        words = (await get(response_format="verbose_json", **granular))["words"]
        assert [word["word"] for word in words] == " ".join(finals).split()
        assert all(0 <= word["start"] <= word["end"] <= 3.9 for word in words)
        while server.batcher.lanes:
            await asyncio.sleep(0.01)


async def test_the_file_may_come_in_any_packets_and_beside_sessions(
    tiny: Recognizer, wav: bytes, texts: Texts
) -> None:
    data = request(form({"model": "x", "file": wav}))
    async with serving(tiny) as server:
        url = f"ws://127.0.0.1:{server.port}/vosk"
        async with connect(url, proxy=None) as session:
            jobs = [answer(server, data, packet=size) for size in (53, 1000, 7777, 1 << 20)]
            for status, body in await asyncio.gather(*jobs):
                assert (status, body["text"]) == (200, " ".join(texts(16000)))
            await session.send(bytes(3200))
            assert json.loads(await session.recv()) == {"partial": ""}


async def test_one_byte_at_a_time(tiny: Recognizer) -> None:
    data = request(form({"file": b"no audio"}))
    async with serving(tiny) as server:
        status, _ = await answer(server, data, packet=1)
    assert status == 400


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
async def test_other_kinds_of_files(
    tiny: Recognizer, tones: Callable[..., NDArray[np.float32]], kind: str
) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, tones([(0, 0.3), (1, 0.4), (2, 0.4), (0, 0.5)]), 16000, format=kind)
    async with serving(tiny) as server:
        status, body = await answer(server, request(form({"file": buffer.getvalue()})))
    assert (status, body["text"]) == (200, "bana bana")


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"model": "whisper-1"}, "file", "no file"),
        ({"file": [b"", b""]}, "file", "two files"),
        ({"file": b""}, None, "talk.wav: the file is empty"),
        ({"file": b"no audio at all"}, None, "talk.wav: cannot be read as audio"),
        ({"file": b"", "response_format": "doc"}, "response_format", "verbose_json"),
        ({"file": b"", "language": "fr"}, "language", "this server has xx"),
        ({"file": b"", "stream": "true"}, "stream", "/v1/realtime"),
        ({"file": b"", "prompt": "x" * 20_000}, None, "10000 bytes"),
        ({"file": b"", "a[]": ["1"] * 140}, None, "more than 128 fields"),
        ({"file": b"", "keywords[]": ["Ada", ""]}, "keywords", "empty hotword"),
    ],
)
async def test_mistakes_are_told(
    tiny: Recognizer, fields: Fields, param: str | None, said: str
) -> None:
    async with serving(tiny) as server:
        status, body = await answer(server, request(form(fields)))
        error = body["error"]
        assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert said in error["message"]
        assert "/tmp" not in error["message"]
        assert not server.batcher.lanes


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request(b"", path="/healthz"), 405),
        (request(b"x", Content_Type="text/plain"), 400),
        (request(b"x", Content_Type="multipart/form-data"), 400),
        (request(b"--" + BOUNDARY.encode() + b"\r\nbroken"), 400),
        (request(form({"file": b"x"})[:-10], Content_Length=""), 400),
        (request(b"", Content_Length=str(30 << 20)), 413),
        (request(b"", Content_Length="9" * 40), 400),
        (b"POST / SPDY/9\r\n\r\n", 400),
        (b"POST " + PATH.encode() + b" HTTP/1.1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 40_000, 431),
    ],
)
async def test_requests_that_cannot_be_met(tiny: Recognizer, data: bytes, status: int) -> None:
    async with serving(tiny) as server:
        assert (await answer(server, data))[0] == status


async def test_an_upload_without_a_stated_length_ends_at_the_limit(
    tiny: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "MAX_UPLOAD", 1000)
    body = form({"file": bytes(5000)})
    chunk = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    headers = {"Content_Length": "", "Transfer_Encoding": "chunked"}
    async with serving(tiny) as server:
        assert (await answer(server, request(b"", **headers) + chunk))[0] == 413


@pytest.mark.parametrize("kind", ["FLAC", "OGG"])
async def test_a_few_bytes_that_are_hours(tiny: Recognizer, kind: str) -> None:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 8000, 1, format=kind) as file:
        for _ in range(600):  # libsndfile's Vorbis encoder takes no more at a time
            file.write(np.zeros(8000, np.int16))
    assert len(buffer.getvalue()) < 100_000
    async with serving(tiny, limits=Limits(file_seconds=60.0)) as server:
        status, body = await answer(server, request(form({"file": buffer.getvalue()})))
        assert status == 413
        assert "more than 60 s" in body["error"]["message"]
        assert not server.batcher.lanes


async def test_keys_and_places(tiny: Recognizer, wav: bytes) -> None:
    data = form({"file": wav})
    keys = Keys.parse(f"me {KEY}", "here")
    async with serving(tiny, keys=keys) as server:
        status, body = await answer(server, request(data))
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert (await answer(server, request(data, Authorization=f"Bearer {KEY}")))[0] == 200
        assert (await answer(server, request(data, Origin="https://evil.example")))[0] == 403
    async with serving(tiny, max_sessions=1) as server:
        async with connect(f"ws://127.0.0.1:{server.port}/vosk", proxy=None):
            assert (await answer(server, request(data)))[0] == 503
        while server.sessions:
            await asyncio.sleep(0.01)
        assert (await answer(server, request(data)))[0] == 200


async def test_a_seat_that_was_taken_while_the_file_stood_in_line(
    tiny: Recognizer, tones: Any
) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, tones([(1, 0.5), (0, 1)] * 100), 16000, format="FLAC")
    data = request(form({"file": buffer.getvalue()}), Authorization=f"Bearer {KEY}")
    keys = Keys.parse(f"me {KEY}\nyou you-{KEY}\nthey they-{KEY}", "here")
    async with serving(
        tiny, keys=keys, limits=Limits(sessions_per_key=1), max_sessions=2
    ) as server:
        async with contextlib.AsyncExitStack() as stack:
            for name in ("you", "they"):
                address = f"ws://127.0.0.1:{server.port}/vosk?token={name}-{KEY}"
                await stack.enter_async_context(connect(address, proxy=None))
            jobs = [asyncio.create_task(answer(server, data)) for _ in range(2)]
            await asyncio.sleep(0.3)
        answers = await asyncio.gather(*jobs)
    assert sorted(status for status, _ in answers) == [200, 429]


# A page of another origin, as browsers ask for it.
ASK = f"OPTIONS {PATH} HTTP/1.1\r\nHost: x\r\nAccess-Control-Request-Method: POST\r\n"
ASKED = "authorization,x-stainless-os"


async def heads(server: Server, data: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers of what the server says to these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(data)
    async with asyncio.timeout(30):
        lines = (await reader.read(-1)).partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    writer.close()
    await writer.wait_closed()
    return int(lines[0].split()[1]), dict(line.lower().split(": ", 1) for line in lines[1:])


async def test_pages_of_other_origins(tiny: Recognizer, wav: bytes) -> None:
    """Those that --allow-origin names may ask, send and read, also why they get nothing."""
    friend, evil = "https://friend.example", "https://evil.example"
    keys = Keys.parse(f"me {KEY}", "here")
    async with serving(tiny, allow_origins=[friend], keys=keys) as server:
        ask = f"{ASK}Access-Control-Request-Headers: {ASKED}\r\nOrigin: %s\r\n\r\n"
        status, headers = await heads(server, (ask % friend).encode())
        assert status == 200
        assert headers["access-control-allow-origin"] == friend
        assert headers["access-control-allow-headers"] == ASKED
        assert headers["access-control-allow-methods"] == "post"
        assert headers["vary"] == "origin"
        status, headers = await heads(server, (ask % evil).encode())
        assert not any(name.startswith("access-control") for name in headers)
        body = form({"file": wav})
        for origin, key, code in [
            (friend, KEY, 200),
            (friend, "wrong", 401),
            (evil, KEY, 403),
            ("", KEY, 200),
        ]:
            data = request(body, Origin=origin, Authorization=f"Bearer {key}")
            status, headers = await heads(server, data)
            assert status == code
            allowed = friend if origin == friend else None
            assert headers.get("access-control-allow-origin") == allowed
        # Raw bytes, in the headers that are said again too, are no error of ours.
        raw = f"{ASK}Access-Control-Request-Headers: \xff\r\nOrigin: http://\xff".encode("latin-1")
        assert (await heads(server, raw.replace(b"x\r", b"\xff\r", 1) + b"\r\n\r\n"))[0] == 200
        assert (await heads(server, b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 405


async def test_a_client_that_sends_no_more_waits_all_the_same(
    tiny: Recognizer, tones: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has closed its half. Longer work is interrupted by signs of life, which HTTP allows."""
    monkeypatch.setattr(rest, "_LOOK", 0.02)
    buffer = io.BytesIO()
    soundfile.write(buffer, tones([(1, 0.5), (0, 1)] * 20), 16000, format="FLAC")
    async with serving(tiny) as server:
        for version, signs in (("HTTP/1.1", True), ("HTTP/1.0", False)):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            data = request(form({"file": buffer.getvalue()}))
            writer.write(data.replace(b"HTTP/1.1", version.encode(), 1))
            writer.write_eof()
            async with asyncio.timeout(30):
                whole = await reader.read(-1)
            writer.close()
            await writer.wait_closed()
            assert (b"HTTP/1.1 102 " in whole) == signs
            assert b"HTTP/1.1 200 " in whole
            assert json.loads(whole.rpartition(b"\r\n\r\n")[2])["text"].startswith("ba")


async def test_the_right_context_of_the_server(tiny: Recognizer, wav: bytes) -> None:
    heard = []
    stream = tiny.stream

    def watched(**options: Any) -> Any:
        heard.append(stream(**options))
        return heard[-1]

    async with serving(tiny, right_context_ms=0) as server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny, "stream", watched)
            assert (await answer(server, request(form({"file": wav}))))[0] == 200
    assert [stream.latency_ms for stream in heard] == [
        stream(chunk_ms=160, right_context_ms=0).latency_ms
    ]
    assert heard[0].latency_ms < stream(chunk_ms=160).latency_ms


async def test_text_is_written_where_the_language_has_a_finisher(
    write_bundle: Callable[..., Path], run: Callable[..., list[Event]], tmp_path: Path, wav: bytes
) -> None:
    english = Recognizer.load(
        write_bundle(tmp_path / "en", change=lambda m: m.update(languages={"en": "default"}))
    )
    pcm = soundfile.read(io.BytesIO(wav), dtype="int16")[0]
    events = run(english, english.stream(chunk_ms=160, finish=True), pcm, [1600])
    text = " ".join(event.text for event in events if isinstance(event, Final))
    assert text[:1].isupper()
    async with serving(english) as server:

        async def get(**fields: Any) -> Any:
            return (await answer(server, request(form({"file": wav, **fields}))))[1]

        assert (await get())["text"] == text
        granular = {"timestamp_granularities[]": ["word", "segment"]}
        verbose = await get(response_format="verbose_json", **granular)
        assert verbose["language"] == "english"
        assert "".join(segment["text"] for segment in verbose["segments"]).strip() == text
        words = [word["word"] for word in verbose["words"]]
        assert words == [token.rstrip(",.?") for token in text.split()]
        cues = (await get(response_format="srt")).split("\n\n")
        assert " ".join(cue.split("\n", 2)[2] for cue in cues).replace("\n", " ").strip() == text


async def test_a_client_that_asks_first_whether_to_go_on(tiny: Recognizer, wav: bytes) -> None:
    head, _, body = request(form({"file": wav}), Expect="100-continue").partition(b"\r\n\r\n")
    async with serving(tiny) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head + b"\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        writer.write(body)
        assert (await reader.read(-1)).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("abrupt", [False, True])
async def test_a_client_that_goes_away_is_forgotten(
    tiny: Recognizer, tones: Any, abrupt: bool
) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, tones([(1, 0.5), (0, 1)] * 100), 16000, format="FLAC")
    async with serving(tiny) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request(form({"file": buffer.getvalue()})))
        while not server.batcher.lanes:
            await asyncio.sleep(0.01)
        if abrupt:  # a reset
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(5):
            while server.batcher.lanes or server.files:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("patience", [30.0, 0.2])
async def test_a_server_that_stops_finishes_what_it_has_time_for(
    tiny: Recognizer, tones: Any, patience: float
) -> None:
    buffer = io.BytesIO()
    length = 4 if patience > 1 else 300
    soundfile.write(buffer, tones([(1, 0.5), (0, 1)] * length), 16000, format="FLAC")
    async with asyncio.timeout(20):
        async with serving(tiny, drain_timeout=patience) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request(form({"file": buffer.getvalue()})))
            while not server.batcher.lanes:
                await asyncio.sleep(0.01)
        heard = await reader.read(-1)
        writer.close()
        await writer.wait_closed()
    assert heard.startswith(b"HTTP/1.1 200") == (patience > 1)


# The form.


@settings(max_examples=40)
@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 600), max_size=6))
def test_the_file_comes_out_as_it_went_in(data: bytes, cuts: list[int]) -> None:
    if BOUNDARY.encode() in data:
        return
    body = form({"model": "x", "file": data, "prompt": ["a", "b"]})
    heard = bytearray()
    parsed = MultipartForm(TYPE, heard.extend)
    bounds = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    for a, b in zip(bounds, bounds[1:], strict=False):  # noqa: RUF007
        parsed.accept(body[a:b])
    parsed.finish()
    assert heard == data
    assert (parsed.filename, parsed.fields) == ("talk.wav", {"model": ["x"], "prompt": ["a", "b"]})


@settings(max_examples=60)
@given(st.binary(max_size=200))
def test_any_body_is_a_form_or_refused(data: bytes) -> None:
    for start in (b"", f"--{BOUNDARY}\r\n".encode(), form({"file": b"x"})[:-8]):
        parsed = MultipartForm(TYPE, lambda piece: None)
        try:
            parsed.accept(start + data)
            parsed.finish()
        except Refused as refused:
            assert refused.status == 400  # noqa: PT017


def test_ignored_fields_are_named() -> None:
    prose = "Umm, let me think like, hmm... Okay, here's what I'm, like, thinking."
    fields = {"prompt": [prose], "model": ["y"], "é": [""], "keywords[]": ["a\r\nb", "Ada"]}
    options = Options.parse(fields, ["en"], str.isalpha)
    assert options.report == "prompt, the phrase a\\r\\nb, \\xe9"
    assert [word.phrase for word in options.hotwords] == ["Ada"]


async def test_keywords_are_hotwords(tiny: Recognizer, wav: bytes) -> None:
    heard = []
    stream = tiny.stream

    def watched(**options: Any) -> Any:
        heard.append([word.phrase for word in options["hotwords"].hotwords])
        return stream(**options)

    async with serving(tiny) as server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny, "stream", watched)
            body = form({"file": wav, "keywords[]": ["kiwi", "Ωmega"], "prompt": "Bana, Solo."})
            assert (await answer(server, request(body)))[0] == 200
    assert heard == [["kiwi", "Bana", "Solo"]]
