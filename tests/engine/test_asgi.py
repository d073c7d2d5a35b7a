"""The same sessions on an ASGI server's sockets: in process, and under uvicorn where it is."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from loquent.clients.client import connect
from loquent.engine.asgi import App, create_app
from loquent.engine.errors import ConfigError
from loquent.engine.events import Ended, Event, Final
from loquent.engine.host import ServerConfig
from loquent.engine.protocol import END, Resume, Start
from loquent.engine.recognizer import Recognizer
from loquent.engine.wire.transcription import PATH

Float32 = NDArray[np.float32]
Message = MutableMapping[str, Any]
SPEECH = [(1 + i % 8, 0.2) for i in range(8)] + [(0, 1.2)] + [(1, 0.4), (2, 0.4)]


class Client:
    """The other side of the application's ``receive`` and ``send``."""

    def __init__(self, app: App, kind: str, path: str, **scope: Any) -> None:
        self.to_app: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: asyncio.Queue[Message] = asyncio.Queue()
        self.scope = {"type": kind, "path": path, "headers": [], "client": ("127.0.0.1", 1)}
        self.scope |= {"method": "GET", "query_string": b"", "extensions": {}, **scope}
        self.task = asyncio.create_task(
            app(self.scope, self.to_app.get, self.sent.put)  # type: ignore[arg-type]
        )

    async def get(self) -> Message:
        return await asyncio.wait_for(self.sent.get(), 10)


async def app_of(recognizer: Recognizer, **config: Any) -> App:
    app = App(recognizer, ServerConfig(**config))
    life = Client(app, "lifespan", "")
    life.to_app.put_nowait({"type": "lifespan.startup"})
    assert (await life.get())["type"] == "lifespan.startup.complete"
    life.task.cancel()
    return app


async def test_a_session_says_what_the_offline_recogniser_says(
    tiny: Recognizer, tones: Callable[..., Float32], run: Callable[..., list[Event]]
) -> None:
    pcm = np.round(tones(SPEECH) * 32767).astype("<i2")
    whole = run(tiny, tiny.stream(chunk_ms=160), pcm, [1600])
    app = await app_of(tiny)
    client = Client(app, "websocket", "/v1/stream")
    client.to_app.put_nowait({"type": "websocket.connect"})
    assert (await client.get())["type"] == "websocket.accept"
    start = Start(sample_rate=16000, chunk_ms=160).encode()
    client.to_app.put_nowait({"type": "websocket.receive", "text": start, "bytes": None})
    for at in range(0, len(pcm), 1600):
        packet = pcm[at : at + 1600].tobytes()
        client.to_app.put_nowait({"type": "websocket.receive", "bytes": packet, "text": None})
    client.to_app.put_nowait({"type": "websocket.receive", "text": END})
    messages = []
    while (message := await client.get())["type"] == "websocket.send":
        messages.append(json.loads(message["text"]))
    assert (message["type"], message["code"]) == ("websocket.close", 1000)
    client.to_app.put_nowait({"type": "websocket.disconnect", "code": 1000})
    await asyncio.wait_for(client.task, 10)
    finals = [event.text for event in whole if isinstance(event, Final)]
    assert [m["text"] for m in messages if m["type"] == "final"] == finals
    assert messages[-1]["type"] == "ended"
    await app.stop()


async def test_a_client_comes_back_while_its_old_connection_seems_alive(tiny: Recognizer) -> None:
    app = await app_of(tiny, max_sessions=1)

    async def connected(hello: str, query: bytes = b"") -> tuple[Client, Message]:
        client = Client(app, "websocket", "/v1/stream", query_string=query)
        client.to_app.put_nowait({"type": "websocket.connect"})
        assert (await client.get())["type"] == "websocket.accept"
        client.to_app.put_nowait({"type": "websocket.receive", "text": hello})
        return client, json.loads((await client.get())["text"])

    old, ready = await connected(Start(sample_rate=16000, resume=True).encode())
    for _ in range(2):
        hello = Resume(token=ready["resume"]["token"]).encode()
        new, again = await connected(hello, b"resume=1")
        assert again["session"] == ready["session"]
        assert (await old.get())["type"] == "websocket.close"
        old = new
    new.to_app.put_nowait({"type": "websocket.receive", "text": END})
    assert json.loads((await new.get())["text"])["type"] == "ended"
    assert (await new.get())["type"] == "websocket.close"
    new.to_app.put_nowait({"type": "websocket.disconnect", "code": 1000})
    await asyncio.wait_for(new.task, 10)
    await app.stop()
    assert not app.host.sessions


# uvicorn says 1005 of a connection that is lost.
@pytest.mark.parametrize(("code", "waits"), [(1000, False), (1001, False), (1005, True)])
async def test_who_leaves_properly_is_not_waited_for(
    tiny: Recognizer, code: int, waits: bool
) -> None:
    app = await app_of(tiny)
    client = Client(app, "websocket", "/v1/stream")
    client.to_app.put_nowait({"type": "websocket.connect"})
    assert (await client.get())["type"] == "websocket.accept"
    hello = Start(sample_rate=16000, resume=True).encode()
    client.to_app.put_nowait({"type": "websocket.receive", "text": hello})
    assert json.loads((await client.get())["text"])["type"] == "ready"
    client.to_app.put_nowait({"type": "websocket.disconnect", "code": code})
    async with asyncio.timeout(10):
        while app.host.connected:
            await asyncio.sleep(0.01)
    assert len(app.host.sessions) == waits
    app.host.stop()
    await asyncio.wait_for(client.task, 10)
    await app.stop()


KEY = "correct-horse-battery"


async def test_the_environment_is_heeded(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and limits as ``loquent serve`` reads them; pages of the server's own name may come."""
    (tmp_path / "loquent.toml").write_text(f'bundle = "{tiny_bundle}"\nsessions-per-key = 1\n')
    monkeypatch.setenv("LOQUENT_CONFIG", str(tmp_path / "loquent.toml"))
    monkeypatch.setenv("LOQUENT_API_KEYS", f"alice:{KEY}")
    monkeypatch.setenv("LOQUENT_MAX_SESSIONS", "3")
    monkeypatch.setenv("LOQUENT_SNAPSHOTS", str(tmp_path / "sessions"))
    app = create_app()
    config = app.host.config
    assert (config.max_sessions, config.limits.sessions_per_key) == (3, 1)
    assert config.share_parked
    health = Client(app, "http", "/healthz")
    await health.get()
    assert json.loads((await health.get())["body"])["keys"]
    assert (await Client(app, "http", "/").get())["status"] == 200  # the page

    async def status(**headers: str) -> object:
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        extensions: Message = {"websocket.http.response": {}}
        client = Client(app, "websocket", "/v1/stream", headers=raw, extensions=extensions)
        client.to_app.put_nowait({"type": "websocket.connect"})
        answer = await client.get()
        client.to_app.put_nowait({"type": "websocket.disconnect", "code": 1001})
        return answer.get("status", answer["type"])

    key = {"authorization": f"Bearer {KEY}"}
    own = {"host": "captions.example", "origin": "https://captions.example"}
    assert await status() == 401
    assert await status(**key) == "websocket.accept"
    assert await status(**key, **own) == "websocket.accept"
    assert await status(**key, **own | {"origin": "https://evil.example"}) == 403
    await app.stop()
    # One that says where it listens is as careful about names as `loquent serve` is.
    monkeypatch.setenv("LOQUENT_HOST", "127.0.0.1")
    app = create_app()
    assert await status(**key, **own) == 403
    await app.stop()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("LOQUENT_MAX_SESSIONS", "many", "LOQUENT_MAX_SESSIONS: .*got 'many'"),
        ("LOQUENT_API_KEYS", "alice:short", "got a key of 5 characters"),
        ("LOQUENT_CHUNK_MS", "50", "got chunk_ms 50"),
        ("LOQUENT_WORKERS", "2", "uvicorn: .*--workers"),
        ("LOQUENT_TLS_CERT", "cert.pem", "uvicorn: --ssl-certfile"),
    ],
)
def test_an_environment_that_cannot_be_heeded_stops_the_start(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv("LOQUENT_BUNDLE", str(tiny_bundle))
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        create_app()


@pytest.mark.parametrize(
    ("path", "status"),
    [("/healthz", 200), ("/readyz", 200), ("/metrics", 200), ("/v1/stream", 426), ("/no", 404)],
)
async def test_http(tiny: Recognizer, path: str, status: int) -> None:
    app = await app_of(tiny)
    client = Client(app, "http", path)
    assert (await client.get())["status"] == status
    assert (await client.get())["body"]
    await app.stop()


async def test_refusals_say_why_where_the_server_lets_them(tiny: Recognizer) -> None:
    app = await app_of(tiny, max_sessions=1, wait_timeout=0.0)
    first = Client(app, "websocket", "/v1/stream")
    first.to_app.put_nowait({"type": "websocket.connect"})
    assert (await first.get())["type"] == "websocket.accept"
    await asyncio.sleep(0.05)
    second = Client(app, "websocket", "/v1/stream", extensions={"websocket.http.response": {}})
    second.to_app.put_nowait({"type": "websocket.connect"})
    answer = await second.get()
    assert (answer["type"], answer["status"]) == ("websocket.http.response.start", 503)
    assert dict(answer["headers"])[b"retry-after"] == b"5"
    third = Client(app, "websocket", "/v1/stream")
    third.to_app.put_nowait({"type": "websocket.connect"})
    assert (await third.get())["type"] == "websocket.close"
    first.to_app.put_nowait({"type": "websocket.disconnect", "code": 1001})
    await asyncio.wait_for(first.task, 10)
    await app.stop()


async def test_under_uvicorn(tiny: Recognizer, tones: Callable[..., Float32]) -> None:
    uvicorn = pytest.importorskip("uvicorn")
    app = App(tiny)
    settings = uvicorn.Config(app, port=0, log_level="error", ws="websockets-sansio")
    server = uvicorn.Server(settings)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    pcm = np.round(tones(SPEECH) * 32767).astype("<i2")
    url = f"ws://127.0.0.1:{port}/v1/stream"
    async with asyncio.timeout(30), connect(url, Start(sample_rate=16000, resume=True)) as session:
        await session.send(pcm[:30000])
        session._connection.transport.abort()
        await session.send(pcm[30000:])
        await session.end()
        events = [event async for event in session]
    request = Request(
        f"http://127.0.0.1:{port}{PATH}",
        form(tones(SPEECH)),
        {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"},
    )
    with await asyncio.to_thread(urlopen, request) as answer:
        finals = [event.text for event in events if isinstance(event, Final)]
        assert json.load(answer)["text"] == " ".join(finals)
    assert session.connections == 2
    assert isinstance(events[-1], Ended)
    assert sum(isinstance(event, Final) for event in events) == 2
    server.should_exit = True
    await asyncio.wait_for(serving, 20)


BOUNDARY = "b0undary"
FORM = {
    "method": "POST",
    "headers": [(b"content-type", f"multipart/form-data; boundary={BOUNDARY}".encode())],
}


def form(pcm: Float32) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, pcm, 16000, format="WAV")
    disposition = 'Content-Disposition: form-data; name="file"; filename="talk.wav"'
    head = f"--{BOUNDARY}\r\n{disposition}\r\n\r\n".encode()
    return head + file.getvalue() + f"\r\n--{BOUNDARY}--\r\n".encode()


async def test_a_file_that_is_posted(tiny: Recognizer, tones: Callable[..., Float32]) -> None:
    pcm = np.round(tones(SPEECH) * 32767).astype("<i2")
    finals = [final.text for final in tiny.transcribe(pcm, chunk_ms=160)]
    body = form(pcm)
    app = await app_of(tiny, chunk_ms=160)
    client = Client(app, "http", PATH, **FORM)
    for at in range(0, len(body), 5000):
        more = at + 5000 < len(body)
        piece = {"type": "http.request", "body": body[at : at + 5000], "more_body": more}
        client.to_app.put_nowait(piece)
    answer = await client.get()
    assert answer["status"] == 200
    assert dict(answer["headers"])[b"content-type"] == b"application/json"
    assert json.loads((await client.get())["body"])["text"] == " ".join(finals)
    await asyncio.wait_for(client.task, 10)
    assert not app.host.files
    await app.stop()


async def test_files_that_get_no_text(
    tiny: Recognizer, tones: Callable[..., Float32], caplog: pytest.LogCaptureFixture
) -> None:
    body = form(tones([(1, 20.0)]))
    app = await app_of(tiny)

    async def status(path: str, data: bytes, **scope: Any) -> int:
        client = Client(app, "http", path, **FORM | scope)
        client.to_app.put_nowait({"type": "http.request", "body": data, "more_body": False})
        return int((await client.get())["status"])

    assert await status("/v1/other", body) == 405
    assert await status(PATH, b"", method="OPTIONS") == 200
    assert await status(PATH, b"") == 400
    assert await status(PATH, body, headers=[(b"content-length", b"99999999")]) == 413
    # Gone in the middle of the file, and while it is recognised.
    for more in (True, False):
        client = Client(app, "http", PATH, **FORM)
        client.to_app.put_nowait({"type": "http.request", "body": body, "more_body": more})
        client.to_app.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(client.task, 10)
        assert client.sent.empty()
    assert not app.host.files
    assert not app.host.batcher.lanes
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    await app.stop()
