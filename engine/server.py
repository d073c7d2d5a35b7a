"""The captioning server: WebSocket sessions, the web page, metrics and health on one port.

The sockets are websockets'; what goes over them is `loquent.engine.driver`'s business, and who may
connect `loquent.engine.host`'s. The path of a request chooses the wire protocol
(`loquent.engine.wire`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import Server as SocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State as ConnectionState
from websockets.typing import Subprotocol

from loquent.engine import web
from loquent.engine.batcher import Batcher
from loquent.engine.driver import Session
from loquent.engine.host import Host, Opened, ServerConfig
from loquent.engine.metrics import CONTENT_TYPE
from loquent.engine.outlet import Gone
from loquent.engine.protocol import MAX_MESSAGE
from loquent.engine.recognizer import Recognizer
from loquent.engine.rest import FileRequest
from loquent.engine.wire.dispatch import is_wire
from loquent.engine.wire.session import Refused

__all__ = ["Server", "ServerConfig"]

# websockets' debug messages show whole requests, keys and all.
_SILENT = logging.getLogger(f"{__name__}.websockets")
_SILENT.setLevel(logging.CRITICAL)


class Server:
    """Serves one recogniser. Use as ``async with Server(recognizer, config) as server``."""

    def __init__(self, recognizer: Recognizer, config: ServerConfig | None = None) -> None:
        self.host = Host(recognizer, config)
        self.config = self.host.config
        self.files: set[asyncio.Task[None]] = set()  # that are being transcribed
        self._server: SocketServer | None = None

    async def __aenter__(self) -> Server:
        await self.host.__aenter__()
        try:
            self._server = await serve(
                self._handle,
                self.config.host,
                self.config.port,
                process_request=self._process_request,
                process_response=_add_headers,
                select_subprotocol=_select_subprotocol,
                create_connection=partial(_Connection, owner=self),  # type: ignore[arg-type]
                server_header="loquent",
                logger=_SILENT,
                ssl=self.config.tls,
                reuse_port=self.config.reuse_port or None,
                open_timeout=self.config.limits.start_timeout or None,
                # Audio does not deflate, and a small message could inflate into a huge one.
                compression=None,
                # A little above our own limit, so that most oversized messages get our own answer.
                max_size=2 * MAX_MESSAGE,
                # Messages that may wait for us, beside those that the kernel holds.
                max_queue=4,
                # While a client's audio backs up its pongs wait behind it, so a missing pong says
                # nothing; the idle and the send timeout find the dead.
                ping_interval=None,
            )
        except BaseException:
            await self.host.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop: take no more sessions, let those there are finish, close."""
        assert self._server is not None, "entered before it is left"
        self._server.close(close_connections=False)
        self.host.stop()
        try:
            async with asyncio.timeout(self.config.drain_timeout):
                await self._server.wait_closed()
        except TimeoutError:
            self.host.abort()
            for task in self.files:
                task.cancel()
            await self._server.wait_closed()
        await self.host.__aexit__()

    @property
    def port(self) -> int:
        """The port it listens on."""
        assert self._server is not None, "not listening"
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def batcher(self) -> Batcher:
        """The host's."""
        return self.host.batcher

    @property
    def sessions(self) -> int:
        """How many sessions are open."""
        return len(self.host.sessions)

    async def _process_request(
        self, connection: ServerConnection, request: Request
    ) -> Response | None:
        path = request.path.partition("?")[0]
        method = getattr(request, "method", "GET")  # older websockets know only GET
        if is_wire(path) and request.headers.get("Upgrade") is not None:
            return await self._open(connection, request)
        if method not in ("GET", "HEAD"):
            return web.respond_text(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET works here.")
        if is_wire(path) and path != "/":
            return web.respond_text(HTTPStatus.UPGRADE_REQUIRED, "This address is a WebSocket.")
        head = method == "HEAD"
        if path == "/metrics":
            return self._metrics(connection, request, head=head)
        if path in ("/healthz", "/readyz"):
            # Alive is who answers; ready is who takes sessions.
            ready = path == "/healthz" or self.host.status == "ok"
            status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
            return web.respond_json(status, self.host.health(), head=head)
        return web.static_file(self.config.page, path, head=head)

    async def _open(self, connection: ServerConnection, request: Request) -> Response | None:
        """Make the session that a WebSocket request asks for, or say why there is none."""
        assert isinstance(connection, _Connection), "made by create_connection"
        headers = _headers(request)
        try:
            connection.opened = self.host.open(connection.peer, request.path, headers)
            await self.host.admit(connection.opened)
            if connection.transport.is_closing():  # it left while it stood in line
                self.host.release(connection.opened)
        except Refused as refused:
            response = web.respond_text(refused.status, str(refused))
            response.headers.update(refused.headers)
            return response
        return None

    def _metrics(self, connection: ServerConnection, request: Request, *, head: bool) -> Response:
        assert isinstance(connection, _Connection), "made by create_connection"
        if not self.host.may_read_metrics(connection.peer, _headers(request)):
            response = web.respond_text(
                HTTPStatus.UNAUTHORIZED, "Metrics are for this machine or with their own token."
            )
            response.headers["WWW-Authenticate"] = 'Bearer realm="loquent metrics"'
            return response
        text = self.host.metrics.render()
        return web.respond(HTTPStatus.OK, text, CONTENT_TYPE, head=head)

    async def _handle(self, connection: ServerConnection) -> None:
        assert isinstance(connection, _Connection), "made by create_connection"
        await self.host.run(Session(self.host, connection.opened, _Socket(connection)))


_FOR_REST = (b"POST ", b"OPTIONS ")


class _Connection(ServerConnection):
    """A WebSocket with the session that its request asked for.

    websockets reads no request with a body: what begins with POST or OPTIONS is `rest`'s.
    """

    def __init__(self, *args: Any, owner: Server, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.opened: Opened
        self._owner = owner
        self._first: bytes | None = b""  # what came so far, until it is known whose it is
        self._handler: asyncio.Task[None]

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if hasattr(self, "opened"):
            # Or those who come and go at once would hold all places between them.
            self._owner.host.release(self.opened)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        known = set(self.server.handler_tasks)
        super().connection_made(transport)
        [self._handler] = self.server.handler_tasks - known

    def data_received(self, data: bytes) -> None:
        if self._first is not None:
            data = self._first + data
            if any(len(data) < len(word) and word.startswith(data) for word in _FOR_REST):
                self._first = data
                return
            self._first = None
            if data.startswith(_FOR_REST):
                self._hand_over(data)
                return
        super().data_received(data)

    def _hand_over(self, data: bytes) -> None:
        tasks = self.server.handler_tasks
        self._handler.add_done_callback(tasks.discard)
        self._handler.cancel()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        writer = asyncio.StreamWriter(self.transport, protocol, reader, self.loop)
        reader.feed_data(data)
        request = FileRequest(self._owner.host, self.peer, reader, writer)
        task = self.loop.create_task(request.run())
        for running in (tasks, self._owner.files):
            running.add(task)
            task.add_done_callback(running.discard)

    @property
    def peer(self) -> str:
        """The address at the other end."""
        address = self.remote_address
        return str(address[0]) if isinstance(address, tuple) else ""


class _Socket:
    """A WebSocket as the driver wants it."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    @property
    def _gone(self) -> bool:
        # On a connection that was lost with data in its buffer, asyncio's transport has no loop
        # any more, and websockets' send() and close() (17.4) trip over that.
        return self._connection.state is ConnectionState.CLOSED

    async def receive(self) -> str | bytes:
        try:
            return await self._connection.recv()
        except ConnectionClosed as exc:
            raise _parted(exc) from exc

    async def send(self, text: str) -> None:
        if self._gone:
            raise _parted(self._connection.protocol.close_exc)
        try:
            await self._connection.send(text)
        except ConnectionClosed as exc:
            raise _parted(exc) from exc

    async def close(self, code: int, reason: str) -> bool:
        if not self._gone:
            await self._connection.close(code, reason)
        return self._connection.protocol.close_rcvd is not None

    def abort(self) -> None:
        if not self._gone:
            self._connection.transport.abort()


def _parted(exc: ConnectionClosed) -> Gone:
    # An answer to our own close frame is no good-bye.
    good_bye = exc.rcvd if exc.rcvd_then_sent is not False else None
    return Gone(str(exc), None if good_bye is None else good_bye.code)


def _headers(request: Request) -> dict[str, str]:
    """By names in lower case; what comes more than once is joined by commas."""
    headers: dict[str, str] = {}
    for name, value in request.headers.raw_items():
        known = headers.get(name.lower())
        headers[name.lower()] = value if known is None else f"{known}, {value}"
    return headers


def _select_subprotocol(
    connection: ServerConnection, offered: Sequence[Subprotocol]
) -> Subprotocol | None:
    assert isinstance(connection, _Connection), "made by create_connection"
    chosen = connection.opened.wire.subprotocol
    return None if chosen is None else Subprotocol(chosen)


def _add_headers(connection: ServerConnection, request: Request, response: Response) -> None:
    assert isinstance(connection, _Connection), "made by create_connection"
    if response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
        response.headers.update(connection.opened.wire.headers)
