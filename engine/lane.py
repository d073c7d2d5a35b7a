"""One session's way through the batcher, on either side of its worker thread.

A :class:`Lane` is the event loop's: audio, marks and orders go into its inbox, events come out of
its outbox. A :class:`Job` is what the worker takes of it for one round and gives back.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loquent.engine.endpoint import EndpointRules
from loquent.engine.errors import BufferFull
from loquent.engine.events import Event, Partial
from loquent.engine.hotwords import HotwordGraph
from loquent.engine.protocol import Finalize, Pcm, Progress, SetEndpoint
from loquent.engine.stream import Stream, as_float32

if TYPE_CHECKING:
    from loquent.engine.batcher import Batcher

# Seconds of audio that may wait in an inbox before `feed` waits (one message may go beyond it).
HIGH_WATER = 2.0
# Audio goes into a stream in pieces of this many seconds: any message then fits below its limit.
PIECE = 0.1
# Pieces, marks and calls of `finalize` in an inbox from which on all wait, however short they are.
MAX_PIECES = 256
# Events that may wait for a slow client before its lane pauses; its partials are merged into one.
MAX_OUTBOX = 64
# A stream is behind if this many seconds of audio wait beyond those that its latency explains.
LAG_LIMIT = 1.0
# Seconds of audio after which a lane with `beats` says how far it is.
BEAT = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Marked:
    """The answer to the oldest `Lane.mark` that has none yet."""


class Beat(Marked):
    """A mark that nobody set, for whoever wants to know the progress where no event tells it."""


_MARK = Marked()
_BEAT = Beat()
Update = tuple[Event | Marked, Progress]


@dataclasses.dataclass(frozen=True, slots=True)
class _Expect:
    """Other hotwords, built already: the worker has to serve everybody."""

    graph: HotwordGraph | None


# What waits for the worker, in order: audio, and marks and calls of `finalize` in between.
Inbox = deque[Pcm | Marked | Finalize | _Expect | SetEndpoint]


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
        self.fed_at = time.monotonic()  # when audio came last; a new session is about to send ...
        self._due: float | None = None  # ... and when a whole chunk was there
        self.beats = False  # `Beat` comes out where the audio goes on and no event says so
        self.told_at = 0.0  # seconds of audio received when progress was last told; the worker's
        self.finalizes = 0  # calls of `finalize` so far ...
        self.finalized = 0  # ... and how many of them the stream has
        self._state = _State.of(stream)
        self.out = False  # a round has the stream
        self._progress = Progress(received=0.0, processed=0.0)
        self._finishing = self._finished = finished
        self._outbox: list[Update] = []
        self.shown_at = -LAG_LIMIT  # seconds of audio processed at the last partial; the worker's
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
        self.fed_at = time.monotonic()
        self._look(self.fed_at)
        if self.has_work:
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

    async def set_hotwords(self, graph: HotwordGraph | None) -> None:
        """Other hotwords once the audio before is in the stream, see `Stream.set_hotwords`.

        Waits and raises as `feed` does.
        """
        await self._enter()
        self._inbox.append(_Expect(graph))
        self._orders += 1
        self._batcher.wake()

    async def set_endpoint(self, rules: EndpointRules | None) -> None:
        """Other rules from the next chunk on, once the chunks before are recognised.

        Waits and raises as `feed` does.
        """
        await self._enter()
        self._inbox.append(SetEndpoint(endpoint=rules))
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
    def has_work(self) -> bool:
        """Whether a round would get on with it."""
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

    def forget(self) -> None:
        """Let go of the stream, unless a round has it.

        Now, not when Python's collector finds the cycles of tasks and tracebacks that the session
        is in: that can be minutes and a megabyte or more for each session later.
        """
        if not self.out:
            self.__dict__.pop("_stream", None)
            self._inbox.clear()

    def take(self) -> Job:
        """Its share of the next round, which has the stream until :meth:`give_back`."""
        self.out = True
        pieces, self._inbox = self._inbox, Inbox()
        return Job(
            lane=self,
            stream=self._stream,
            pieces=pieces,
            waiting=self._waiting,
            orders=self._orders,
            finish=self._finishing and not self._finished,
        )

    def give_back(self, job: Job, now: float) -> None:
        """What a round has made of it, at `now` of the monotonic clock."""
        self.out = False
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
            self.fail(job.error)
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

    def fail(self, error: Exception) -> None:
        """Whoever waits, or comes from now on, gets the error."""
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
class Job:
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
                if isinstance(piece, Marked | SetEndpoint) and self.stream.ready:
                    break  # what it says of the audio before comes first
                if isinstance(piece, Marked):
                    self.updates.append((piece, self._progress(self.stream.received)))
                    self.obeyed += 1
                elif isinstance(piece, SetEndpoint):
                    self.stream.set_endpoint(piece.endpoint)
                    self.obeyed += 1
                elif not self.stream.wants_audio:
                    break
                elif isinstance(piece, Finalize):
                    self.stream.finalize()
                    self.finalized += 1
                    self.obeyed += 1
                elif isinstance(piece, _Expect):
                    self.stream.set_hotwords(piece.graph or ())
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
        shown = self.lane.shown_at
        stale = progress.lagging and self.stream.ready and self.orders == self.obeyed
        if stale and progress.processed < shown + LAG_LIMIT:
            fresh = [event for event in events if not isinstance(event, Partial)]
            self.dropped = len(events) - len(fresh)
            events = fresh
        elif any(isinstance(event, Partial) for event in events):
            self.lane.shown_at = progress.processed
        self.updates.extend((event, progress) for event in events)
        if self.updates:
            self.lane.told_at = received
        elif self.lane.beats and received >= self.lane.told_at + BEAT:
            self.updates.append((_BEAT, progress))
            self.lane.told_at = received

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
