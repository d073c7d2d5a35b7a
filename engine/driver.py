"""The driver of one session: a socket, a wire protocol and a lane of the batcher brought together.

    Socket -> WireSession -> Lane.feed -> [Batcher] -> Lane.events -> WireSession -> Socket

Every session has a reader and a writer, and nothing else runs for it on the event loop. The reader
stops reading while the lane is full, so that TCP itself slows a client down that sends faster than
we recognise. Where a client does not read, its own session waits; when that takes too long the
session ends, and nobody else has noticed.

A session whose protocol says that it can be resumed outlives its connection: it waits, for a
bounded time, until a new connection brings its token, and goes on over that one. Its lane works on
meanwhile; what the client has not seen is kept by the protocol and by the lane's own bounds.

This module knows no WebSocket library: whoever has an open socket, `loquent.engine.server` for one,
runs a session on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Coroutine
from typing import Any

from loquent.engine.errors import SnapshotError
from loquent.engine.gate import Visitor
from loquent.engine.handover import Handed
from loquent.engine.host import Host, Opened
from loquent.engine.lane import Lane
from loquent.engine.limits import Meter
from loquent.engine.metrics import SessionMetrics
from loquent.engine.outlet import (
    GOING_AWAY,
    NORMAL_CLOSURE,
    SERVICE_RESTART,
    Gone,
    NoSocket,
    Outlet,
    Socket,
    UnreadError,
)
from loquent.engine.protocol import (
    Audio,
    End,
    Finalize,
    Ready,
    Resume,
    SetEndpoint,
    SetHotwords,
    Standing,
    WireError,
    as_wire_error,
)
from loquent.engine.recorder import Recorder
from loquent.engine.stream import Stream
from loquent.engine.wire.native import NativeSession
from loquent.engine.wire.session import Actions, Close, Mark, Open, Send, WireSession

logger = logging.getLogger(__name__)


class Session:
    """One client, from its connection to its end."""

    def __init__(self, host: Host, opened: Opened, socket: Socket) -> None:
        self._host = host
        self._config = host.config
        self._outlet = Outlet(socket, host.config.send_timeout)
        self._id = opened.session
        self._wire = opened.wire
        self.visitor = opened.visitor
        self._log = logging.LoggerAdapter(logger, {"session": self._id})
        self._metrics = SessionMetrics(host.metrics, _name_of(opened.wire))
        self._lane: Lane | None = None
        self._recorder: Recorder | None = None
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._stopping = False
        self._leaving = False  # for another server
        self._deserted = False  # the client is on another connection already
        self._meter = Meter(self._config.limits, time.monotonic())
        self._heard = 0.0  # seconds of audio in the messages since the meter looked
        self._sample_rate = 1
        self._spoken = False  # the client, at least once, or its protocol has us begin
        self._overdue = False  # the session has lasted as long as it may
        self._close_with: Close | None = None
        # Of a session that can be resumed: the secret that stands for it, whoever has just come
        # back with it, and when the connection was lost.
        self.token: str | None = None
        self._back: asyncio.Future[_Arrival | None] | None = None
        self._idle = asyncio.Event()  # nobody is served: the session waits or is over
        self._heir: tuple[Session, int] | None = None
        self._handed = False  # it came from another server, without a connection

    @property
    def id(self) -> str:
        """Its name in the log."""
        return self._id

    @property
    def parked(self) -> bool:
        """Whether the session waits for its client, or is about to."""
        return self._back is not None or self._handed

    async def run(self) -> None:
        """Serve the client until either side is done."""
        visitor = self.visitor
        whose = f", key of {visitor.key}" if visitor.key is not None else ""
        self._log.info("open, from %s%s", visitor.address, whose)
        self._metrics.open()
        try:
            arrival: _Arrival | None = None
            while True:
                read_all = not self._handed and await self._serve_on(arrival)
                if arrival is not None:
                    arrival.done.set()
                if read_all or (arrival := await self._wait_for_client()) is None:
                    break
        except Exception as exc:
            if as_wire_error(exc).code == "internal":
                self._log.exception("failed")
            await self.fail(exc)
        finally:
            if arrival is not None:
                arrival.done.set()
            self._host.forget(self)
            self._idle.set()
            if self._lane is not None:
                self._lane.close()
            if self._recorder is not None:
                await asyncio.to_thread(self._recorder.close)
            self._metrics.close()
            self._log.info("%s", self._wire.state)

    async def bequeath(self) -> None:
        """After `run`: leave the connection to the session that its client came back to, if any."""
        if self._heir is None:
            return
        session, seq = self._heir
        try:
            await session.adopt(self._outlet.socket, seq)
        except TimeoutError:  # the old connection does not end
            await self.fail(WireError("busy", "this session is not free yet", retry_after=1))

    @classmethod
    def restored(cls, host: Host, token: str, handed: Handed, stream: Stream) -> Session:
        """A session that another server has written down; `run` waits for its client.

        `stream`: what `handed` says of it, restored.

        Raises:
            SnapshotError: it is not one.
        """
        try:
            wire = NativeSession.thaw(handed.wire)
        except (KeyError, TypeError, ValueError) as exc:
            raise SnapshotError(f"got a damaged session ({type(exc).__name__}: {exc})") from exc
        visitor = Visitor(address=handed.address, key=handed.key)
        opened = Opened(session=handed.session, wire=wire, visitor=visitor)
        session = cls(host, opened, NoSocket())
        session._handed, session._spoken, session.token = True, True, token
        session._sample_rate = stream.sample_rate
        session._lane = lane = host.batcher.add(stream, stream.sample_rate, wire.draining)
        lane.beats, lane.finalizes = True, handed.finalizes
        if host.config.record is not None:
            session._recorder = Recorder(host.config.record, handed.session, stream.sample_rate)
        return session

    async def _hand_over(self) -> bool:
        """Leave the session for the server that follows this one; False if that is impossible."""
        folder, lane, wire = self._host.folder, self._lane, self._wire
        if folder is None or self.token is None or lane is None:
            return False
        assert isinstance(wire, NativeSession), "the others cannot be resumed"
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.wait([self._writer])
        try:
            data, updates = await lane.snapshot()
            for update in updates:
                wire.event(*update)  # which keeps it
            handed = Handed(
                session=self._id,
                key=self.visitor.key,
                address=self.visitor.address,
                wire=wire.freeze(finished=lane.finished),
                finalizes=lane.finalized,
                stream=data,
            )
            await asyncio.to_thread(folder.put, self.token, handed)
        except (SnapshotError, OSError) as exc:
            self._log.error("could not be handed over: %s", exc)
            raise
        self._log.info("handed over")
        self._host.forget(self)  # from here on it is not ours
        self._close_with = Close(code=SERVICE_RESTART, reason="the server restarts; resume")
        return True

    async def adopt(self, socket: Socket, seq: int) -> None:
        """Go on over a socket for a client with the events up to `seq`, until it is done."""
        if self._back is None:  # the old connection is dead, and nobody has noticed
            self._deserted = True
            self._stop_reading()
            self.abort()
        async with asyncio.timeout(self._config.send_timeout):
            await self._idle.wait()
        if self._back is None or self._back.done():
            return
        arrival = _Arrival(socket, seq, asyncio.Event())
        self._back.set_result(arrival)
        await arrival.done.wait()

    async def _serve_on(self, arrival: _Arrival | None) -> bool:
        """Serve over the socket until it is done with; whether the client has read all."""
        try:
            if arrival is not None:
                self._outlet = Outlet(arrival.socket, self._config.send_timeout)
            return await self._serve(arrival)
        except Gone as exc:
            self._log.info("client gone (%s)", exc)
            if exc.left:
                self._host.forget(self)  # so that nobody waits for it
        except UnreadError:
            self._log.info("client does not read; cut off")
            await self._outlet.cut()
        return False

    async def _wait_for_client(self) -> _Arrival | None:
        """The client on a new connection, or None if it does not come back."""
        # One that has just been fetched from there is awaited by its client.
        leaves = self._leaving or (self._config.share_parked and not self._handed)
        self._handed = False
        if self.token is not None and leaves:
            with contextlib.suppress(SnapshotError, OSError):  # which it has logged
                await self._hand_over()
        if self.token is None or leaves or not self._host.may_park:
            self._wire.lost()
            return None
        self._deserted = False
        self._back = asyncio.get_running_loop().create_future()
        self._idle.set()
        self._log.info("waits for its client")
        try:
            async with asyncio.timeout(self._config.resume_timeout):
                arrival = await self._back
        except TimeoutError:
            self._log.info("client did not come back")
            self._wire.lost()
            return None
        finally:
            self._back = None
            self._idle.clear()
        if arrival is None:
            with contextlib.suppress(SnapshotError, OSError):
                await self._hand_over()
            self._wire.lost()
        return arrival

    def stop(self) -> None:
        """The server is going down: read no more, finish what was heard."""
        self._stopping = True
        self.let_go()

    def let_go(self, *, deserted: bool = False) -> None:
        """Leave the session, which can be resumed, for another server.

        `deserted`: its client is there already.
        """
        self._leaving = True
        self._deserted = deserted
        self._stop_reading()
        if self._back is not None and not self._back.done():
            self._back.set_result(None)

    def abort(self) -> None:
        """Cut the connection."""
        self._outlet.socket.abort()

    async def fail(self, error: Exception) -> None:
        """Tell the client why it cannot go on, and close."""
        known = as_wire_error(error)
        self._log.info("%s", known)
        self._metrics.failed(known.code)
        try:
            await self._perform(self._wire.error(error))
        except (Gone, UnreadError):
            self.abort()
        else:
            await self._close()

    async def _serve(self, arrival: _Arrival | None) -> bool:
        try:
            if arrival is None:
                greeting = self._wire.connected()
                self._spoken = any(isinstance(action, Send) for action in greeting)
                await self._perform(greeting)
            else:
                await self._resume(arrival.seq)
            self._reader = asyncio.create_task(self._read())
            if self._leaving or (self._writer is not None and self._writer.done()):
                self._reader.cancel()
            await asyncio.wait([self._reader])  # the writer cancels it when it is done first
            if self._writer is not None and self._writer.done():
                self._writer.result()
            if not self._reader.cancelled():
                self._reader.result()
            if self._heir is not None:
                return True
            if self._deserted and not self._leaving:
                raise Gone("came back on another connection")
            if self._close_with is None and self._leaving and await self._hand_over():
                if self._deserted:
                    self.abort()
                    return True
                return await self._close()
            if self._close_with is None:
                # Reading ended by our wish: the server stops, or the client has been silent.
                await self._perform(self._wire.end(None if self._stopping else self._too_long()))
                if self._writer is not None:
                    await asyncio.wait([self._writer])
                    self._writer.result()
            return await self._close()
        finally:
            tasks = [task for task in (self._reader, self._writer) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._reader = self._writer = None

    async def _resume(self, seq: int) -> None:
        """Tell a client that has come back where it stands, and go on."""
        assert self._lane is not None, "a session that can be resumed has started"
        assert self.token is not None, "a session that can be resumed has one"
        self._log.info("client is back")
        self._close_with = None
        standing = Standing(
            token=self.token, samples=self._lane.samples, finalizes=self._lane.finalizes
        )
        await self._perform(self._wire.resumed(standing, seq))
        if self._close_with is None:
            self._start_writing(self._lane)

    def _start_writing(self, lane: Lane) -> None:
        self._writer = asyncio.create_task(self._write(lane))
        self._writer.add_done_callback(lambda _: self._stop_reading())

    def _stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.cancel()

    @property
    def _patience(self) -> float:
        patience = self._wire.patience or self._config.idle_timeout
        first = self._config.limits.start_timeout
        return min(patience, first) if first and not self._spoken else patience

    def _too_long(self) -> WireError:
        if self._overdue:
            seconds = self._config.limits.session_seconds
            error = WireError("session_limit", f"a session may last {seconds:g} s; connect again")
        else:
            error = WireError(
                "idle", f"got nothing for {self._patience:g} s; connect again to go on"
            )
        self._log.info("%s", error)
        return error

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(self._config.limits.session_seconds or None) as whole:
                await self._read_all()
        except TimeoutError:
            self._overdue = whole.expired()  # if not, the client was silent

    async def _read_all(self) -> None:
        while self._close_with is None and self._heir is None:
            async with asyncio.timeout(None if self._wire.draining else self._patience):
                message = await self._outlet.socket.receive()
            self._spoken = True
            text = isinstance(message, str)
            self._meter.message(len(message), time.monotonic(), text=text)
            actions = self._wire.receive(message)
            if any(isinstance(action, Open) for action in actions):
                # A server that stops would leave a session behind that has begun and has no lane.
                await _uncut(self._perform(actions))
            else:
                await self._perform(actions)
            heard, self._heard = self._heard, 0.0
            if heard and (wait := self._meter.audio(heard, time.monotonic())):
                await asyncio.sleep(wait)
            elif text:  # may take milliseconds, and where more are here `receive` does not wait
                await asyncio.sleep(0)

    async def _perform(self, actions: Actions) -> None:
        """Do what the protocol wants; messages go out first, in the order they were made in."""
        if said := [action.text for action in actions if isinstance(action, Send)]:
            await self._outlet.send(said)
        for action in actions:
            match action:
                case Open():
                    await self._start(action)
                case Resume(token=token, seq=seq):
                    self._heir = await self._host.find(token, self), seq
                case Audio(pcm=pcm):
                    assert self._lane is not None, "protocols start before they hear"
                    seconds = len(pcm) / self._sample_rate
                    self._heard += seconds
                    self._metrics.heard(seconds, time.monotonic())
                    if self._recorder is not None:
                        await asyncio.to_thread(self._recorder.write, pcm)
                    await self._lane.feed(pcm)
                case Mark():
                    assert self._lane is not None, "protocols start before they hear"
                    await self._lane.mark()
                case Finalize():
                    assert self._lane is not None, "protocols start before they finalize"
                    await self._lane.finalize()
                case SetHotwords(hotwords=hotwords):
                    assert self._lane is not None, "protocols start before they change hotwords"
                    graph = await self._host.hotwords.build(hotwords, self.visitor)
                    await self._lane.set_hotwords(graph)
                case SetEndpoint(endpoint=endpoint):
                    assert self._lane is not None, "protocols start before they change rules"
                    await self._lane.set_endpoint(endpoint)
                case End():
                    if self._lane is not None:
                        self._lane.finish()
                    else:  # we stop while the session is still being opened
                        reason = "the server restarts; connect again"
                        self._close_with = Close(code=SERVICE_RESTART, reason=reason)
                case Close():
                    self._close_with = action

    async def _start(self, action: Open) -> None:
        start = action.start
        recognizer = self._host.recognizer
        graph = await self._host.hotwords.build(start.hotwords or (), self.visitor)
        stream = recognizer.stream(
            sample_rate=start.sample_rate,
            chunk_ms=start.chunk_ms if start.chunk_ms is not None else self._config.chunk_ms,
            decoder=start.decoder,
            right_context_ms=start.right_context_ms
            if start.right_context_ms is not None
            else self._config.right_context_ms,
            endpoint=action.endpoint,
            blank_penalty=start.blank_penalty,
            lm_weight=start.lm_weight,
            vad=start.vad,
            finish=bool(start.finish),
            hotwords=graph or (),
            stability=start.stability or 0.0,
        )
        if self._config.record is not None:
            self._recorder = Recorder(self._config.record, self._id, start.sample_rate)
        self._sample_rate = start.sample_rate
        self._lane = self._host.batcher.add(stream, start.sample_rate)
        self._start_writing(self._lane)
        if self._wire.resumable:
            self._lane.beats = True
            self.token = self._host.keep(self)
        ready = Ready(
            session=self._id,
            bundle=recognizer.bundle.name,
            decoder=stream.decoder,
            chunk_ms=recognizer.bundle.milliseconds(stream.segment),
            latency_ms=stream.latency_ms,
            sample_rate=start.sample_rate,
            language=start.language or next(iter(recognizer.bundle.languages), None),
            resume=None if self.token is None else Standing(token=self.token),
        )
        await self._perform(self._wire.ready(ready))

    async def _write(self, lane: Lane) -> None:
        while self._close_with is None:
            updates = await lane.events()
            for event, _ in updates:
                self._metrics.said(event, time.monotonic())
            # The protocol has them all before one is sent: it keeps what may have to be sent again.
            for actions in [self._wire.event(*update) for update in updates]:
                await self._perform(actions)

    async def _close(self) -> bool:
        close = self._close_with or Close()
        code = close.code
        if self._stopping and code == NORMAL_CLOSURE:
            code = GOING_AWAY
        return await self._outlet.close(code, close.reason)


async def _uncut(work: Coroutine[Any, Any, None]) -> None:
    """Await work that a cancellation does not stop, but follows."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        task.result()
        raise


def _name_of(wire: WireSession) -> str:
    """The protocol's name for the metrics."""
    return type(wire).__name__.removesuffix("Session").lower()


@dataclasses.dataclass(frozen=True, slots=True)
class _Arrival:
    """A client that has come back."""

    socket: Socket
    seq: int
    done: asyncio.Event  # the socket is not needed any more
