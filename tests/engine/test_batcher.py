"""What sessions may expect of the batcher under load. Slow recognisers are real, but delayed."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loquent.engine.batcher import MAX_ROUND, Batcher
from loquent.engine.events import Ended, Event, Final, Partial
from loquent.engine.lane import LAG_LIMIT, Lane, Marked
from loquent.engine.load import LoadMeter
from loquent.engine.protocol import Progress
from loquent.engine.recognizer import Recognizer
from loquent.engine.stream import Stream

Float32 = NDArray[np.float32]
Speak = Callable[..., Float32]
Run = Callable[..., list[Event]]


class Slow:
    """A recogniser whose steps take `seconds` longer, and that keeps what it was asked for."""

    def __init__(self, recognizer: Recognizer, seconds: float = 0.0) -> None:
        self._recognizer = recognizer
        self.seconds = seconds
        self.batches: list[list[int]] = []  # the segments of each step's streams

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recognizer, name)

    def step(self, streams: Iterable[Stream]) -> None:
        streams = list(streams)
        self.batches.append([stream.segment for stream in streams])
        time.sleep(self.seconds)
        self._recognizer.step(streams)


async def drain(lane: Lane) -> list[tuple[Any, Progress]]:
    updates: list[tuple[Any, Progress]] = []
    while not updates or not isinstance(updates[-1][0], Ended):
        updates += await lane.events()
    return updates


def settled(events: Iterable[Any]) -> list[Event]:
    return [event for event in events if isinstance(event, Final | Ended)]


SPEECH = [(1 + i % 8, 0.25) for i in range(30)] + [(0, 1.2)] + [(1 + i % 7, 0.2) for i in range(10)]


async def test_when_behind_stale_partials_go_and_audio_and_finals_stay(
    tiny: Recognizer, tones: Speak, run: Run
) -> None:
    pcm = tones(SPEECH)
    whole = run(tiny, tiny.stream(chunk_ms=80), pcm, [1600])
    slow = Slow(tiny, 0.005)
    async with Batcher(slow) as batcher:  # type: ignore[arg-type]
        lane = batcher.add(tiny.stream(chunk_ms=80), 16000)
        reader = asyncio.create_task(drain(lane))
        for at in range(0, len(pcm), 1600):  # as fast as it is taken: far faster than it is heard
            await lane.feed(pcm[at : at + 1600])
        lane.finish()
        updates = await asyncio.wait_for(reader, 30)
        assert batcher.dropped_partials > 20
    assert settled(event for event, _ in updates) == settled(whole)
    partials = [event for event in whole if isinstance(event, Partial)]
    sent = [event for event, _ in updates if isinstance(event, Partial)]
    assert 3 < len(sent) < len(partials) / 2
    assert all(event in partials for event in sent)
    # Whoever is behind hears so, and still sees text about once for every second of audio.
    behind = [progress for _, progress in updates if progress.lagging]
    assert max(progress.lag for progress in behind) > LAG_LIMIT
    seen = [progress.processed for event, progress in updates if not isinstance(event, Ended)]
    assert max(b - a for a, b in itertools.pairwise(seen)) < 3 * LAG_LIMIT
    assert updates[-1][1].lag == 0.0


async def test_in_real_time_nothing_lags_and_no_partial_is_dropped(
    tiny: Recognizer, tones: Speak, run: Run
) -> None:
    pcm = tones(SPEECH[:12])
    whole = run(tiny, tiny.stream(chunk_ms=160), pcm, [1600])
    async with Batcher(tiny) as batcher:
        lane = batcher.add(tiny.stream(chunk_ms=160), 16000)
        reader = asyncio.create_task(drain(lane))
        for at in range(0, len(pcm), 1600):
            await lane.feed(pcm[at : at + 1600])
            await asyncio.sleep(0.02)
        lane.finish()
        updates = await asyncio.wait_for(reader, 30)
    assert [event for event, _ in updates] == whole
    assert not any(progress.lagging for _, progress in updates)


async def test_a_round_has_one_chunk_size_and_a_bounded_length(
    tiny: Recognizer, tones: Speak
) -> None:
    """Whoever has the small chunks waits for one round of the others, never for all of them."""
    pcm = tones(SPEECH)
    slow = Slow(tiny)
    async with Batcher(slow) as batcher:  # type: ignore[arg-type]
        gate = threading.Event()
        batcher._executor.submit(gate.wait)
        lanes = [batcher.add(tiny.stream(chunk_ms=1280), 16000) for _ in range(20)]
        lanes += [batcher.add(tiny.stream(chunk_ms=40), 16000) for _ in range(4)]
        tasks = [asyncio.create_task(drain(lane)) for lane in lanes]
        for lane in lanes:
            await lane.feed(pcm)
            lane.finish()
        gate.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
    assert all(len(set(batch)) == 1 for batch in slow.batches)
    assert max(len(batch) for batch in slow.batches if batch[0] == 128) == int(MAX_ROUND / 1.28)
    assert max(len(batch) for batch in slow.batches if batch[0] == 4) == 4
    # As long as both have work, three rounds of the twenty at most come before the four's turn,
    # and one for those of them that are at their end.
    both = slow.batches[: slow.batches.index([4] * 4) + 40]
    for is_large, batches in itertools.groupby(both, lambda batch: batch[0] == 128):
        assert not is_large or 1.28 * sum(map(len, batches)) <= 4 * MAX_ROUND + 1e-6


async def test_the_end_of_the_audio_is_recognised_in_one_round(
    tiny: Recognizer, tones: Speak
) -> None:
    """Somebody waits for the last word; with others about, each round more is a long one."""
    slow = Slow(tiny)
    async with Batcher(slow) as batcher:  # type: ignore[arg-type]
        lanes = [batcher.add(tiny.stream(chunk_ms=160), 16000) for _ in range(3)]
        for lane in lanes:
            await lane.feed(tones(SPEECH)[:7520])
            await lane.mark()
            async with asyncio.timeout(30):
                while not any(isinstance(event, Marked) for event, _ in await lane.events()):
                    pass
        slow.batches.clear()
        rounds = 0
        take = batcher._round

        def count(jobs: Any) -> None:
            nonlocal rounds
            rounds += 1
            take(jobs)

        batcher._round = count  # type: ignore[method-assign]
        lanes[1].finish()
        await asyncio.wait_for(drain(lanes[1]), 30)
    assert rounds == 1
    assert len(slow.batches) > 1, "the flush takes more than a chunk"


async def test_packets_that_complete_no_chunk_cost_no_round(tiny: Recognizer, tones: Speak) -> None:
    pcm = tones(SPEECH[:20])
    async with Batcher(tiny) as batcher:
        rounds = 0
        original = batcher._round

        def counted(jobs: Any) -> None:
            nonlocal rounds
            rounds += 1
            original(jobs)

        batcher._round = counted  # type: ignore[method-assign]
        lane = batcher.add(tiny.stream(chunk_ms=640), 16000)
        reader = asyncio.create_task(drain(lane))
        for at in range(0, len(pcm), 160):
            await lane.feed(pcm[at : at + 160])
            await asyncio.sleep(0)
        lane.finish()
        await asyncio.wait_for(reader, 30)
    assert rounds < len(pcm) / 16000 / 0.64 + 10 < len(pcm) / 160 / 10


def test_the_meter_foresees_what_streams_cost_in_batches() -> None:
    """Rounds of 2 ms and 1 ms for each stream: sixteen together cost 18 ms, not 48."""
    meter = LoadMeter()
    rng = np.random.default_rng(1)
    assert meter.load({0.16: 100}, 32) == 0.0
    for batch in rng.integers(1, 9, 300):
        meter.round(0.16, int(batch), 0.002 + 0.001 * int(batch) + rng.normal(0, 1e-5))
    assert meter.load({0.16: 1}, 32) == pytest.approx(0.003 / 0.16, rel=0.05)
    assert meter.load({0.16: 16}, 32) == pytest.approx(0.018 / 0.16, rel=0.05)
    assert meter.load({0.16: 64}, 32) == pytest.approx(2 * 0.034 / 0.16, rel=0.05)
    # Alone all the time, nothing is known of batches, so they are not relied upon.
    alone = LoadMeter()
    for _ in range(50):
        alone.round(0.32, 1, 0.004)
    assert alone.load({0.32: 40}, 32) == pytest.approx(40 * 0.004 / 0.32)


async def test_one_session_waits_less_than_two_milliseconds_for_the_batcher(
    tiny: Recognizer, tones: Speak
) -> None:
    """From a whole chunk to its events, less the recogniser's own time."""
    pcm = tones([(1 + i % 8, 0.16) for i in range(200)])
    took: list[float] = []
    inner = tiny.step

    class Timed(Slow):
        def step(self, streams: Iterable[Stream]) -> None:
            began = time.perf_counter()
            inner(streams)
            took.append(time.perf_counter() - began)

    added = []
    async with Batcher(Timed(tiny)) as batcher:  # type: ignore[arg-type]
        lane = batcher.add(tiny.stream(chunk_ms=160), 16000)
        for at in range(0, len(pcm) - 2560, 2560):
            before = time.perf_counter()
            steps = len(took)
            await lane.feed(pcm[at : at + 2560])
            await lane.mark()
            async with asyncio.timeout(5):
                while not any(isinstance(event, Marked) for event, _ in await lane.events()):
                    pass
            if len(took) == steps + 1:
                added.append(time.perf_counter() - before - took[-1])
    assert len(added) > 100
    # Other programs make it longer, never shorter.
    assert min(added) < 2e-3
