"""The transcription of uploaded files on the server's port: HTTP/1.1 with h11, one request each.

    StreamReader -> h11 -> MultipartForm -> temporary file -> AudioFile -> Lane -> answer

websockets reads only requests without a body, so that a connection whose first word is POST is
taken from it and comes here. A file is recognised like any session: it takes one of the server's
places and its chunks go through the batcher with all others'. Reading and decoding run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import IO, cast

import h11
import numpy as np
from numpy.typing import NDArray

from loquent.engine.audio import AudioFile
from loquent.engine.batcher import Lane
from loquent.engine.errors import AudioError, LoquentError
from loquent.engine.events import Ended, Final
from loquent.engine.host import Host
from loquent.engine.stream import MAX_RATE, MIN_RATE
from loquent.engine.web import SECURITY_HEADERS
from loquent.engine.wire.session import Refused
from loquent.engine.wire.transcription import PATH, MultipartForm, Options, error_body

logger = logging.getLogger(__name__)

MAX_UPLOAD = 25 << 20  # bytes of a file, as OpenAI has it
_MAX_BODY = MAX_UPLOAD + (1 << 20)
_MAX_HEAD = 16 << 10
_PIECE = 64 << 10
_USUAL_RATE = 16000
# Seconds that a client may take to read why its upload was refused before it is cut off.
_FAREWELL = 2.0


class _Gone(Exception):  # noqa: N818
    """The client has closed the connection, or says nothing."""


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
            await self._answer()
        except (_Gone, OSError, h11.RemoteProtocolError) as exc:
            logger.info("an upload from %s broke off: %s", self._peer, exc)
        finally:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def _answer(self) -> None:
        try:
            limits = self._host.config.limits
            async with asyncio.timeout(limits.start_timeout or None):
                request = await self._next()
            assert isinstance(request, h11.Request), "comes first"
            await self._transcribe(request)
        except Refused as exc:
            logger.info("an upload from %s was refused: %s", self._peer, exc)
            body = error_body(exc.status, str(exc), getattr(exc, "param", None))
            await self._send(exc.status, body, "application/json", exc.headers)
            await self._farewell()
        except TimeoutError:
            raise _Gone("nothing came for too long") from None
        except Exception:
            logger.exception("an upload from %s failed", self._peer)
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            body = error_body(status, "the server failed on this file; its log says why")
            await self._send(status, body, "application/json")

    async def _transcribe(self, request: h11.Request) -> None:
        headers: dict[str, str] = {}
        for raw, value in request.headers:
            name = raw.decode("ascii")
            text = value.decode("latin-1")
            headers[name] = f"{headers[name]}, {text}" if name in headers else text
        target = request.target.decode("ascii")
        if target.partition("?")[0] != PATH or request.method != b"POST":
            raise Refused(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"Only GET works here; files go to {PATH}.",
                {"Allow": "GET, HEAD"},
            )
        async with self._host.place(self._peer, target, headers):
            size = headers.get("content-length", "0")
            if len(size) > 12 or int(size) > _MAX_BODY:
                raise _too_large()
            if self._http.they_are_waiting_for_100_continue:
                await self._write(
                    self._http.send(h11.InformationalResponse(status_code=100, headers=[]))
                )
            with tempfile.NamedTemporaryFile(prefix="loquent-") as file:
                form = await self._receive(headers.get("content-type", ""), file)
                options = Options.parse(form.fields, self._host.recognizer.bundle.languages)
                finals, duration = await self._watching(Path(file.name), form.filename or "file")
        body, kind = options.render(finals, duration)
        ignored = {"X-Loquent-Ignored": options.report} if options.ignored else {}
        await self._send(HTTPStatus.OK, body, kind, ignored)

    async def _receive(self, content_type: str, file: IO[bytes]) -> MultipartForm:
        pieces = bytearray()
        written = 0
        form = MultipartForm(content_type, pieces.extend)
        received = 0
        async for data in self._body():
            received += len(data)
            form.accept(data)
            if received > _MAX_BODY or written + len(pieces) > MAX_UPLOAD:
                raise _too_large()
            if len(pieces) >= _PIECE:
                await asyncio.to_thread(file.write, bytes(pieces))
                written += len(pieces)
                pieces.clear()
        form.finish()
        await asyncio.to_thread(file.write, bytes(pieces))
        await asyncio.to_thread(file.flush)
        return form

    async def _watching(self, path: Path, name: str) -> tuple[list[Final], float]:
        """Recognise the file, unless the client goes away before that is done."""
        work = asyncio.create_task(self._recognise(path))
        gone = asyncio.create_task(self._reader.read(1))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not gone.result():
                raise _Gone("the client did not wait for the text")
            return await work
        except AudioError as exc:
            # The client has no business with our names of its file.
            raise Refused(HTTPStatus.BAD_REQUEST, str(exc).replace(str(path), name)) from exc
        except LoquentError as exc:
            raise Refused(HTTPStatus.BAD_REQUEST, str(exc)) from exc
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _recognise(self, path: Path) -> tuple[list[Final], float]:
        file = await asyncio.to_thread(AudioFile, path)
        rate = file.sample_rate if MIN_RATE <= file.sample_rate <= MAX_RATE else _USUAL_RATE
        stream = self._host.recognizer.stream(sample_rate=rate, chunk_ms=self._host.config.chunk_ms)
        most = self._host.config.limits.file_seconds
        if most and file.duration > most:
            raise _too_long(most)
        lane = self._host.batcher.add(stream, rate)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_feed(lane, file.blocks(sample_rate=rate), most))
                listening = group.create_task(_listen(lane))
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        finally:
            lane.close()
        return listening.result()

    async def _body(self) -> AsyncIterator[bytes]:
        while not isinstance(event := await self._timely(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                yield bytes(event.data)

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
            raise _Gone("closed before the request was whole")
        return cast("h11.Event", event)

    async def _send(
        self,
        status: HTTPStatus,
        body: str,
        content_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        data = body.encode()
        response = h11.Response(
            status_code=status.value,
            reason=status.phrase.encode(),
            headers=[
                ("Date", formatdate(usegmt=True)),
                ("Server", "loquent"),
                ("Connection", "close"),
                ("Content-Length", str(len(data))),
                ("Content-Type", content_type),
                ("Cache-Control", "no-store"),
                *SECURITY_HEADERS.items(),
                *(headers or {}).items(),
            ],
        )
        await self._write(
            self._http.send(response)
            + self._http.send(h11.Data(data=data))
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


async def _feed(lane: Lane, blocks: Iterator[NDArray[np.float32]], most: float) -> None:
    while (block := await asyncio.to_thread(next, blocks, None)) is not None:
        if most and lane.received > most:
            raise _too_long(most)
        await lane.feed(block)
    lane.finish()


async def _listen(lane: Lane) -> tuple[list[Final], float]:
    finals: list[Final] = []
    while True:
        for event, _ in await lane.events():
            if isinstance(event, Final):
                finals.append(event)
            elif isinstance(event, Ended):
                return finals, event.duration


def _too_long(most: float) -> Refused:
    return Refused(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"The file holds more than {most:g} s of audio; cut it into parts.",
    )


def _too_large() -> Refused:
    return Refused(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"The file is too large, expected at most {MAX_UPLOAD >> 20} MiB; cut it or compress it, "
        "for example as ogg.",
    )
