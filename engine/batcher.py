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
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np

from loquent.engine.lane import Job, Lane
from loquent.engine.load import LoadMeter
from loquent.engine.recognizer import Recognizer
from loquent.engine.stream import Stream

logger = logging.getLogger(__name__)

# More streams than this go into the next round, so that one round stays short for everybody ...
MAX_BATCH = 32
# ... and so do they if their chunks are more seconds of audio than this together.
MAX_ROUND = 10.24
# A session counts as streaming for so many seconds after its last audio.
_ACTIVE = 2.0


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
            lane.fail(RuntimeError("the batcher was closed"))
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
        streams = Counter(lane.chunk for lane in self._lanes if now < lane.fed_at + _ACTIVE)
        streams[extra] += count
        return self.meter.load(streams, self._max_batch)

    def remove(self, lane: Lane) -> None:
        """Forget a lane. Idempotent."""
        self._lanes.pop(lane, None)
        lane.forget()

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

    async def restore(self, data: bytes) -> Stream:
        """A stream that was written down, between two rounds: it gets a row in the encoder's pool.

        Raises SnapshotError.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._recognizer.restore, data)

    def wake(self) -> None:
        """Something has arrived or been fetched: look at the lanes again."""
        self._wake.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while jobs := [lane.take() for lane in self._lanes if lane.has_work]:
                    await loop.run_in_executor(self._executor, self._round, jobs)
                    self._finish_round(jobs)
                self.meter.idle()
            except Exception as exc:
                # A mistake of ours, not of one session: nobody may be left waiting for ever.
                logger.exception("the batcher failed")
                for lane in list(self._lanes):
                    lane.out = False
                    lane.fail(exc)

    def _finish_round(self, jobs: Iterable[Job]) -> None:
        now = time.monotonic()
        for job in jobs:
            self.drop(job.dropped)
            job.lane.give_back(job, now)
            if job.lane not in self._lanes:
                job.lane.forget()
            elif job.stepped:  # whoever was served queues up again
                self._lanes[job.lane] = self._lanes.pop(job.lane)

    # Everything below runs in the worker thread.

    def _round(self, jobs: list[Job]) -> None:
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

    def _step(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        for job in jobs:
            job.stepped = True
        try:
            self._recognizer.step([job.stream for job in jobs])
        except Exception as exc:
            logger.exception("a batch of %d streams failed", len(jobs))
            self._step_one_by_one(jobs, exc)

    def _step_one_by_one(self, jobs: list[Job], error: Exception) -> None:
        if len(jobs) == 1:
            jobs[0].error = error
            return
        # One stream must not end the others: only those that fail alone are at fault.
        for job in jobs:
            self._guard(job, partial(self._recognizer.step, [job.stream]))

    @staticmethod
    def _guard(job: Job, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as exc:
            logger.info("a session failed: %s", exc)
            job.error = exc
