"""Servers on loopback and clients of them, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State

from loquent.engine.events import Event
from loquent.engine.lane import Lane
from loquent.engine.protocol import END, Start
from loquent.engine.recognizer import Recognizer
from loquent.engine.server import Server, ServerConfig

Float32 = NDArray[np.float32]
Message = dict[str, Any]
Speak = Callable[..., Float32]
Run = Callable[..., list[Event]]


START = Start(sample_rate=16000).encode()


@asynccontextmanager
async def serving(recognizer: Recognizer, **config: Any) -> AsyncIterator[Server]:
    async with Server(recognizer, ServerConfig(port=0, **config)) as server:
        yield server


def url_of(server: Server) -> str:
    return f"ws://127.0.0.1:{server.port}/v1/stream"


@asynccontextmanager
async def client(server: Server, **options: Any) -> AsyncIterator[ClientConnection]:
    connection = await connect(
        url_of(server), compression=None, ping_interval=None, proxy=None, **options
    )
    try:
        yield connection
    finally:
        # websockets 17 trips over a transport that is gone with data in its buffer.
        if connection.state is not State.CLOSED:
            await connection.close()


def encode(pcm: Float32, encoding: str) -> bytes:
    if encoding == "f32le":
        return pcm.astype("<f4").tobytes()
    return np.round(pcm * 32767).astype("<i2").tobytes()


def decode(data: bytes, encoding: str) -> NDArray[Any]:
    return np.frombuffer(data, "<f4" if encoding == "f32le" else "<i2")


async def receive_all(connection: ClientConnection) -> list[Message]:
    """Every message until the server closes."""
    messages = []
    with contextlib.suppress(ConnectionClosed):
        async with asyncio.timeout(60):
            while True:
                messages.append(json.loads(await connection.recv()))
    return messages


async def caption(
    server: Server, start: Start, data: bytes, packets: Sequence[int]
) -> list[Message]:
    """A whole session of a good client; `packets` are sizes in bytes, used over and over."""
    async with client(server) as connection:
        receiver = asyncio.create_task(receive_all(connection))
        await connection.send(start.encode())
        position = turn = 0
        while position < len(data):
            size = packets[turn % len(packets)]
            await connection.send(data[position : position + size])
            position, turn = position + size, turn + 1
        await connection.send(END)
        messages = await receiver
        assert connection.close_code == 1000
    assert [message["type"] for message in messages].count("ended") == 1
    assert messages[0]["type"] == "ready"
    return messages[1:]


def strip(message: Message) -> Message:
    """Without what depends on the time of day."""
    return {
        k: v for k, v in message.items() if k not in ("received", "processed", "lag", "lagging")
    }


def of_kind(messages: Sequence[Message], *kinds: str) -> list[Message]:
    return [strip(message) for message in messages if message["type"] in kinds]


def on_the_wire(events: Sequence[Event]) -> list[Message]:
    names = {"Partial": "partial", "Final": "final", "Ended": "ended"}
    return [
        json.loads(json.dumps({"type": names[type(event).__name__], **asdict(event)}))
        for event in events
    ]


def is_subsequence(few: Sequence[Message], many: Sequence[Message]) -> bool:
    rest = iter(many)
    return all(any(message == other for other in rest) for message in few)


async def bystander(server: Server, speech: Float32) -> list[Message]:
    """An innocent session; call it while others misbehave."""
    start = Start(sample_rate=16000, chunk_ms=160)
    messages = await caption(server, start, encode(speech, "s16le"), [640])
    return of_kind(messages, "final", "ended")


async def until(done: Callable[[], bool]) -> None:
    """Wait for something that the server does in its own time."""
    async with asyncio.timeout(30):
        while not done():  # there is no event for what a client cannot see
            await asyncio.sleep(0.01)


async def no_sessions(server: Server) -> None:
    """Wait until the server has forgotten everybody."""
    await until(lambda: not server.sessions and not server.batcher.lanes)


# A WebSocket client in bytes, for what a good library does not let one do.


async def raw_session(
    server: Server, *, small_buffers: bool = False
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """An open WebSocket; with small buffers the server soon notices what is not read."""
    sock = socket.socket()
    if small_buffers:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        assert server._server is not None
        for listening in server._server.sockets:  # the accepted ones inherit it
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    sock.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=sock, limit=2048)
    writer.write(
        b"GET /v1/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n"
    )
    assert b"101" in await reader.readline()
    while await reader.readline() != b"\r\n":
        pass
    return reader, writer


def frame(payload: bytes, *, opcode: int = 2, length: int | None = None) -> bytes:
    """A masked frame; `length` is what its header says."""
    length = len(payload) if length is None else length
    mask = os.urandom(4)
    header = bytes([0x80 | opcode])
    if length < 126:
        header += bytes([0x80 | length])
    elif length < 65536:
        header += struct.pack(">BH", 0x80 | 126, length)
    else:
        header += struct.pack(">BQ", 0x80 | 127, length)
    key = np.frombuffer((mask * (len(payload) // 4 + 1))[: len(payload)], np.uint8)
    return header + mask + (np.frombuffer(payload, np.uint8) ^ key).tobytes()


async def raw_frames(reader: asyncio.StreamReader) -> AsyncIterator[tuple[int, bytes]]:
    while True:
        first, length = await reader.readexactly(2)
        if length == 126:
            [length] = struct.unpack(">H", await reader.readexactly(2))
        elif length == 127:
            [length] = struct.unpack(">Q", await reader.readexactly(8))
        yield first & 15, await reader.readexactly(length)


async def raw_messages(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    async for opcode, payload in raw_frames(reader):
        if opcode == 8:
            return
        yield payload.decode()


async def close_code_of(reader: asyncio.StreamReader) -> int:
    async with asyncio.timeout(30):
        async for opcode, payload in raw_frames(reader):
            if opcode == 8:
                return int(struct.unpack(">H", payload[:2])[0])
    raise AssertionError("no close frame")


async def lanes_of(server: Server) -> list[Lane]:
    await until(lambda: len(server.batcher.lanes) > 0)
    return server.batcher.lanes
