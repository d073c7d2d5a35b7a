"""A small asyncio client for Loquent's server.

    async with connect("ws://127.0.0.1:8765/v1/stream", Start(sample_rate=16000)) as session:
        await session.send(pcm)        # mono, int16 or float32 as `encoding` says
        await session.end()
        async for event in session:    # Partial, Final, ..., Ended
            ...

Send and receive in two tasks for audio that is still coming. Events that nobody has taken yet wait
in memory; they are small.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.protocol import State
from websockets.typing import Subprotocol

from loquent.engine.errors import ProtocolError
from loquent.engine.events import Ended, Event
from loquent.engine.protocol import (
    END,
    FINALIZE,
    MAX_MESSAGE,
    SUBPROTOCOL,
    Progress,
    Ready,
    Start,
    decode_message,
)
from loquent.engine.web import is_loopback

Samples = npt.NDArray[Any]


class UnreachableError(ProtocolError):
    """The server cannot be reached, or is gone before the session ended."""


class Session:
    """An open session. `ready` is the server's answer, `progress` how far it says it has come."""

    def __init__(self, connection: ClientConnection, start: Start) -> None:
        self._connection = connection
        self._dtype = np.dtype("<i2" if start.encoding == "s16le" else "<f4")
        self.ready: Ready
        self.progress = Progress(received=0.0, processed=0.0)

    async def send(self, pcm: Samples) -> None:
        """Send mono samples, shape (N,), int16 for s16le and float32 for f32le.

        Waits while the server has enough to do. Raises UnreachableError.
        """
        assert pcm.dtype.kind == self._dtype.kind, (pcm.dtype, self._dtype)
        data = pcm.astype(self._dtype, copy=False).tobytes()
        for at in range(0, len(data), MAX_MESSAGE):
            await self._send(data[at : at + MAX_MESSAGE])

    async def finalize(self) -> None:
        """Settle all that was sent so far; `Finalized` comes once it is."""
        await self._send(FINALIZE)

    async def end(self) -> None:
        """All audio is sent."""
        await self._send(END)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The events, `Ended` last. Raises WireError as the server says, or UnreachableError."""
        while True:
            message = await self._receive()
            assert not isinstance(message, Ready), "checked by _receive"
            yield message
            if isinstance(message, Ended):
                return

    async def _send(self, message: str | bytes) -> None:
        try:
            await self._connection.send(message)
        except ConnectionClosed as exc:
            raise _gone(exc) from exc

    async def _receive(self) -> Ready | Event:
        try:
            text = await self._connection.recv(decode=True)
        except ConnectionClosed as exc:
            raise _gone(exc) from exc
        message, progress = decode_message(text)
        if progress is not None:
            self.progress = progress
        return message


@asynccontextmanager
async def connect(url: str, start: Start, *, patience: float = 10.0) -> AsyncIterator[Session]:
    """Open a session at `url` (ws:// or wss://), waiting `patience` seconds for each answer.

    Raises:
        UnreachableError: there is no server, or it refuses.
        WireError: it does not take `start`; the message says why.
    """
    # A proxy that the environment names cannot reach this machine's own addresses.
    proxy: Literal[True] | None = None if is_loopback(urlsplit(url).hostname or "") else True
    try:
        connection = await open_websocket(
            url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            compression=None,
            proxy=proxy,
            open_timeout=patience,
            # The server reads our pings behind our audio, which it may have paused for a while.
            ping_timeout=None,
            # Whoever sends a whole recording before it reads must not make the server wait.
            max_queue=None,
        )
    except InvalidURI as exc:
        raise UnreachableError(
            f"got {url!r}, expected an address such as ws://127.0.0.1:8765/v1/stream"
        ) from exc
    except InvalidStatus as exc:
        body = (exc.response.body or b"").decode(errors="replace").strip()
        raise UnreachableError(
            f"{url} refused with HTTP {exc.response.status_code} {body}".strip()
        ) from exc
    except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed) as exc:
        raise UnreachableError(
            f"cannot connect to {url} ({str(exc) or 'timed out'}); "
            "is `loquent serve` running there?"
        ) from exc
    try:
        session = Session(connection, start)
        await session._send(start.encode())
        try:
            async with asyncio.timeout(patience):
                message = await session._receive()
        except TimeoutError as exc:
            raise UnreachableError(f"{url} did not answer within {patience:g} s") from exc
        if not isinstance(message, Ready):
            raise ProtocolError(f"got {type(message).__name__} from {url}, expected ready")
        session.ready = message
        yield session
    finally:
        # On a connection that was lost with data in its buffer websockets' close() (17.4) raises.
        if connection.state is not State.CLOSED:
            await connection.close()


def _gone(exc: ConnectionClosed) -> UnreachableError:
    if exc.rcvd is None:
        return UnreachableError("the connection to the server broke off")
    why = exc.rcvd.reason or "no reason given"
    return UnreachableError(f"the server closed the connection ({exc.rcvd.code}: {why})")
