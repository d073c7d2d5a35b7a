"""The captioning server: WebSocket sessions, the web page and ``/healthz`` on one port.

    socket -> WireSession -> Lane.feed -> [Batcher] -> Lane.events -> WireSession -> socket

The path of the request chooses the wire protocol (`loquent.engine.wire`). Every session has a
reader and a writer, and nothing else runs for it on the event loop. The reader stops reading while
the lane is full, so that TCP itself slows a client down that sends faster than we recognise. Where
a client does not read, its own session waits; when that takes too long the session ends, and
nobody else has noticed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import time
from collections import deque
from collections.abc import Collection, Sequence
from http import HTTPStatus
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from websockets.asyncio.server import Server as SocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response
from websockets.protocol import State as ConnectionState
from websockets.typing import Subprotocol

from loquent.engine import web
from loquent.engine.batcher import Batcher, Lane
from loquent.engine.protocol import (
    MAX_MESSAGE,
    Audio,
    End,
    Finalize,
    Ready,
    Start,
    WireError,
    as_wire_error,
)
from loquent.engine.recognizer import Recognizer
from loquent.engine.recorder import Recorder
from loquent.engine.wire.dispatch import Bare, is_wire, open_session
from loquent.engine.wire.session import (
    Actions,
    Close,
    Context,
    Handshake,
    Mark,
    Refused,
    Send,
    WireSession,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How to serve. Times in seconds; port 0 takes any free one.

    page: the folder of the web page, None for no page. bare: the protocol of a WebSocket at ``/``.
    record: a folder in which the audio of every session is kept as a wav file, for debugging.
    allow_origins: web origins other than the server's own and this machine's whose pages may
    connect. idle_timeout: how long a client may say nothing. send_timeout: how long it may leave a
    message unread. drain_timeout: how long sessions may take to finish when the server is stopped.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    chunk_ms: int = 320
    max_sessions: int = 64
    page: Traversable | None = None
    bare: Bare = "vosk"
    record: Path | None = None
    allow_origins: Collection[str] = ()
    idle_timeout: float = 60.0
    send_timeout: float = 30.0
    drain_timeout: float = 10.0


class Server:
    """Serves one recogniser. Use as ``async with Server(recognizer, config) as server``."""

    def __init__(self, recognizer: Recognizer, config: ServerConfig | None = None) -> None:
        self.recognizer = recognizer
        self.config = config or ServerConfig()
        self.batcher = Batcher(recognizer)
        self._sessions: set[_Session] = set()
        self._draining = False
        self._server: SocketServer | None = None

    async def __aenter__(self) -> Server:
        await self.batcher.__aenter__()
        try:
            self._server = await serve(
                self._handle,
                self.config.host,
                self.config.port,
                process_request=self._process_request,
                process_response=_add_headers,
                select_subprotocol=_select_subprotocol,
                create_connection=_Connection,
                server_header="loquent",
                # Audio does not deflate, and a small message could inflate into a huge one.
                compression=None,
                # A little above our own limit, so that most oversized messages get our own answer.
                max_size=2 * MAX_MESSAGE,
                # While a client's audio backs up its pongs wait behind it, so a missing pong says
                # nothing; the idle and the send timeout find the dead.
                ping_interval=None,
            )
        except BaseException:
            await self.batcher.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop: take no more sessions, let those there are finish, close."""
        assert self._server is not None, "entered before it is left"
        self._draining = True
        self._server.close(close_connections=False)
        for session in list(self._sessions):
            session.stop()
        try:
            async with asyncio.timeout(self.config.drain_timeout):
                await self._server.wait_closed()
        except TimeoutError:
            logger.warning("%d sessions did not finish in time", len(self._sessions))
            for session in list(self._sessions):
                session.abort()
            await self._server.wait_closed()
        await self.batcher.__aexit__()

    @property
    def port(self) -> int:
        """The port it listens on."""
        assert self._server is not None, "not listening"
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def sessions(self) -> int:
        """How many sessions are open."""
        return len(self._sessions)

    def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        path = request.path.partition("?")[0]
        method = getattr(request, "method", "GET")  # older websockets know only GET
        if is_wire(path) and request.headers.get("Upgrade") is not None:
            return self._open(connection, request)
        if method not in ("GET", "HEAD"):
            return web.respond_text(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET works here.")
        if is_wire(path) and path != "/":
            return web.respond_text(HTTPStatus.UPGRADE_REQUIRED, "This address is a WebSocket.")
        head = method == "HEAD"
        if path == "/healthz":
            status = HTTPStatus.SERVICE_UNAVAILABLE if self._draining else HTTPStatus.OK
            return web.respond_json(status, self._health(), head=head)
        return web.static_file(self.config.page, path, head=head)

    def _open(self, connection: ServerConnection, request: Request) -> Response | None:
        """Make the session that a WebSocket request asks for, or say why there is none."""
        assert isinstance(connection, _Connection), "made by create_connection"
        headers: dict[str, str] = {}
        for name, value in request.headers.raw_items():
            known = headers.get(name.lower())
            headers[name.lower()] = value if known is None else f"{known}, {value}"
        origin = headers.get("origin")
        if not web.origin_allowed(origin, headers.get("host"), self.config.allow_origins):
            return web.respond_text(
                HTTPStatus.FORBIDDEN,
                f"Pages from {origin} may not connect; start the server with --allow-origin.",
            )
        bundle = self.recognizer.bundle
        context = Context(
            session=connection.session_id,
            bundle=bundle.name,
            languages=bundle.languages,
            now=time.time(),
        )
        try:
            handshake = Handshake.parse(request.path, headers)
            connection.wire = open_session(handshake, context, bare=self.config.bare)
        except Refused as refused:
            response = web.respond_text(refused.status, str(refused))
            response.headers.update(refused.headers)
            return response
        return None

    def _health(self) -> dict[str, Any]:
        return {
            "status": "draining" if self._draining else "ok",
            "bundle": self.recognizer.bundle.name,
            "sessions": len(self._sessions),
            "max_sessions": self.config.max_sessions,
        }

    async def _handle(self, connection: ServerConnection) -> None:
        assert isinstance(connection, _Connection), "made by create_connection"
        session = _Session(self, connection)
        if len(self._sessions) >= self.config.max_sessions:
            limit = self.config.max_sessions
            busy = WireError("busy", f"all {limit} sessions of this server are taken; try later")
            await session.fail(busy)
            return
        self._sessions.add(session)
        try:
            if self._draining:
                session.stop()
            await session.run()
        finally:
            self._sessions.discard(session)


class _Connection(ServerConnection):
    """A WebSocket with the session that its request asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.session_id = secrets.token_hex(8)
        self.wire: WireSession


class _Session:
    """One client, from its connection to its end."""

    def __init__(self, server: Server, connection: _Connection) -> None:
        self._server = server
        self._config = server.config
        self._connection = connection
        self._id = connection.session_id
        self._wire = connection.wire
        self._lane: Lane | None = None
        self._recorder: Recorder | None = None
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._stopping = False
        # Messages in the order in which the protocol made them, whoever comes to send them.
        self._outgoing: deque[str] = deque()
        self._sending = asyncio.Lock()
        self._close_with: Close | None = None

    async def run(self) -> None:
        """Serve the client until either side is done."""
        logger.info("session %s: open, from %s", self._id, self._connection.remote_address)
        try:
            await self._serve()
        except ConnectionClosed as exc:
            self._wire.lost()
            logger.info("session %s: client gone (%s)", self._id, exc)
        except _UnreadError:
            self._wire.lost()
            logger.info("session %s: client does not read; cut off", self._id)
            self.abort()
        except Exception as exc:
            if as_wire_error(exc).code == "internal":
                logger.exception("session %s: failed", self._id)
            await self.fail(exc)
        finally:
            if self._lane is not None:
                self._lane.close()
            if self._recorder is not None:
                await asyncio.to_thread(self._recorder.close)
            logger.info("session %s: %s", self._id, self._wire.state)

    def stop(self) -> None:
        """The server is going down: read no more, finish what was heard."""
        self._stopping = True
        self._stop_reading()

    def abort(self) -> None:
        """Cut the connection."""
        if not self._gone:
            self._connection.transport.abort()

    async def fail(self, error: Exception) -> None:
        """Tell the client why it cannot go on, and close."""
        logger.info("session %s: %s", self._id, as_wire_error(error))
        try:
            await self._perform(self._wire.error(error))
        except (ConnectionClosed, _UnreadError):
            self.abort()
        else:
            await self._close()

    async def _serve(self) -> None:
        try:
            await self._perform(self._wire.connected())
            self._reader = asyncio.create_task(self._read())
            if self._stopping or (self._writer is not None and self._writer.done()):
                self._reader.cancel()
            await asyncio.wait([self._reader])  # the writer cancels it when it is done first
            if self._writer is not None and self._writer.done():
                self._writer.result()
            if not self._reader.cancelled():
                self._reader.result()
            if self._close_with is None:
                # Reading ended by our wish: the server stops, or the client has been silent.
                await self._perform(self._wire.end(None if self._stopping else self._silent()))
                if self._writer is not None:
                    await asyncio.wait([self._writer])
                    self._writer.result()
            await self._close()
        finally:
            tasks = [task for task in (self._reader, self._writer) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.cancel()

    @property
    def _patience(self) -> float:
        return self._wire.patience or self._config.idle_timeout

    def _silent(self) -> WireError:
        idle = WireError("idle", f"got nothing for {self._patience:g} s; connect again to go on")
        logger.info("session %s: %s", self._id, idle)
        return idle

    async def _read(self) -> None:
        while self._close_with is None:
            try:
                async with asyncio.timeout(None if self._wire.draining else self._patience):
                    message = await self._connection.recv()
            except TimeoutError:
                return
            await self._perform(self._wire.receive(message))

    async def _perform(self, actions: Actions) -> None:
        """Do what the protocol wants; messages go out first, in the order they were made in."""
        if said := [action.text for action in actions if isinstance(action, Send)]:
            # All are in line before this waits for anything: the other task may go on then.
            self._outgoing.extend(said)
            async with self._sending:
                while self._outgoing:
                    await self._send(self._outgoing.popleft())
        for action in actions:
            match action:
                case Start():
                    await self._start(action)
                case Audio(pcm=pcm):
                    assert self._lane is not None, "protocols start before they hear"
                    if self._recorder is not None:
                        await asyncio.to_thread(self._recorder.write, pcm)
                    await self._lane.feed(pcm)
                case Mark():
                    assert self._lane is not None, "protocols start before they hear"
                    await self._lane.mark()
                case Finalize():
                    assert self._lane is not None, "protocols start before they finalize"
                    await self._lane.finalize()
                case End():
                    assert self._lane is not None, "protocols start before they end"
                    self._lane.finish()
                case Close():
                    self._close_with = action

    async def _start(self, start: Start) -> None:
        recognizer = self._server.recognizer
        stream = recognizer.stream(
            sample_rate=start.sample_rate,
            chunk_ms=start.chunk_ms if start.chunk_ms is not None else self._config.chunk_ms,
            decoder=start.decoder,
            right_context_ms=start.right_context_ms,
        )
        if self._config.record is not None:
            self._recorder = await asyncio.to_thread(Recorder, self._config.record, self._id, start)
        self._lane = self._server.batcher.add(stream, start.sample_rate)
        self._writer = asyncio.create_task(self._write(self._lane))
        self._writer.add_done_callback(lambda _: self._stop_reading())
        ready = Ready(
            session=self._id,
            bundle=recognizer.bundle.name,
            decoder=stream.decoder,
            chunk_ms=recognizer.bundle.milliseconds(stream.segment),
            latency_ms=stream.latency_ms,
            sample_rate=start.sample_rate,
        )
        await self._perform(self._wire.ready(ready))

    async def _write(self, lane: Lane) -> None:
        while self._close_with is None:
            for event, progress in await lane.events():
                await self._perform(self._wire.event(event, progress))

    @property
    def _gone(self) -> bool:
        # On a connection that was lost with data in its buffer, asyncio's transport has no loop
        # any more, and websockets' send() and close() (17.4) trip over that.
        return self._connection.state is ConnectionState.CLOSED

    async def _send(self, text: str) -> None:
        if self._gone:
            raise self._connection.protocol.close_exc
        try:
            async with asyncio.timeout(self._config.send_timeout):
                await self._connection.send(text)
        except TimeoutError:
            raise _UnreadError from None

    async def _close(self) -> None:
        close = self._close_with or Close()
        code = close.code
        if self._stopping and code == CloseCode.NORMAL_CLOSURE:
            code = CloseCode.GOING_AWAY
        # A close frame holds 125 bytes, two of them the code.
        reason = close.reason.encode()[:123].decode(errors="ignore")
        if self._gone:
            return
        try:
            async with asyncio.timeout(self._config.send_timeout):
                await self._connection.close(code, reason)
        except TimeoutError:
            self.abort()


class _UnreadError(Exception):
    """The client has not read our messages for too long."""


def _select_subprotocol(
    connection: ServerConnection, offered: Sequence[Subprotocol]
) -> Subprotocol | None:
    assert isinstance(connection, _Connection), "made by create_connection"
    chosen = connection.wire.subprotocol
    return None if chosen is None else Subprotocol(chosen)


def _add_headers(connection: ServerConnection, request: Request, response: Response) -> None:
    assert isinstance(connection, _Connection), "made by create_connection"
    if response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
        response.headers.update(connection.wire.headers)
