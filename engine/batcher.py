"""Where the streams of all sessions meet: one worker thread that runs the recogniser.

    feed() -> inbox -> [worker: Stream.accept, Recognizer.step, Stream.events] -> outbox -> events()

The work goes in rounds. A round takes what has arrived on every lane, advances streams that are
ready by one chunk, in one batch, and hands the events back to the event loop. While a round runs,
audio collects in the inboxes, so the batches grow with the load by themselves and no session waits
for a timer. Outside a round no stream is touched, inside a round only the worker touches it:
streams need no locks.

A round is for streams of one chunk size, that of the stream which has waited longest since it was
served, and for so many of them that it stays short: sessions with small chunks wait for one round
of those with large ones, not for all. Among these, streams at the end of their audio come first and
go on to their last word in the same round: somebody waits for it, and little is left to do.

Nothing here can grow without bound. `feed` waits while a lane's inbox or its stream is full; a lane
whose events nobody fetches is not advanced any further, so that its own client's audio backs up.
Partials of a stream that is behind and has its next chunk already are stale and are dropped; audio
and everything else never is.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np

from loquent.engine.errors import BufferFull
from loquent.engine.events import Event, Partial
from loquent.engine.hotwords import Hotword
from loquent.engine.load import LoadMeter
from loquent.engine.protocol import Finalize, Pcm, Progress, SetHotwords
from loquent.engine.recognizer import Recognizer
from loquent.engine.stream import Stream, as_float32

logger = logging.getLogger(__name__)

# Seconds of audio that may wait in an inbox before `feed` waits (one message may go beyond it).
HIGH_WATER = 2.0
# Audio goes into a stream in pieces of this many seconds: any message then fits below its limit.
PIECE = 0.1
# Pieces, marks and calls of `finalize` in an inbox from which on all wait, however short they are.
MAX_PIECES = 256
# Events that may wait for a slow client before its lane pauses; its partials are merged into one.
MAX_OUTBOX = 64
# More streams than this go into the next round, so that one round stays short for everybody ...
MAX_BATCH = 32
# ... and so do they if their chunks are more seconds of audio than this together.
MAX_ROUND = 10.24
# A stream is behind if this many seconds of audio wait beyond those that its latency explains.
LAG_LIMIT = 1.0
# Seconds of audio after which a lane with `beats` says how far it is.
BEAT = 1.0
# A session counts as streaming for so many seconds after its last audio.
_ACTIVE = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Marked:
    """The answer to the oldest `Lane.mark` that has none yet."""


class Beat(Marked):
    """A mark that nobody set, for whoever wants to know the progress where no event tells it."""


_MARK = Marked()
_BEAT = Beat()
Update = tuple[Event | Marked, Progress]
# What waits for the worker, in order: audio, and marks and calls of `finalize` in between.
Inbox = deque[Pcm | Marked | Finalize | SetHotwords]


class Lane:
    """One session's way through the batcher. Every method belongs to the event loop's thread."""

    def __init__(
        self, batcher: Batcher, stream: Stream, sample_rate: int, finished: bool = False
    ) -> None:
        self._batcher = batcher
        self._stream = stream
        self._sample_rate = sample_rate
        self.chunk = batcher.seconds(stream)
        self._inbox: Inbox = deque()
        self._received = round(stream.received * sample_rate)  # samples fed ...
        self._waiting = 0  # ... and those of them that are still in the inbox
        self._orders = 0  # marks and calls of `finalize` in the inbox
        self._fed_at = time.monotonic()  # when audio came last; a new session is about to send ...
        self._due: float | None = None  # ... and when a whole chunk was there
        self.beats = False  # `Beat` comes out where the audio goes on and no event says so
        self._told_at = 0.0  # seconds of audio received when progress was last told; the worker's
        self.finalizes = 0  # calls of `finalize` so far ...
        self.finalized = 0  # ... and how many of them the stream has
        self._state = _State.of(stream)
        self._out = False  # a round has the stream
        self._progress = Progress(received=0.0, processed=0.0)
        self._finishing = self._finished = finished
        self._outbox: list[Update] = []
        self._shown_at = -LAG_LIMIT  # seconds of audio processed at the last partial; the worker's
        self._error: Exception | None = None
        self._room = asyncio.Event()
        self._news = asyncio.Event()

    async def feed(self, pcm: Pcm) -> None:
        """Take mono audio of any length, shape (N,); waits while this lane has enough to do.

        Raises AudioError, and whatever made the lane fail.
        """
        if pcm.dtype.kind == "f":
            as_float32(pcm)  # says now what the stream would say once a chunk is whole
        await self._enter()
        size = max(1, int(PIECE * self._sample_rate))
        self._inbox.extend(pcm[at : at + size] for at in range(0, len(pcm), size))
        self._waiting += len(pcm)
        self._received += len(pcm)
        self._fed_at = time.monotonic()
        self._look(self._fed_at)
        if self._has_work:
            self._batcher.wake()

    async def mark(self) -> None:
        """`Marked` comes out once all audio before it is recognised as far as chunks go.

        Waits and raises as `feed` does.
        """
        await self._enter()
        self._inbox.append(_MARK)
        self._orders += 1
        self._batcher.wake()

    async def finalize(self) -> None:
        """Settle all audio fed so far, see `Stream.finalize`; waits and raises as `feed` does."""
        await self._enter()
        self._inbox.append(Finalize())
        self._orders += 1
        self.finalizes += 1
        self._batcher.wake()

    async def set_hotwords(self, hotwords: Sequence[Hotword]) -> None:
        """Other hotwords once the audio before is in the stream, see `Stream.set_hotwords`.

        Waits and raises as `feed` does.
        """
        await self._enter()
        self._inbox.append(SetHotwords(hotwords=tuple(hotwords)))
        self._orders += 1
        self._batcher.wake()

    async def snapshot(self) -> tuple[bytes, list[Update]]:
        """Leave the batcher, with the stream as it is after the round that runs; and its updates.

        Audio, marks and orders that the stream has not taken are lost.

        Raises:
            SnapshotError: see `Recognizer.snapshot`; and whatever made the lane fail.
        """
        data = await self._batcher.take_out(self, self._stream)
        if self._error is not None:
            raise self._error
        updates, self._outbox = self._outbox, []
        return data, updates

    @property
    def finished(self) -> bool:
        """Whether the stream knows that no audio follows."""
        return self._finished

    def finish(self) -> None:
        """No audio follows; `Ended` comes out once everything is recognised. Idempotent."""
        self._finishing = True
        self._batcher.wake()

    async def events(self) -> list[Update]:
        """Wait for events and take them all, each with how far the stream had come.

        Raises whatever made the lane fail, after the events from before the failure.
        """
        while not self._outbox:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        updates, self._outbox = self._outbox, []
        self._batcher.wake()
        return updates

    @property
    def waiting(self) -> float:
        """Seconds of audio in the inbox."""
        return self._waiting / self._sample_rate

    @property
    def samples(self) -> int:
        """Samples that have come."""
        return self._received

    @property
    def lag(self) -> float:
        """Seconds of audio that waited for recognition at the end of the last round."""
        return self._progress.lag

    @property
    def received(self) -> float:
        """Seconds of audio that have come."""
        return self._received / self._sample_rate

    @property
    def processed(self) -> float:
        """Seconds of audio recognised, by the end of the last round."""
        return self._progress.processed

    def close(self) -> None:
        """Forget the session; what is not recognised yet never will be. Idempotent."""
        self._batcher.remove(self)

    async def _enter(self) -> None:
        while self._error is None and (
            self.waiting >= HIGH_WATER or len(self._inbox) >= MAX_PIECES
        ):
            self._room.clear()
            await self._room.wait()
        if self._error is not None:
            raise self._error

    @property
    def _has_work(self) -> bool:
        # Decided on what the last round left, so that a round that runs is none of its business.
        if self._error is not None or len(self._outbox) >= MAX_OUTBOX:
            return False
        if self._state.ready:
            return True
        if not self._inbox:
            return self._finishing and not self._finished
        if isinstance(self._inbox[0], Marked):
            return True
        # Audio that completes no chunk may wait for more, unless `feed` would then wait too.
        return self._state.wants_audio and (
            self.waiting >= min(self._state.missing, HIGH_WATER / 2)
            or len(self._inbox) >= MAX_PIECES / 2
            or self._orders > 0
            or self._finishing
        )

    def _forget(self) -> None:
        """Let go of the stream, unless a round has it.

        Now, not when Python's collector finds the cycles of tasks and tracebacks that the session
        is in: that can be minutes and a megabyte or more for each session later.
        """
        if not self._out:
            self.__dict__.pop("_stream", None)
            self._inbox.clear()

    def _take(self) -> _Job:
        self._out = True
        pieces, self._inbox = self._inbox, Inbox()
        return _Job(
            lane=self,
            stream=self._stream,
            pieces=pieces,
            waiting=self._waiting,
            orders=self._orders,
            finish=self._finishing and not self._finished,
        )

    def _give_back(self, job: _Job, now: float) -> None:
        self._out = False
        job.pieces.extend(self._inbox)  # what arrived meanwhile comes after what was left over
        self._inbox = job.pieces
        self._waiting -= job.accepted
        self._orders -= job.obeyed
        self.finalized += job.finalized
        self._finished |= job.finished
        self._progress = job.progress or self._progress
        self._state = _State.of(self._stream)
        if job.stepped and self._due is not None:
            self._batcher.meter.waited(now - self._due)
            self._due = None
        self._look(now)
        for update in job.updates:
            self._post(update)
        if job.error is not None:
            self._fail(job.error)
        self._room.set()
        self._news.set()

    def _look(self, now: float) -> None:
        """Note when a whole chunk is there."""
        if self._due is None and (self._state.ready or self.waiting >= self._state.missing):
            self._due = now

    def _post(self, update: Update) -> None:
        # A partial is the whole state of its segment, so a newer one replaces one not yet sent.
        event = update[0]
        last = self._outbox[-1][0] if self._outbox else None
        if (
            isinstance(event, Partial)
            and isinstance(last, Partial)
            and last.segment == event.segment
        ) or (isinstance(event, Beat) and isinstance(last, Beat)):
            self._outbox[-1] = update
            self._batcher.drop(1)
        else:
            self._outbox.append(update)

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._inbox.clear()
        self._room.set()
        self._news.set()


@dataclasses.dataclass(frozen=True, slots=True)
class _State:
    """What the event loop may know of a stream while the worker has it."""

    ready: bool
    wants_audio: bool
    missing: float

    @classmethod
    def of(cls, stream: Stream) -> _State:
        return cls(stream.ready, stream.wants_audio, stream.missing)


@dataclasses.dataclass(kw_only=True)
class _Job:
    """One lane's share of a round; the worker owns it while the round runs."""

    lane: Lane
    stream: Stream
    pieces: Inbox
    waiting: int  # samples in `pieces` to begin with ...
    orders: int  # ... and marks and calls of `finalize`
    finish: bool
    accepted: int = 0  # samples
    obeyed: int = 0  # of the orders ...
    finalized: int = 0  # ... and calls of `finalize` among these
    finished: bool = False
    stepped: bool = False
    progress: Progress | None = None
    updates: list[Update] = dataclasses.field(default_factory=list)
    dropped: int = 0  # partials
    error: Exception | None = None

    @property
    def ending(self) -> bool:
        """Whether the stream is as good as through with its audio, but for its last chunks."""
        stream = self.stream
        over = self.finished or self.lane.finished
        left = stream.received - stream.processed
        return over and stream.ready and left <= stream.latency_ms / 1000

    def accept(self) -> None:
        """Move audio into the stream, as much as it wants."""
        try:
            while self.pieces:
                piece = self.pieces[0]
                if isinstance(piece, Marked):
                    if self.stream.ready:
                        break  # what it said before the mark comes first
                    self.updates.append((piece, self._progress(self.stream.received)))
                    self.obeyed += 1
                elif not self.stream.wants_audio:
                    break
                elif isinstance(piece, Finalize):
                    self.stream.finalize()
                    self.finalized += 1
                    self.obeyed += 1
                elif isinstance(piece, SetHotwords):
                    self.stream.set_hotwords(piece.hotwords)
                    self.obeyed += 1
                else:
                    self.stream.accept(piece)
                    self.accepted += len(piece)
                self.pieces.popleft()
        except BufferFull:
            pass  # nothing was taken; the piece goes in once a chunk has come out
        if self.finish and not self.pieces:
            self.stream.finish()
            self.finished = True

    def collect(self) -> None:
        """Take the stream's events, but for partials that the next round makes old."""
        received = self.stream.received + (self.waiting - self.accepted) / self.stream.sample_rate
        progress = self.progress = self._progress(received)
        events: Sequence[Event] = self.stream.events()
        shown = self.lane._shown_at
        stale = progress.lagging and self.stream.ready and self.orders == self.obeyed
        if stale and progress.processed < shown + LAG_LIMIT:
            fresh = [event for event in events if not isinstance(event, Partial)]
            self.dropped = len(events) - len(fresh)
            events = fresh
        elif any(isinstance(event, Partial) for event in events):
            self.lane._shown_at = progress.processed
        self.updates.extend((event, progress) for event in events)
        if self.updates:
            self.lane._told_at = received
        elif self.lane.beats and received >= self.lane._told_at + BEAT:
            self.updates.append((_BEAT, progress))
            self.lane._told_at = received

    def _progress(self, received: float) -> Progress:
        processed = self.stream.processed
        lag = received - processed
        return Progress(
            received=received,
            processed=processed,
            lag=round(lag, 3),
            lagging=lag > self.stream.latency_ms / 1000 + LAG_LIMIT,
            samples=round(self.stream.received * self.stream.sample_rate),
        )


class Observer(Protocol):
    """Who counts what the batcher does; called in its thread and in the event loop's."""

    def stepped(self, streams: int, seconds: float) -> None:
        """The recogniser advanced so many streams in so many seconds."""

    def dropped(self, partials: int) -> None:
        """Partials will not be sent because newer ones are there."""


class Batcher:
    """Runs a recogniser for many sessions. Use as ``async with Batcher(recognizer) as batcher``."""

    def __init__(
        self,
        recognizer: Recognizer,
        *,
        max_batch: int = MAX_BATCH,
        chunk_ms: float | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._recognizer = recognizer
        self._observer = observer
        self._max_batch = max_batch
        self._chunk_ms = chunk_ms
        self._lanes: dict[Lane, None] = {}  # in the order in which they are served
        self._wake = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="loquent-batcher")
        self._task: asyncio.Task[None] | None = None
        self.meter = LoadMeter()
        self.dropped_partials = 0

    async def __aenter__(self) -> Batcher:
        if self._chunk_ms is not None:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._executor, self._calibrate, self._chunk_ms)
        self._task = asyncio.create_task(self._run(), name="loquent-batcher")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._task is not None, "entered before it is left"
        self._task.cancel()
        await asyncio.wait([self._task])
        for lane in list(self._lanes):
            lane._fail(RuntimeError("the batcher was closed"))
        # A round that runs goes to its end; there is no way to stop the network half-way.
        await asyncio.to_thread(self._executor.shutdown)

    @property
    def running(self) -> bool:
        """Whether it works on what comes."""
        return self._task is not None and not self._task.done()

    @property
    def lanes(self) -> list[Lane]:
        """The lanes that are open."""
        return list(self._lanes)

    def add(self, stream: Stream, sample_rate: int, finished: bool = False) -> Lane:
        """A lane for a stream of `sample_rate` Hz; from here on nobody else may touch it.

        `finished`: it knows already that no audio follows.
        """
        lane = Lane(self, stream, sample_rate, finished)
        self._lanes[lane] = None
        return lane

    def seconds(self, stream: Stream) -> float:
        """The stream's chunk."""
        return self._recognizer.bundle.milliseconds(stream.segment) / 1000

    def load(self, extra: float = 0.0, count: int = 0) -> float:
        """Share of the worker's time that the streaming sessions need, as measured.

        Args:
            extra: seconds of a chunk of `count` more sessions.
        """
        now = time.monotonic()
        streams = Counter(lane.chunk for lane in self._lanes if now < lane._fed_at + _ACTIVE)
        streams[extra] += count
        return self.meter.load(streams, self._max_batch)

    def remove(self, lane: Lane) -> None:
        """Forget a lane. Idempotent."""
        self._lanes.pop(lane, None)
        lane._forget()

    def drop(self, partials: int) -> None:
        """Count partials that nobody will see."""
        self.dropped_partials += partials
        if partials and self._observer is not None:
            self._observer.dropped(partials)

    async def take_out(self, lane: Lane, stream: Stream) -> bytes:
        """Remove a lane and write its stream down, once no round has it."""
        self.remove(lane)
        loop = asyncio.get_running_loop()
        # The worker comes to this after the round that runs, whose results are then given back.
        return await loop.run_in_executor(self._executor, self._recognizer.snapshot, stream)

    def wake(self) -> None:
        """Something has arrived or been fetched: look at the lanes again."""
        self._wake.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while jobs := [lane._take() for lane in self._lanes if lane._has_work]:
                    await loop.run_in_executor(self._executor, self._round, jobs)
                    self._finish_round(jobs)
                self.meter.idle()
            except Exception as exc:
                # A mistake of ours, not of one session: nobody may be left waiting for ever.
                logger.exception("the batcher failed")
                for lane in list(self._lanes):
                    lane._out = False
                    lane._fail(exc)

    def _finish_round(self, jobs: Iterable[_Job]) -> None:
        now = time.monotonic()
        for job in jobs:
            self.drop(job.dropped)
            job.lane._give_back(job, now)
            if job.lane not in self._lanes:
                job.lane._forget()
            elif job.stepped:  # whoever was served queues up again
                self._lanes[job.lane] = self._lanes.pop(job.lane)

    # Everything below runs in the worker thread.

    def _round(self, jobs: list[_Job]) -> None:
        began = time.perf_counter()
        for job in jobs:
            self._guard(job, job.accept)
        ready = [job for job in jobs if job.error is None and job.stream.ready]
        if ready:
            # Who waits longest comes first; those who can share its batch come with it.
            chunk = ready[0].lane.chunk
            most = max(1, min(self._max_batch, int(MAX_ROUND / chunk)))
            ready = [job for job in ready if job.lane.chunk == chunk]
            ready = sorted(ready, key=lambda job: not job.ending)[:most]
            self._step(ready)
            done = len(ready)
            while last := [job for job in ready if job.error is None and job.ending]:
                done += len(last)
                if done * chunk > MAX_ROUND:
                    break
                self._step(last)
        for job in jobs:
            if job.error is None:
                self._guard(job, job.collect)
        if ready:
            seconds = time.perf_counter() - began
            self.meter.round(chunk, len(ready), seconds)
            if self._observer is not None:
                self._observer.stepped(len(ready), seconds)

    def _calibrate(self, chunk_ms: float) -> None:
        """Measure a few rounds, so that the first who come do not meet a server of unknown size."""
        recognizer = self._recognizer
        for batch in (1, 8):
            streams = [recognizer.stream(chunk_ms=chunk_ms) for _ in range(batch)]
            seconds = max(1.0, 2.5 * chunk_ms / 1000)
            noise = np.random.default_rng(0).normal(0, 0.05, int(seconds * streams[0].sample_rate))
            for stream in streams:
                stream.accept(noise.astype(np.float32))
            while all(stream.ready for stream in streams):
                began = time.perf_counter()
                recognizer.step(streams)
                self.meter.round(chunk_ms / 1000, batch, time.perf_counter() - began)

    def _step(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        for job in jobs:
            job.stepped = True
        try:
            self._recognizer.step([job.stream for job in jobs])
        except Exception as exc:
            logger.exception("a batch of %d streams failed", len(jobs))
            self._step_one_by_one(jobs, exc)

    def _step_one_by_one(self, jobs: list[_Job], error: Exception) -> None:
        if len(jobs) == 1:
            jobs[0].error = error
            return
        # One stream must not end the others: only those that fail alone are at fault.
        for job in jobs:
            self._guard(job, partial(self._recognizer.step, [job.stream]))

    @staticmethod
    def _guard(job: _Job, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as exc:
            logger.info("a session failed: %s", exc)
            job.error = exc
