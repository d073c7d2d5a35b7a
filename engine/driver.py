"""The driver of one session: a socket, a wire protocol and a lane of the batcher brought together.

    Socket -> WireSession -> Lane.feed -> [Batcher] -> Lane.events -> WireSession -> Socket

Every session has a reader and a writer, and nothing else runs for it on the event loop. The reader
stops reading while the lane is full, so that TCP itself slows a client down that sends faster than
we recognise. Where a client does not read, its own session waits; when that takes too long the
session ends, and nobody else has noticed.

This module knows no WebSocket library: whoever has an open socket, `loquent.engine.server` for one,
runs a session on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Protocol

from loquent.engine.batcher import Lane
from loquent.engine.host import Host
from loquent.engine.protocol import Audio, End, Finalize, Ready, Start, WireError, as_wire_error
from loquent.engine.recorder import Recorder
from loquent.engine.wire.session import Actions, Close, Mark, Send, WireSession

logger = logging.getLogger(__name__)

# RFC 6455 section 7.4.1.
NORMAL_CLOSURE, GOING_AWAY = 1000, 1001


class Gone(Exception):  # noqa: N818
    """The connection is closed or lost; says how."""


class Socket(Protocol):
    """One open WebSocket."""

    @property
    def peer(self) -> object:
        """Who is at the other end, for the log."""

    async def receive(self) -> str | bytes:
        """The next message. Raises Gone."""

    async def send(self, text: str) -> None:
        """Send a text message; waits while the client does not read. Raises Gone."""

    async def close(self, code: int, reason: str) -> None:
        """Close, once all is sent. Does nothing if the connection is gone."""

    def abort(self) -> None:
        """Cut the connection. Does nothing if it is gone."""


class Session:
    """One client, from its connection to its end."""

    def __init__(self, host: Host, wire: WireSession, socket: Socket, session_id: str) -> None:
        self._host = host
        self._config = host.config
        self._socket = socket
        self._id = session_id
        self._wire = wire
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
        logger.info("session %s: open, from %s", self._id, self._socket.peer)
        try:
            await self._serve()
        except Gone as exc:
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
        self._socket.abort()

    async def fail(self, error: Exception) -> None:
        """Tell the client why it cannot go on, and close."""
        logger.info("session %s: %s", self._id, as_wire_error(error))
        try:
            await self._perform(self._wire.error(error))
        except (Gone, _UnreadError):
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
                    message = await self._socket.receive()
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
        recognizer = self._host.recognizer
        stream = recognizer.stream(
            sample_rate=start.sample_rate,
            chunk_ms=start.chunk_ms if start.chunk_ms is not None else self._config.chunk_ms,
            decoder=start.decoder,
            right_context_ms=start.right_context_ms,
        )
        if self._config.record is not None:
            self._recorder = await asyncio.to_thread(Recorder, self._config.record, self._id, start)
        self._lane = self._host.batcher.add(stream, start.sample_rate)
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

    async def _send(self, text: str) -> None:
        try:
            async with asyncio.timeout(self._config.send_timeout):
                await self._socket.send(text)
        except TimeoutError:
            raise _UnreadError from None

    async def _close(self) -> None:
        close = self._close_with or Close()
        code = close.code
        if self._stopping and code == NORMAL_CLOSURE:
            code = GOING_AWAY
        # A close frame holds 125 bytes, two of them the code.
        reason = close.reason.encode()[:123].decode(errors="ignore")
        try:
            async with asyncio.timeout(self._config.send_timeout):
                await self._socket.close(code, reason)
        except TimeoutError:
            self.abort()


class _UnreadError(Exception):
    """The client has not read our messages for too long."""
