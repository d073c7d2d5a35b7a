"""Every protocol over real sockets on one port, many clients of all kinds at once."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from loquent.engine.limits import Limits
from loquent.engine.recognizer import Recognizer
from loquent.engine.server import Server, ServerConfig
from loquent.engine.wire.openai import OpenAiSession

S16 = Callable[..., bytes]
Texts = Callable[..., list[str]]


def address(server: Server, path: str) -> str:
    return f"ws://127.0.0.1:{server.port}{path}"


async def rest(connection: ClientConnection, code: int = 1000) -> list[Any]:
    """Every message until the server closes, which it does by itself and in good order."""
    messages: list[Any] = []
    try:
        async with asyncio.timeout(30):
            while True:
                text = await connection.recv()
                assert isinstance(text, str)
                messages.append(json.loads(text) if text.startswith("{") else text)
    except ConnectionClosed:
        assert connection.close_code == code
    return messages


async def vosk(server: Server, data: bytes, path: str = "/vosk") -> list[str]:
    """In lock step, as its clients are: no audio is sent before the last answer is in."""
    said = []
    async with connect(address(server, path), proxy=None) as connection, asyncio.timeout(30):
        await connection.send('{"config": {"sample_rate": 16000}}')
        for at in range(0, len(data), 8000):
            await connection.send(data[at : at + 8000])
            answer = json.loads(await connection.recv())
            said += [answer["text"]] if "text" in answer else []
        await connection.send('{"eof" : 1}')
        [last] = await rest(connection)
        return [text for text in [*said, last["text"]] if text]


async def vosk_ahead(server: Server, data: bytes) -> list[str]:
    """A client that sends everything before it reads anything still gets an answer for each."""
    async with connect(address(server, "/"), proxy=None, max_queue=None) as connection:
        await connection.send('{"config": {"sample_rate": 16000}}')
        parts = [data[at : at + 1000] for at in range(0, len(data), 1000)]
        for part in parts:
            await connection.send(part)
        await connection.send('{"eof" : 1}')
        answers = await rest(connection)
        assert len(answers) == len(parts) + 1
        return [answer["text"] for answer in answers if answer.get("text")]


async def sherpa(server: Server, data: bytes) -> list[str]:
    floats = (np.frombuffer(data, "<i2") / 32768).astype("<f4").tobytes()
    async with connect(address(server, "/sherpa"), proxy=None) as connection:
        for at in range(0, len(floats), 10_001):
            await connection.send(floats[at : at + 10_001])
        await connection.send("Done")
        *messages, done = await rest(connection)
        assert done == "Done!"
        return [m["text"] for m in messages if m["is_final"]]


async def impatient(server: Server, path: str, data: bytes, done: str) -> list[str]:
    """A client that goes on sending behind its end, as a microphone that stops late does."""
    async with connect(address(server, path), proxy=None, max_queue=None) as connection:
        if path == "/vosk":
            await connection.send('{"config": {"sample_rate": 16000}}')
        await connection.send(data)
        await connection.send(done)
        for _ in range(20):
            await connection.send(bytes(4000))
        messages = await rest(connection)
        texts = [m["text"] for m in messages if m != "Done!" and m.get("is_final", "text" in m)]
        return " ".join(texts).split()


async def deepgram(server: Server, data: bytes) -> list[str]:
    path = "/v1/listen?encoding=linear16&sample_rate=16000&interim_results=true"
    async with connect(address(server, path), proxy=None) as connection:
        assert connection.response is not None
        request_id = connection.response.headers["dg-request-id"]
        for at in range(0, len(data), 6400):
            await connection.send(data[at : at + 6400])
        await connection.send('{"type": "CloseStream"}')
        *results, metadata = await rest(connection)
        assert metadata["request_id"] == request_id
        finals = [m["channel"]["alternatives"][0] for m in results if m["is_final"]]
        return [final["transcript"] for final in finals if final["transcript"]]


async def openai(server: Server, data: bytes) -> list[str]:
    path = "/v1/realtime?intent=transcription"
    done: list[str] = []
    async with connect(address(server, path), proxy=None) as connection, asyncio.timeout(30):
        update = {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16000}}}}
        await connection.send(json.dumps({"type": "session.update", "session": update}))
        for at in range(0, len(data), 6400):
            audio = base64.b64encode(data[at : at + 6400]).decode()
            await connection.send(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))
        await connection.send('{"type": "input_audio_buffer.commit"}')
        while len(done) < 2:
            message = json.loads(await connection.recv())
            assert message["type"] != "error"
            if message["type"].endswith(".completed"):
                done.append(message["transcript"])
    return done


async def test_all_protocols_at_once_on_one_port(tiny: Recognizer, s16: S16, texts: Texts) -> None:
    data = s16(16000)
    clients = [vosk, vosk_ahead, sherpa, deepgram, openai]
    async with Server(tiny, ServerConfig(port=0, chunk_ms=160)) as server:
        said = await asyncio.gather(*(client(server, data) for client in clients * 3))
        while server.sessions:
            await asyncio.sleep(0.01)
    assert said == [texts(16000)] * len(said)


async def test_what_comes_behind_the_end_costs_no_result(
    tiny: Recognizer, s16: S16, texts: Texts
) -> None:
    data = s16(16000)
    floats = (np.frombuffer(data, "<i2") / 32768).astype("<f4").tobytes()
    async with Server(tiny, ServerConfig(port=0, chunk_ms=160)) as server:
        heard = [
            await impatient(server, "/vosk", data, '{"eof": 1}'),
            await impatient(server, "/sherpa", floats, "Done"),
        ]
    assert heard == [" ".join(texts(16000)).split()] * 2


async def test_a_client_in_lock_step_waits_for_nobody(tiny: Recognizer, s16: S16) -> None:
    """An answer comes when this client's audio is done, though another's never ends."""
    async with Server(tiny, ServerConfig(port=0, chunk_ms=160)) as server:
        flood = asyncio.create_task(vosk_ahead(server, s16(16000) * 10))
        async with connect(address(server, "/vosk"), proxy=None) as connection:
            for _ in range(20):
                await connection.send(bytes(1600))
                async with asyncio.timeout(5):
                    assert json.loads(await connection.recv()) == {"partial": ""}
        await flood


async def test_who_pushes_to_talk_may_be_silent_in_between(
    tiny: Recognizer, s16: S16, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's protocol has no KeepAlive, and the server speaks first."""
    limits = Limits(start_timeout=0.1)
    async with (
        Server(tiny, ServerConfig(port=0, limits=limits, idle_timeout=0.1)) as server,
        connect(address(server, "/v1/realtime"), proxy=None) as connection,
    ):
        for _ in range(2):
            await asyncio.sleep(0.4)
            audio = base64.b64encode(s16(24000)).decode()
            append = {"type": "input_audio_buffer.append", "audio": audio}
            await connection.send(json.dumps(append))
            await connection.send('{"type": "input_audio_buffer.commit"}')
            async with asyncio.timeout(10):
                while not json.loads(await connection.recv())["type"].endswith(".completed"):
                    pass
        monkeypatch.setattr(OpenAiSession, "patience", 0.2)
        await connection.send('{"type": "input_audio_buffer.clear"}')
        error = (await rest(connection, 1008))[-1]["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "session_expired")


async def test_what_a_bare_address_means(tiny: Recognizer) -> None:
    async with (
        Server(tiny, ServerConfig(port=0, bare="sherpa")) as server,
        connect(address(server, "/"), proxy=None) as connection,
    ):
        await connection.send("Done")
        last, done = await rest(connection)
        assert (last["text"], done) == ("", "Done!")


async def test_handshakes_of_browsers(tiny: Recognizer) -> None:
    async with Server(tiny, ServerConfig(port=0)) as server:
        for path, offered, chosen in [
            ("/v1/listen", ["token", "abc"], "token"),
            ("/v1/realtime", ["realtime", "openai-insecure-api-key.abc"], "realtime"),
            ("/v1/stream", ["loquent.v1"], "loquent.v1"),
        ]:
            async with connect(
                address(server, path),
                subprotocols=offered,  # type: ignore[arg-type]
                proxy=None,
            ) as connection:
                assert connection.subprotocol == chosen


async def test_a_refused_option_names_itself(tiny: Recognizer) -> None:
    async with Server(tiny, ServerConfig(port=0)) as server:
        with pytest.raises(InvalidStatus) as caught:
            async with connect(address(server, "/v1/listen?encoding=opus"), proxy=None):
                pass
    assert caught.value.response.status_code == 400
    assert "linear16" in caught.value.response.headers["dg-error"]


async def test_a_server_that_stops_delivers_what_was_heard(tiny: Recognizer, s16: S16) -> None:
    async with Server(tiny, ServerConfig(port=0, chunk_ms=160)) as server:
        path = "/v1/listen?encoding=linear16&sample_rate=16000"
        async with connect(address(server, path), proxy=None) as connection:
            await connection.send(s16(16000)[:64000])
            while not server.batcher.lanes or server.batcher.lanes[0].received < 1.9:
                await asyncio.sleep(0.01)
            closing = asyncio.create_task(server.__aexit__())
            messages = await rest(connection, code=1001)
            await closing
    assert [m["type"] for m in messages] == ["Results", "Metadata"]
    assert messages[0]["channel"]["alternatives"][0]["transcript"] == "bana bana kiwi"
