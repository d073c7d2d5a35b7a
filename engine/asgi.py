"""The server as an ASGI application: the same host, driver and protocols on other people's sockets.

    uvicorn --factory loquent.engine.asgi:create_app

or under hypercorn, or in a replica of Ray Serve (`loquent.clients.ray_app`). A WebSocket is one
session here as well, and lives in one process. Keys, limits and the rest come from the variables
that ``loquent serve`` reads. What belongs to the socket is the ASGI server's: address, TLS, the
size of messages (uvicorn: ``--ws-max-size``), and how long it waits at shutdown
(``--timeout-graceful-shutdown``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from http import HTTPStatus
from pkgutil import resolve_name
from typing import Any
from urllib.parse import quote

from websockets.http11 import Response

from loquent.engine import upload, web
from loquent.engine.driver import Session
from loquent.engine.host import Host, Opened, ServerConfig
from loquent.engine.metrics import CONTENT_TYPE
from loquent.engine.outlet import NO_STATUS, Gone
from loquent.engine.recognizer import Recognizer
from loquent.engine.wire.dispatch import is_wire
from loquent.engine.wire.session import Refused

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
SendMessage = Callable[[Message], Awaitable[None]]


def create_app() -> App:
    """The application as the environment wants it: see ``loquent.clients.serve.create_app``."""
    # The options are the command's, which stands above the engine: looked up, not imported.
    app: App = resolve_name("loquent.clients.serve:create_app")()
    return app


class App:
    """ASGI 3: lifespan, http and websocket."""

    def __init__(self, recognizer: Recognizer, config: ServerConfig | None = None) -> None:
        self.host = Host(recognizer, config)
        self._entered = False

    async def start(self) -> None:
        """Make ready to serve. Idempotent, for servers without lifespan."""
        if not self._entered:
            self._entered = True
            await self.host.__aenter__()

    async def stop(self) -> None:
        """Let the sessions there are finish, or hand them over; idempotent."""
        if not self._entered:
            return
        self._entered = False
        self.host.stop()
        try:
            async with asyncio.timeout(self.host.config.drain_timeout):
                while self.host.sessions or self.host.files:  # noqa: ASYNC110  they end in many places
                    await asyncio.sleep(0.02)
        except TimeoutError:
            self.host.abort()
        await self.host.__aexit__()

    async def __call__(self, scope: Scope, receive: Receive, send: SendMessage) -> None:
        """One connection."""
        match scope["type"]:
            case "lifespan":
                await self._lifespan(receive, send)
            case "websocket":
                await self.start()
                await self._websocket(scope, receive, send)
            case "http":
                await self.start()
                await self._http(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: SendMessage) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _websocket(self, scope: Scope, receive: Receive, send: SendMessage) -> None:
        await receive()  # websocket.connect
        try:
            if not is_wire(scope["path"]):
                raise Refused(HTTPStatus.NOT_FOUND, "There is no WebSocket here.")
            opened = self.host.open(_peer(scope), _target(scope), _headers(scope))
            await self.host.admit(opened)
        except Refused as refused:
            await _refuse(scope, send, refused)
            return
        try:
            await self._serve(opened, receive, send)
        finally:
            self.host.release(opened)

    async def _serve(self, opened: Opened, receive: Receive, send: SendMessage) -> None:
        headers = [(n.lower().encode(), v.encode()) for n, v in opened.wire.headers.items()]
        await send(
            {
                "type": "websocket.accept",
                "subprotocol": opened.wire.subprotocol,
                "headers": headers,
            }
        )
        socket = _Socket(receive, send)
        await self.host.run(Session(self.host, opened, socket))
        await socket.close(1000, "")

    async def _http(self, scope: Scope, receive: Receive, send: SendMessage) -> None:
        if scope["method"] in ("POST", "OPTIONS"):
            await self._post(scope, receive, send)
            return
        head = scope["method"] == "HEAD"
        if scope["method"] not in ("GET", "HEAD"):
            response = web.respond_text(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET works here.")
        elif scope["path"] in ("/healthz", "/readyz"):
            ready = scope["path"] == "/healthz" or self.host.status == "ok"
            status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
            response = web.respond_json(status, self.host.health(), head=head)
        elif scope["path"] == "/metrics":
            if self.host.may_read_metrics(_peer(scope), _headers(scope)):
                text = self.host.metrics.render()
                response = web.respond(HTTPStatus.OK, text, CONTENT_TYPE, head=head)
            else:
                response = web.respond_text(HTTPStatus.UNAUTHORIZED, "Metrics need their token.")
        elif is_wire(scope["path"]) and scope["path"] != "/":
            response = web.respond_text(HTTPStatus.UPGRADE_REQUIRED, "This is a WebSocket.")
        else:
            response = web.static_file(self.host.config.page, quote(scope["path"]), head=head)
        await _respond(send, response, "http.response")

    async def _post(self, scope: Scope, receive: Receive, send: SendMessage) -> None:
        async def body() -> AsyncIterator[bytes]:
            more = True
            while more:
                async with asyncio.timeout(self.host.config.idle_timeout):
                    message = await receive()
                if message["type"] == "http.disconnect":
                    raise upload.Gone("closed before the request was whole")
                yield bytes(message.get("body", b""))
                more = message.get("more_body", False)

        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        request = upload.Request(
            peer=_peer(scope),
            method=scope["method"],
            target=_target(scope),
            headers=_headers(scope),
            body=body(),
            left=left,
        )
        try:
            answer = await upload.transcribe(self.host, request)
        except upload.Gone as exc:
            logger.info("an upload from %s broke off: %s", request.peer, exc)
            return
        headers = [(n.lower().encode(), v.encode("latin-1")) for n, v in answer.headers.items()]
        start = {"type": "http.response.start", "status": answer.status.value, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": answer.body})


class _Socket:
    """An ASGI WebSocket as the driver wants it."""

    def __init__(self, receive: Receive, send: SendMessage) -> None:
        self._receive, self._send = receive, send
        self._over = False  # either side has closed
        self._answered = False  # the other one has
        self._closing: asyncio.Task[None] | None = None

    async def receive(self) -> str | bytes:
        if self._over:
            raise Gone("closed")
        message = await self._receive()
        if message["type"] == "websocket.disconnect":
            self._over = self._answered = True
            code = message.get("code", NO_STATUS)
            # uvicorn has this one for lost connections, too.
            raise Gone(f"closed ({code})", None if code == NO_STATUS else code)
        text: str | None = message.get("text")
        if text is not None:
            return text
        return bytes(message["bytes"])

    async def send(self, text: str) -> None:
        if self._over:
            raise Gone("closed")
        try:
            await self._send({"type": "websocket.send", "text": text})
        except Exception as exc:  # each ASGI server has its own for a client that is gone
            self._over = True
            raise Gone(str(exc) or type(exc).__name__) from exc

    async def close(self, code: int, reason: str) -> bool:
        if not self._over:
            try:
                await self._send({"type": "websocket.close", "code": code, "reason": reason})
            except Exception:
                self._over = True
                return False
            self._over = True
            try:
                # Only a client that has read everything answers; that answer comes as this.
                async with asyncio.timeout(10.0):
                    while (await self._receive())["type"] != "websocket.disconnect":
                        pass
            except TimeoutError:
                return False
            self._answered = True
        return self._answered

    def abort(self) -> None:
        # ASGI has no way to cut a connection, and the application may go on for another one.
        if not self._over:
            self._over = True
            self._closing = asyncio.create_task(self._part())

    async def _part(self) -> None:
        with contextlib.suppress(Exception):  # each ASGI server has its own for one that is gone
            await self._send({"type": "websocket.close", "code": 1001, "reason": ""})


def _headers(scope: Scope) -> dict[str, str]:
    headers: dict[str, str] = {}
    for raw, value in scope["headers"]:
        name, text = raw.decode("latin-1").lower(), value.decode("latin-1")
        headers[name] = f"{headers[name]}, {text}" if name in headers else text
    return headers


def _target(scope: Scope) -> str:
    target = quote(scope["path"])
    query = scope.get("query_string", b"")
    return f"{target}?{query.decode('latin-1')}" if query else target


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


async def _refuse(scope: Scope, send: SendMessage, refused: Refused) -> None:
    if "websocket.http.response" in scope.get("extensions", {}):
        response = web.respond_text(refused.status, str(refused))
        response.headers.update(refused.headers)
        await _respond(send, response, "websocket.http.response")
    else:  # the server answers 403, whatever we want to say
        await send({"type": "websocket.close", "code": 1013, "reason": json.dumps(str(refused))})


async def _respond(send: SendMessage, response: Response, kind: str) -> None:
    # The connection is the ASGI server's, which says itself what becomes of it.
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in response.headers.raw_items()
        if name.lower() not in ("connection", "date")
    ]
    await send({"type": f"{kind}.start", "status": response.status_code, "headers": headers})
    await send({"type": f"{kind}.body", "body": bytes(response.body or b"")})
