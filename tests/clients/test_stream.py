"""`loquent serve` and `loquent stream`, each in a process of its own, and the client library."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from loquent.clients import cli
from loquent.clients.client import UnreachableError, connect
from loquent.clients.stream import Timeline
from loquent.engine.events import Ended, Event, Final, Partial
from loquent.engine.protocol import Start, WireError
from loquent.engine.recognizer import Recognizer

Float32 = NDArray[np.float32]


def lines_of(out: str) -> list[tuple[float, float, str, str]]:
    """Printed events: time in the audio, lag, kind, text."""
    events = []
    for line in out.splitlines():
        end, lag, rest = line.split(maxsplit=2)
        kind, text = rest.split("  ", 1)
        events.append((float(end), float(lag), kind.strip(), text.strip()))
    return events


@pytest.mark.parametrize("chunk_ms", [40, 320])
def test_server_and_offline_give_the_same_text(
    serve: Any, start: Any, bundle: str, speech: Path, chunk_ms: int, capsys: Any
) -> None:
    _, url = serve()
    options = ["--chunk-ms", str(chunk_ms)]
    program = start("stream", str(speech), "--url", url, "--rate", "4", *options)
    assert program.wait() == 0
    events = lines_of(program.out)
    texts = [text for _, _, kind, text in events if kind.startswith("final")]
    assert cli.main(["transcribe", str(speech), "--bundle", bundle, *options]) == 0
    assert "".join(f"{text}\n" for text in texts) == capsys.readouterr().out
    assert texts == ["bana bana kiwi", "solo"]
    assert [kind for _, _, kind, _ in events if kind.startswith("final")] == [
        "final (endpoint)",
        "final (end)",
    ]
    assert sum(kind == "partial" for _, _, kind, _ in events) >= 3
    assert f"tiny, rnnt, {chunk_ms} ms at a time" in program.err
    summary = program.err.splitlines()[-1]
    assert summary.startswith("3.90 s of audio; partial lag: median 0.")
    assert "p90" in summary
    assert "s from the end" in summary


def test_right_context_of_the_server_and_of_the_session(
    serve: Any, start: Any, speech: Path
) -> None:
    _, url = serve("--right-context-ms", "80")
    for options, behind in ([], 412.5), (["--right-context-ms", "0"], 332.5):
        program = start("stream", str(speech), "--url", url, "--rate", "0", *options)
        assert program.wait() == 0
        assert f"at best {behind} ms behind" in program.err


def test_audio_is_sent_at_the_pace_of_speech(serve: Any, start: Any, speech: Path) -> None:
    _, url = serve()
    program = start("stream", str(speech), "--url", url, "--packet-ms", "50")
    assert program.wait() == 0
    for end, lag, kind, _ in lines_of(program.out):
        # Nothing can be known before it is sent; a word takes its chunk and right context at most.
        assert 0 <= lag < 10, (end, kind)
    first = lines_of(program.out)[0]
    assert first[1] > 0.04, "the first word cannot come before its right context"


def test_lags_are_measured_from_when_the_audio_was_sent() -> None:
    now = 0.0
    timeline = Timeline(clock=lambda: now)
    for number in range(1, 6):  # 0.1 s of audio every 0.2 s
        now = number * 0.2
        timeline.sent(number / 10)
    timeline.finished()

    def partial(end: float) -> Partial:
        return Partial(segment=0, start=0.0, end=end, committed="", tentative="x", words=())

    def final(end: float) -> Final:
        return Final(segment=0, start=0.0, end=end, text="x", words=(), reason="end")

    now = 1.5
    assert timeline.lag(partial(0.1)) == pytest.approx(1.5 - 0.2)  # the last sample of packet 1
    assert timeline.lag(partial(0.11)) == pytest.approx(1.5 - 0.4)  # the first of packet 2
    assert timeline.lag(partial(0.5)) == pytest.approx(0.5)
    assert timeline.lag(final(0.6)) == pytest.approx(0.5)  # in the padding
    assert timeline.summary() == (
        "0.50 s of audio; partial lag: median 1.100 s, p90 1.260 s, n 3; "
        "final lag: median 0.500 s, p90 0.500 s, n 1; last final +0.500 s from the end"
    )
    assert Timeline().summary() == "0.00 s of audio; partial lag: none; final lag: none"


# When something breaks.


def test_the_server_is_killed_in_mid_stream(serve: Any, start: Any, speech: Path) -> None:
    server, url = serve()
    program = start("stream", str(speech), "--url", url)
    program.wait_for("partial")
    server.process.kill()
    assert program.wait() == 1
    assert "the connection to the server broke off" in program.err
    assert "Traceback" not in program.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_is_stopped_in_mid_stream(
    serve: Any, start: Any, speech: Path, number: signal.Signals
) -> None:
    server, url = serve()
    program = start("stream", str(speech), "--url", url)
    program.wait_for("bana")
    server.process.send_signal(number)
    assert server.wait() == 0
    assert "stopping, 1 sessions open" in server.err
    assert "Traceback" not in server.err
    assert program.wait() == 1
    assert "ended the session before the file was sent" in program.err
    # What was heard so far was still delivered.
    assert lines_of(program.out)[-1][2] == "final (end)"


def test_ctrl_c_while_streaming(serve: Any, start: Any, speech: Path) -> None:
    _, url = serve()
    program = start("stream", str(speech), "--url", url)
    program.wait_for("partial")
    program.interrupt()
    assert program.wait() == 130
    assert "Traceback" not in program.err


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ws://127.0.0.1:1/v1/stream", "is `loquent serve` running there?"),
        ("http://127.0.0.1/", "expected an address such as ws://"),
        ("nonsense", "expected an address such as ws://"),
    ],
)
def test_there_is_no_server(
    speech: Path, capsys: pytest.CaptureFixture[str], url: str, said: str
) -> None:
    assert cli.main(["stream", str(speech), "--url", url]) == 1
    assert said in capsys.readouterr().err


def test_a_server_that_speaks_no_websocket(
    serve: Any, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = serve()
    assert cli.main(["stream", str(speech), "--url", url.replace("stream", "else")]) == 1
    assert "refused with HTTP 404" in capsys.readouterr().err


def test_a_server_that_refuses(
    serve: Any, speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = serve()
    assert cli.main(["stream", str(speech), "--url", url, "--chunk-ms", "50"]) == 1
    assert "320" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["nan", "empty"])
def test_a_file_that_breaks_on_the_way(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    _, url = serve()
    pcm = np.zeros(16000, np.float32)
    pcm[8000] = np.nan
    path = tmp_path / "bad.wav"
    soundfile.write(path, pcm if damage == "nan" else pcm[:0], 16000, subtype="FLOAT")
    assert cli.main(["stream", str(path), "--url", url, "--rate", "0"]) == 1
    assert str(path) in capsys.readouterr().err


# serve


def test_the_page_and_everything_that_it_names_is_served(serve: Any) -> None:
    _, url = serve()
    base = url.replace("ws://", "http://").removesuffix("v1/stream")
    with urllib.request.urlopen(base) as answer:
        page = answer.read().decode()
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    names = [part.split('"')[0] for key in ('src="', 'href="') for part in page.split(key)[1:]]
    names = [name for name in names if not name.startswith("#")]
    assert any(name.endswith(".js") for name in names)
    for name in names:
        with urllib.request.urlopen(base + name) as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"] != "application/octet-stream"


def test_the_port_is_taken(serve: Any, bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, url = serve()
    port = url.split(":")[2].split("/")[0]
    assert cli.main(["serve", "--bundle", bundle, "--port", port]) == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_wrong_options_stop_the_server(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--bundle", bundle, "--chunk-ms", "50"]) == 1
    assert "320" in capsys.readouterr().err


def test_a_stopped_server_leaves_its_port(serve: Any) -> None:
    server, url = serve()
    port = int(url.split(":")[2].split("/")[0])
    server.interrupt()
    assert server.wait() == 0
    assert "stopping, 0 sessions open" in server.err
    with socket.socket() as sock, pytest.raises(ConnectionRefusedError):
        sock.connect(("127.0.0.1", port))


def test_recording_and_health(serve: Any, start: Any, speech: Path, tmp_path: Path) -> None:
    _, url = serve("--record", str(tmp_path / "kept"), "--max-sessions", "3", "-v")
    with urllib.request.urlopen(url.replace("ws:", "http:").replace("v1/stream", "healthz")) as a:
        assert json.load(a)["max_sessions"] == 3
    assert start("stream", str(speech), "--url", url, "--rate", "0").wait() == 0
    [path] = (tmp_path / "kept").iterdir()
    heard, rate = soundfile.read(path, dtype="float32")
    sent, _ = soundfile.read(speech, dtype="float32")
    assert rate == 16000
    assert np.array_equal(heard, sent)


# The client library.


async def session_events(url: str, start: Start, pcm: NDArray[Any], size: int) -> list[Event]:
    async with connect(url, start) as session:
        assert session.ready.sample_rate == start.sample_rate
        for at in range(0, len(pcm), size):
            await session.send(pcm[at : at + size])
        await session.end()
        events = [event async for event in session]
        assert session.progress.received == session.progress.processed
        return events


def test_the_client_library(serve: Any, bundle: str, speech: Path) -> None:
    _, url = serve()
    recognizer = Recognizer.load(bundle)
    for dtype, encoding in (("int16", "s16le"), ("float32", "f32le")):
        pcm, rate = soundfile.read(speech, dtype=dtype)
        # One call may send more than a message holds.
        long = np.tile(pcm, 10)
        start = Start(sample_rate=rate, encoding=encoding, chunk_ms=320)  # type: ignore[arg-type]
        events = asyncio.run(session_events(url, start, long, len(long)))
        assert isinstance(events[-1], Ended)
        assert events[-1].duration == len(long) / rate
        finals = [event for event in events if isinstance(event, Final)]
        assert finals == recognizer.transcribe(long, rate, chunk_ms=320)


def test_the_client_library_tells_what_is_wrong(serve: Any) -> None:
    server, url = serve()

    async def refused() -> None:
        async with connect(url, Start(sample_rate=7)):
            pass

    with pytest.raises(WireError, match="8000 to 48000"):
        asyncio.run(refused())

    async def broken() -> None:
        async with connect(url, Start(sample_rate=16000)) as session:
            server.process.kill()
            await asyncio.sleep(0.1)
            while True:
                await session.send(np.zeros(100_000, np.int16))

    with pytest.raises(UnreachableError, match="broke off"):
        asyncio.run(broken())


def test_a_server_that_says_nothing() -> None:
    async def run() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()
            done.set()

        done = asyncio.Event()
        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            url = f"ws://127.0.0.1:{port}/v1/stream"
            with pytest.raises(UnreachableError, match="timed out"):
                async with connect(url, Start(sample_rate=16000), patience=0.2):
                    pass
            await done.wait()

    asyncio.run(run())
