"""The same sessions on an ASGI server's sockets: in process, and under uvicorn where it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, MutableMapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loquent.clients.client import connect
from loquent.engine.asgi import App
from loquent.engine.events import Ended, Event, Final
from loquent.engine.host import ServerConfig
from loquent.engine.protocol import END, Start
from loquent.engine.recognizer import Recognizer

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
    assert session.connections == 2
    assert isinstance(events[-1], Ended)
    assert sum(isinstance(event, Final) for event in events) == 2
    server.should_exit = True
    await asyncio.wait_for(serving, 20)
