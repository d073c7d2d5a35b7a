"""Requests for `upload` on the server's port: HTTP/1.1 with h11, one request a connection.

    StreamReader -> h11 -> loquent.engine.upload -> h11 -> StreamWriter

websockets reads only requests without a body, so that a connection whose first word is POST, or
OPTIONS as browsers ask before it, is taken from it and comes here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from email.utils import formatdate
from http import HTTPStatus
from typing import cast

import h11

from loquent.engine.host import Host
from loquent.engine.upload import Answer, Gone, Request, transcribe
from loquent.engine.wire.session import Refused

logger = logging.getLogger(__name__)

_MAX_HEAD = 16 << 10
_PIECE = 64 << 10
# Seconds that a client may take to read why its upload was refused before it is cut off.
_FAREWELL = 2.0
# Seconds between two looks whether a client that sends no more still waits for its answer.
_LOOK = 1.0


class FileRequest:
    """One connection with one request, from its first byte to its last."""

    def __init__(
        self, host: Host, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._host = host
        self._peer = peer
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)

    async def run(self) -> None:
        """Answer it, whatever it is, and close."""
        try:
            answer = await self._answer()
            await self._send(answer)
            if answer.refused:
                await self._farewell()
        except (Gone, OSError, TimeoutError, h11.RemoteProtocolError) as exc:
            logger.info("an upload from %s broke off: %s", self._peer, exc)
        finally:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def _answer(self) -> Answer:
        try:
            async with asyncio.timeout(self._host.config.limits.start_timeout or None):
                request = await self._next()
        except Refused as exc:
            return Answer.refusal(self._peer, exc)
        assert isinstance(request, h11.Request), "comes first"
        headers: dict[str, str] = {}
        for raw, value in request.headers:
            name = raw.decode("ascii")
            text = value.decode("latin-1")
            headers[name] = f"{headers[name]}, {text}" if name in headers else text
        return await transcribe(
            self._host,
            Request(
                peer=self._peer,
                method=request.method.decode("ascii"),
                target=request.target.decode("ascii"),
                headers=headers,
                body=self._body(),
                left=self._left,
            ),
        )

    async def _body(self) -> AsyncIterator[bytes]:
        if self._http.they_are_waiting_for_100_continue:
            await self._write(
                self._http.send(h11.InformationalResponse(status_code=100, headers=[]))
            )
        while not isinstance(event := await self._timely(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                yield bytes(event.data)

    async def _left(self) -> None:
        """Return, or raise, once the client is gone.

        One that has closed may only have said that it sends no more, and wait. Whether it does
        shows when something is sent to it, so it is told from time to time that we work.
        """
        while await self._reader.read(_PIECE):
            pass
        while self._writer.can_write_eof():  # not TLS, which asyncio closes both ways at once
            await asyncio.sleep(_LOOK)
            if self._http.their_http_version != b"1.0":  # which knows no interim answers
                working = h11.InformationalResponse(status_code=HTTPStatus.PROCESSING, headers=[])
                await self._write(self._http.send(working))

    async def _timely(self) -> h11.Event:
        async with asyncio.timeout(self._host.config.idle_timeout):
            return await self._next()

    async def _next(self) -> h11.Event:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._reader.read(_PIECE))
        except h11.RemoteProtocolError as exc:
            status = HTTPStatus(exc.error_status_hint)
            raise Refused(status, f"This request is not understood: {exc}") from exc
        if isinstance(event, h11.ConnectionClosed):
            raise Gone("closed before the request was whole")
        return cast("h11.Event", event)

    async def _send(self, answer: Answer) -> None:
        headers = {
            "Date": formatdate(usegmt=True),
            "Server": "loquent",
            "Connection": "close",
            **answer.headers,
        }
        response = h11.Response(
            status_code=answer.status.value,
            reason=answer.status.phrase.encode(),
            headers=[(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
        )
        await self._write(
            self._http.send(response)
            + self._http.send(h11.Data(data=answer.body))
            + self._http.send(h11.EndOfMessage())
        )

    async def _write(self, data: bytes | None) -> None:
        self._writer.write(data or b"")
        async with asyncio.timeout(self._host.config.send_timeout):
            await self._writer.drain()

    async def _farewell(self) -> None:
        """Read what is still under way: a client that is cut off while it sends reads no answer."""
        if self._writer.can_write_eof():
            self._writer.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL):
                while await self._reader.read(_PIECE):
                    pass
