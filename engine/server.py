"""The captioning server: WebSocket sessions, the web page and ``/healthz`` on one port.

    socket -> ServerProtocol -> Lane.feed -> [Batcher] -> Lane.events -> ServerProtocol -> socket

Every session has a reader and a writer, and nothing else runs for it on the event loop. The reader
stops reading while the lane is full, so that TCP itself slows a client down that sends faster than
we recognise. The writer alone waits for a client that does not read; when that takes too long the
session ends, and nobody else has noticed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
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
from loquent.engine.events import Ended
from loquent.engine.protocol import (
    MAX_MESSAGE,
    PATH,
    SUBPROTOCOL,
    Audio,
    End,
    Ready,
    ServerProtocol,
    Start,
    State,
    WireError,
    as_wire_error,
)
from loquent.engine.recognizer import Recognizer
from loquent.engine.recorder import Recorder

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How to serve. Times in seconds; port 0 takes any free one.

    page: the folder of the web page, None for no page. record: a folder in which the audio of every
    session is kept as a wav file, for debugging. allow_origins: web origins other than the server's
    own and this machine's whose pages may connect. idle_timeout: how long a client may say nothing.
    send_timeout: how long it may leave a message unread. drain_timeout: how long sessions may take
    to finish when the server is stopped.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    chunk_ms: int = 320
    max_sessions: int = 64
    page: Traversable | None = None
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
                select_subprotocol=_select_subprotocol,
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
        if path == PATH and request.headers.get("Upgrade") is not None:
            origin, host = request.headers.get("Origin"), request.headers.get("Host")
            if web.origin_allowed(origin, host, self.config.allow_origins):
                return None
            return web.respond_text(
                HTTPStatus.FORBIDDEN,
                f"Pages from {origin} may not connect; start the server with --allow-origin.",
            )
        if method not in ("GET", "HEAD"):
            return web.respond_text(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET works here.")
        if path == PATH:
            return web.respond_text(HTTPStatus.UPGRADE_REQUIRED, "This address is a WebSocket.")
        head = method == "HEAD"
        if path == "/healthz":
            status = HTTPStatus.SERVICE_UNAVAILABLE if self._draining else HTTPStatus.OK
            return web.respond_json(status, self._health(), head=head)
        return web.static_file(self.config.page, path, head=head)

    def _health(self) -> dict[str, Any]:
        return {
            "status": "draining" if self._draining else "ok",
            "bundle": self.recognizer.bundle.name,
            "sessions": len(self._sessions),
            "max_sessions": self.config.max_sessions,
        }

    async def _handle(self, connection: ServerConnection) -> None:
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


class _Session:
    """One client, from its connection to its end."""

    def __init__(self, server: Server, connection: ServerConnection) -> None:
        self._server = server
        self._config = server.config
        self._connection = connection
        self._id = secrets.token_hex(8)
        self._protocol = ServerProtocol(languages=server.recognizer.bundle.languages)
        self._lane: Lane | None = None
        self._recorder: Recorder | None = None
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._stopping = False
        # What to tell the client in place of `ended`, when it was not the client that ended it.
        self._reason: WireError | None = None

    async def run(self) -> None:
        """Serve the client until either side is done."""
        logger.info("session %s: open, from %s", self._id, self._connection.remote_address)
        try:
            await self._serve()
        except ConnectionClosed as exc:
            self._protocol.lost()
            logger.info("session %s: client gone (%s)", self._id, exc)
        except _UnreadError:
            self._protocol.lost()
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
            logger.info("session %s: %s", self._id, self._protocol.state.value)

    def stop(self) -> None:
        """The server is going down: read no more, finish what was heard."""
        self._stopping = True
        if self._reader is not None:
            self._reader.cancel()

    def abort(self) -> None:
        """Cut the connection."""
        if not self._gone:
            self._connection.transport.abort()

    async def fail(self, error: Exception) -> None:
        """Tell the client why it cannot go on, and close."""
        text, code = self._protocol.error(error)
        logger.info("session %s: %s", self._id, text)
        try:
            await self._send(text)
        except (ConnectionClosed, _UnreadError):
            self.abort()
        else:
            await self._close(code, str(as_wire_error(error)))

    async def _serve(self) -> None:
        self._reader = asyncio.create_task(self._read())
        if self._stopping:
            self._reader.cancel()
        try:
            await asyncio.wait([self._reader])  # the writer cancels it when it is done first
            if self._writer is None or not self._writer.done():
                if not self._reader.cancelled():
                    self._reader.result()
                # Reading ended by our wish: the server stops, or the client has been idle.
                if self._lane is not None and self._writer is not None:
                    self._protocol.end()
                    self._lane.finish()
                    await asyncio.wait([self._writer])
            if self._writer is not None:
                self._writer.result()
            await self._close(CloseCode.GOING_AWAY if self._stopping else CloseCode.NORMAL_CLOSURE)
        finally:
            tasks = [task for task in (self._reader, self._writer) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        while True:
            try:
                # After `end` the client has nothing to say, for as long as we need.
                draining = self._protocol.state is State.DRAINING
                async with asyncio.timeout(None if draining else self._config.idle_timeout):
                    message = await self._connection.recv()
            except TimeoutError:
                seconds = self._config.idle_timeout
                idle = WireError("idle", f"got nothing for {seconds:g} s; connect again to go on")
                if self._lane is None:
                    raise idle from None
                self._reason = idle
                return
            match self._protocol.receive(message):
                case Start() as start:
                    await self._start(start)
                case Audio(pcm=pcm):
                    assert self._lane is not None, "the protocol takes no audio before start"
                    if self._recorder is not None:
                        await asyncio.to_thread(self._recorder.write, pcm)
                    await self._lane.feed(pcm)
                case End():
                    assert self._lane is not None, "the protocol takes no end before start"
                    self._lane.finish()

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
        await self._send(
            self._protocol.ready(
                Ready(
                    session=self._id,
                    bundle=recognizer.bundle.name,
                    decoder=stream.decoder,
                    chunk_ms=recognizer.bundle.milliseconds(stream.segment),
                    latency_ms=stream.latency_ms,
                    sample_rate=start.sample_rate,
                )
            )
        )
        reader = asyncio.current_task()
        assert reader is not None, "runs in a task"
        self._writer = asyncio.create_task(self._write(self._lane))
        self._writer.add_done_callback(lambda _: reader.cancel())

    async def _write(self, lane: Lane) -> None:
        while True:
            for event, progress in await lane.events():
                ended = isinstance(event, Ended)
                if ended and self._reason is not None:
                    raise self._reason
                await self._send(self._protocol.event(event, progress))
                if ended:
                    return

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

    async def _close(self, code: int, reason: str = "") -> None:
        # A close frame holds 125 bytes, two of them the code.
        reason = reason.encode()[:123].decode(errors="ignore")
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
    # Naming the subprotocol is optional, and one that we do not know is no reason to refuse.
    return Subprotocol(SUBPROTOCOL) if SUBPROTOCOL in offered else None
