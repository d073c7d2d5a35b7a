"""The transcription of an uploaded file, whatever HTTP library has the socket.

    pieces of a body -> MultipartForm -> temporary file -> AudioFile -> Lane -> Answer

A file is recognised like any session: it takes one of the server's places and its chunks go through
the batcher with all others'. Reading and decoding run in threads. `loquent.engine.rest` and
`loquent.engine.asgi` bring the bytes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import tempfile
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from loquent.engine.audio import AudioFile
from loquent.engine.errors import AudioError, LoquentError
from loquent.engine.events import Ended, Final
from loquent.engine.host import Host
from loquent.engine.hotwords import Hotword
from loquent.engine.lane import Lane
from loquent.engine.stream import MAX_RATE, MIN_RATE
from loquent.engine.web import SECURITY_HEADERS, share_headers
from loquent.engine.wire.session import Refused
from loquent.engine.wire.transcription import PATH, MultipartForm, Options, error_body

logger = logging.getLogger(__name__)

MAX_UPLOAD = 25 << 20  # bytes of a file, as OpenAI has it
_MAX_BODY = MAX_UPLOAD + (1 << 20)
_PIECE = 64 << 10
_USUAL_RATE = 16000


class Gone(Exception):  # noqa: N818
    """The client has closed the connection, or says nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request. `body` may be read once, and raises Gone; `left` returns when the client is
    gone, once the body is read."""

    peer: str
    method: str
    target: str
    headers: Mapping[str, str]  # names in lower case
    body: AsyncIterator[bytes]
    left: Callable[[], Awaitable[object]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What it is answered with. Of a request that was `refused` there may be more under way."""

    status: HTTPStatus
    body: bytes
    headers: Mapping[str, str]
    refused: bool = False

    @classmethod
    def of(
        cls,
        status: HTTPStatus,
        text: str,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
        *,
        refused: bool = False,
    ) -> Answer:
        """With all its headers."""
        body = text.encode()
        common = {
            "Content-Length": str(len(body)),
            "Content-Type": content_type,
            "Cache-Control": "no-store",
            **SECURITY_HEADERS,
        }
        return cls(status=status, body=body, headers=common | dict(headers or {}), refused=refused)

    @classmethod
    def refusal(cls, peer: str, exc: Refused) -> Answer:
        """That of a request which gets no text."""
        logger.info("an upload from %s was refused: %s", peer, exc)
        body = error_body(exc.status, str(exc), getattr(exc, "param", None))
        return cls.of(exc.status, body, headers=exc.headers, refused=True)


async def transcribe(host: Host, request: Request) -> Answer:
    """The answer to a request, whatever it asks. Raises Gone."""
    answer = await _answer(host, request)
    origin = host.page_of(request.peer, request.headers)
    if origin is None:
        return answer
    asked = request.headers.get("access-control-request-headers", "")
    shared = share_headers(origin, asked if request.method == "OPTIONS" else None)
    return dataclasses.replace(answer, headers={**answer.headers, **shared})


async def _answer(host: Host, request: Request) -> Answer:
    try:
        return await _transcribe(host, request)
    except Gone:
        raise
    except Refused as exc:
        return Answer.refusal(request.peer, exc)
    except TimeoutError:
        raise Gone("nothing came for too long") from None
    except Exception:
        logger.exception("an upload from %s failed", request.peer)
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        return Answer.of(
            status, error_body(status, "the server failed on this file; its log says why")
        )


async def _transcribe(host: Host, request: Request) -> Answer:
    if request.target.partition("?")[0] != PATH or request.method not in ("POST", "OPTIONS"):
        raise Refused(
            HTTPStatus.METHOD_NOT_ALLOWED,
            f"Only GET works here; files go to {PATH}.",
            {"Allow": "GET, HEAD"},
        )
    if request.method == "OPTIONS":
        return Answer.of(HTTPStatus.OK, "", "text/plain", {"Allow": "OPTIONS, POST"})
    async with host.place(request.peer, request.target, request.headers):
        size = request.headers.get("content-length", "0")
        if not (size.isascii() and size.isdecimal()) or len(size) > 12 or int(size) > _MAX_BODY:
            raise _too_large()
        with tempfile.NamedTemporaryFile(prefix="loquent-") as file:
            form = await _receive(request, file)
            recognizer = host.recognizer
            languages = recognizer.bundle.languages
            options = Options.parse(form.fields, languages, recognizer.can_spell)
            work = _recognise(host, Path(file.name), options.hotwords)
            finals, duration = await _watching(work, request, Path(file.name), form.filename)
    body, kind = options.render(finals, duration)
    ignored = {"X-Loquent-Ignored": options.report} if options.ignored else {}
    return Answer.of(HTTPStatus.OK, body, kind, ignored)


async def _receive(request: Request, file: IO[bytes]) -> MultipartForm:
    pieces = bytearray()
    written = 0
    form = MultipartForm(request.headers.get("content-type", ""), pieces.extend)
    received = 0
    async for data in request.body:
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


Heard = tuple[list[Final], float]


async def _watching(
    recognising: Coroutine[Any, Any, Heard], request: Request, path: Path, name: str | None
) -> Heard:
    """Recognise the file, unless the client goes away before that is done."""
    work = asyncio.create_task(recognising)
    gone = asyncio.ensure_future(request.left())
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Gone("the client did not wait for the text")
        return work.result()
    except AudioError as exc:
        # The client has no business with our names of its file.
        raise Refused(HTTPStatus.BAD_REQUEST, str(exc).replace(str(path), name or "file")) from exc
    except LoquentError as exc:
        raise Refused(HTTPStatus.BAD_REQUEST, str(exc)) from exc
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _recognise(host: Host, path: Path, hotwords: Sequence[Hotword]) -> Heard:
    file = await asyncio.to_thread(AudioFile, path)
    rate = file.sample_rate if MIN_RATE <= file.sample_rate <= MAX_RATE else _USUAL_RATE
    recognizer = host.recognizer
    graph = await host.hotwords.build(hotwords)
    stream = recognizer.stream(
        sample_rate=rate,
        chunk_ms=host.config.chunk_ms,
        right_context_ms=host.config.right_context_ms,
        finish=host.finishes,
        hotwords=graph or (),
    )
    most = host.config.limits.file_seconds
    if most and file.duration > most:
        raise _too_long(most)
    lane = host.batcher.add(stream, rate)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_feed(lane, file.blocks(sample_rate=rate), most))
            listening = group.create_task(_listen(lane))
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    finally:
        lane.close()
    return listening.result()


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
