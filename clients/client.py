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
import itertools
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal
from urllib.parse import urlencode, urlsplit, urlunsplit

import numpy as np
import numpy.typing as npt
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.protocol import State
from websockets.typing import Subprotocol

from loquent.engine.errors import ProtocolError
from loquent.engine.events import Ended, Event, Finalized
from loquent.engine.hotwords import Hotword
from loquent.engine.protocol import (
    END,
    FINALIZE,
    MAX_MESSAGE,
    SUBPROTOCOL,
    Progress,
    Ready,
    Resume,
    SetHotwords,
    Standing,
    Start,
    WireError,
    decode_numbered,
)
from loquent.engine.web import is_loopback

Samples = npt.NDArray[Any]

# Seconds of audio that the server has not confirmed, from which on `send` waits.
KEEP = 60.0
# Seconds for which a lost session tries to come back.
RESUME_TIME = 60.0
# Of ours, for a connection that is given up while its session goes on: 1000 would end the session.
_WILL_BE_BACK = 4000


class UnreachableError(ProtocolError):
    """The server cannot be reached, or is gone before the session ended."""


class Session:
    """An open session. `ready` is the server's answer, `progress` how far it says it has come.

    With ``Start(resume=True)`` it goes on over a new connection when one is lost: what the server
    has not confirmed is kept here, `KEEP` seconds of audio at most, and sent again.
    """

    def __init__(self, url: str, start: Start, patience: float, key: str | None = None) -> None:
        self._url, self._start, self._patience, self._key = url, start, patience, key
        self._dtype = np.dtype("<i2" if start.encoding == "s16le" else "<f4")
        self.ready: Ready
        self.progress = Progress(received=0.0, processed=0.0)
        self.connections = 0
        self._connection: ClientConnection
        self._sending = asyncio.Lock()  # what is sent and what is sent again must not mix
        self._seq = 0
        self._sent = 0  # samples
        self._kept: deque[tuple[int, bytes]] = deque()  # audio with the sample that it begins at
        self._finalizes: deque[int] = deque()  # samples sent before each that is not answered
        self._finalized = 0
        self._hotwords: str | None = None  # as they were last changed
        self._ended = False
        self._room = asyncio.Event()
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._over = False

    async def send(self, pcm: Samples) -> None:
        """Send mono samples, shape (N,), int16 for s16le and float32 for f32le.

        Waits while the server has enough to do. Raises UnreachableError.
        """
        assert pcm.dtype.kind == self._dtype.kind, (pcm.dtype, self._dtype)
        data = pcm.astype(self._dtype, copy=False).tobytes()
        size = MAX_MESSAGE if not self._start.resume else MAX_MESSAGE // 16
        for at in range(0, len(data), size):
            await self._send(data[at : at + size])

    async def finalize(self) -> None:
        """Settle all that was sent so far; `Finalized` comes once it is."""
        await self._send(FINALIZE)

    async def set_hotwords(self, hotwords: Sequence[Hotword]) -> None:
        """Lean towards these phrases instead, from the next chunk on."""
        self._hotwords = SetHotwords(hotwords=tuple(hotwords)).encode()
        await self._send(self._hotwords)

    async def end(self) -> None:
        """All audio is sent."""
        await self._send(END)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The events, `Ended` last. Raises WireError as the server says, or UnreachableError."""
        while True:
            event = await self._events.get()
            if isinstance(event, Exception):
                self._events.put_nowait(event)  # for whoever asks again
                raise event
            yield event
            if isinstance(event, Ended):
                return

    async def pump(self) -> None:
        """Fetch events, and connections for them, until `Ended`. `connect` has it running."""
        try:
            while not self._over:
                connection = self._connection
                try:
                    event = await self._receive(connection)
                except UnreachableError:
                    if not self._start.resume:
                        raise
                    async with self._sending:
                        if connection is self._connection:
                            await self._come_back()
                    continue
                if event is not None:
                    self._over = isinstance(event, Ended)
                    self._events.put_nowait(event)
        except Exception as exc:
            self._events.put_nowait(exc)
        finally:
            self._over = True
            self._room.set()

    async def open(self) -> None:
        """Connect. Raises UnreachableError, WireError."""
        await self._open(self._url, self._start.encode())

    async def close(self) -> None:
        """Leave the session. Idempotent."""
        # On a connection that was lost with data in its buffer websockets' close() (17.4) raises.
        if self.connections and self._connection.state is not State.CLOSED:
            await self._connection.close()

    async def _open(self, url: str, hello: str) -> None:
        connection = await _dial(url, self._patience, self._key)
        try:
            await connection.send(hello)
            async with asyncio.timeout(self._patience):
                message, _, _ = decode_numbered(await connection.recv(decode=True))
            if not isinstance(message, Ready):
                raise ProtocolError(f"got {type(message).__name__} from {self._url}, not ready")
        except BaseException as exc:
            if connection.state is not State.CLOSED:
                await connection.close(_WILL_BE_BACK if self.connections else 1000)
            if isinstance(exc, ConnectionClosed):
                raise _gone(exc) from exc
            if isinstance(exc, TimeoutError):
                raise UnreachableError(
                    f"{self._url} did not answer within {self._patience:g} s"
                ) from exc
            raise
        self._connection, self.ready = connection, message
        self.connections += 1

    async def _send(self, message: str | bytes) -> None:
        if self._start.resume and isinstance(message, bytes):
            most = KEEP * self._start.sample_rate
            while not self._over and self._kept and self._sent - self._kept[0][0] > most:
                self._room.clear()
                await self._room.wait()
        async with self._sending:
            if self._start.resume:
                self._keep(message)
            try:
                await self._connection.send(message)
            except ConnectionClosed as exc:
                if not self._start.resume or self._over:
                    raise _gone(exc) from exc
                await self._come_back()  # and send it again, as it is among what is kept

    def _keep(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            self._kept.append((self._sent, message))
            self._sent += len(message) // self._dtype.itemsize
        elif message == FINALIZE:
            self._finalizes.append(self._sent)
        elif message == END:
            self._ended = True

    async def _come_back(self) -> None:
        """Resume on a new connection and send what the server does not have; `_sending` is held."""
        assert self.ready.resume is not None, "the server said so"
        deadline = time.monotonic() + RESUME_TIME
        for attempt in itertools.count():
            try:
                hello = Resume(token=self.ready.resume.token, seq=self._seq)
                await self._open(_returning(self._url), hello.encode())
                await self._replay(self.ready.resume)
                return
            except (UnreachableError, ConnectionClosed) as exc:
                if time.monotonic() > deadline:
                    if isinstance(exc, ConnectionClosed):
                        raise _gone(exc) from exc
                    raise
            except WireError as exc:
                if exc.code != "busy" or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(min(0.1 * 2**attempt, 1.0) * random.uniform(0.5, 1.0))

    async def _replay(self, standing: Standing) -> None:
        pieces: list[tuple[int, bytes | str]] = []
        for begin, data in self._kept:
            known = max(0, standing.samples - begin) * self._dtype.itemsize
            if known < len(data):
                pieces.append((max(begin, standing.samples), data[known:]))
        unknown = list(self._finalizes)[max(0, standing.finalizes - self._finalized) :]
        pieces.extend((at, FINALIZE) for at in unknown)
        # A call of finalize comes before the audio that begins where it was made.
        pieces.sort(key=lambda piece: (piece[0], isinstance(piece[1], bytes)))
        if self._hotwords and not standing.ended:
            await self._connection.send(self._hotwords)  # which the server may have or not
        for _, piece in pieces:
            await self._connection.send(piece)
        if self._ended and not standing.ended:
            await self._connection.send(END)

    async def _receive(self, connection: ClientConnection) -> Event | None:
        try:
            text = await connection.recv(decode=True)
        except ConnectionClosed as exc:
            raise _gone(exc) from exc
        message, progress, seq = decode_numbered(text)
        if progress is not None:
            self.progress = progress
            while self._kept and self._end_of(self._kept[0]) <= progress.samples:
                self._kept.popleft()
            self._room.set()
        if isinstance(message, Ready):
            raise ProtocolError(f"got a second ready from {self._url}")
        if seq is not None:
            if seq <= self._seq:
                return None  # sent again, but it had come
            self._seq = seq
        if isinstance(message, Finalized) and self._finalizes:
            self._finalizes.popleft()
            self._finalized += 1
        return message

    def _end_of(self, kept: tuple[int, bytes]) -> int:
        return kept[0] + len(kept[1]) // self._dtype.itemsize


@asynccontextmanager
async def connect(
    url: str, start: Start, *, patience: float = 10.0, key: str | None = None
) -> AsyncIterator[Session]:
    """Open a session at `url` (ws:// or wss://), waiting `patience` seconds for each answer.

    `key` is the API key, where the server asks for one.

    Raises:
        UnreachableError: there is no server, or it refuses.
        WireError: it does not take `start`; the message says why.
    """
    session = Session(url, start, patience, key)
    await session.open()
    pump = asyncio.create_task(session.pump())
    try:
        yield session
    finally:
        pump.cancel()
        await asyncio.wait([pump])
        await session.close()


def _returning(url: str) -> str:
    """The address at which a connection is not counted as one more session."""
    parts = urlsplit(url)
    query = "&".join(filter(None, [parts.query, urlencode({"resume": 1})]))
    return urlunsplit(parts._replace(query=query))


async def _dial(url: str, patience: float, key: str | None) -> ClientConnection:
    # A proxy that the environment names cannot reach this machine's own addresses.
    proxy: Literal[True] | None = None if is_loopback(urlsplit(url).hostname or "") else True
    try:
        return await open_websocket(
            url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers={} if key is None else {"Authorization": f"Bearer {key}"},
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


def _gone(exc: ConnectionClosed) -> UnreachableError:
    if exc.rcvd is None:
        return UnreachableError("the connection to the server broke off")
    why = exc.rcvd.reason or "no reason given"
    return UnreachableError(f"the server closed the connection ({exc.rcvd.code}: {why})")
