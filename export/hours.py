"""``loquent measure hours``: a stream of many hours, faster than real time.

The recordings of ``measure endpoints`` go round and round through one stream. It must need no more
memory at the end than near the start, no more time for a chunk, and say the same words as the same
audio in parts. The parts are cut where the stream's own encoder starts anew, in a pause: from such
a point on a stream owes nothing to its past, and a new stream must hear the same.
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from loquent.engine.events import Event, Final, Word
from loquent.engine.recognizer import Recognizer
from loquent.engine.stream import Stream
from loquent.engine.vad import Vad

Float32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """One of the equal stretches that the stream is cut into for the table."""

    hours: float
    rss_mb: float
    median_ms: float
    p95_ms: float
    words: int


@dataclass(frozen=True, kw_only=True)
class LongRun:
    """What a long stream showed.

    Attributes:
        parts, same: parts heard again alone, and those in which words and times are the same.
        part_words, part_errors: words in them, and how many differ.
    """

    stretches: tuple[Stretch, ...]
    parts: int
    same: int
    part_words: int
    part_errors: int


def listen(
    recognizer: Recognizer,
    audio: Sequence[Float32],
    *,
    hours: float,
    decoder: str | None,
    chunk_ms: float,
    vad: Vad | None,
    stretches: int = 16,
    parts: int = 40,
) -> LongRun:
    """Run one stream for ``hours`` of audio, then ``parts`` stretches of it again on their own."""
    rate = recognizer.bundle.sample_rate

    def stream() -> Stream:
        return recognizer.stream(sample_rate=rate, decoder=decoder, chunk_ms=chunk_ms, vad=vad)

    long = stream()
    total = round(hours * 3600)
    # What is kept of eight hours of words must not look like memory that the stream needs.
    texts: list[str] = []
    starts = array("d")
    cuts = array("d", [0.0])
    rows: list[Stretch] = []
    times: list[float] = []
    said = 0
    signal = _rounds(audio, rate)
    with tqdm(total=total, unit="s", desc=f"{hours:g} h") as bar:
        for second in range(total):
            long.accept(next(signal))
            bar.update()
            while long.ready:
                begun = time.perf_counter()
                recognizer.step([long])
                times.append(1000 * (time.perf_counter() - begun))
                if long.fresh and long.processed > cuts[-1] + 20:
                    cuts.append(long.processed)
                for word in _words(long.events()):
                    texts.append(sys.intern(word.text))
                    starts.append(word.start)
            if (second + 1) % (total // stretches) == 0:
                rows.append(
                    Stretch(
                        hours=(second + 1) / 3600,
                        rss_mb=resident_mb(),
                        median_ms=float(np.median(times)),
                        p95_ms=float(np.quantile(times, 0.95)),
                        words=len(texts) - said,
                    )
                )
                times, said = [], len(texts)
    chosen = sorted({round(x) for x in np.linspace(0, len(cuts) - 2, parts)} - {-1})
    signal, at = _rounds(audio, rate), 0
    same = count = errors = 0
    held: Float32 = np.zeros(0, np.float32)
    for index in tqdm(chosen, desc="parts", unit="part"):
        first, end = (round(cut * rate) for cut in (cuts[index], cuts[index + 1]))
        while at + len(held) < end:
            if at + len(held) <= first:
                at, held = at + len(held), held[:0]
            held = np.concatenate([held, next(signal)])
        alone = [
            (word.text, round(word.start + cuts[index], 2))
            for word in _alone(recognizer, stream(), held[first - at : end - at])
            if word.start + cuts[index] < cuts[index + 1]  # not in the silence of the flush
        ]
        inside = [
            (text, round(start, 2))
            for text, start in zip(texts, starts, strict=True)
            if cuts[index] <= start < cuts[index + 1]
        ]
        held, at = held[end - at :], end
        same += alone == inside
        count += len(inside)
        errors += len(set(inside) ^ set(alone))
    return LongRun(
        stretches=tuple(rows), parts=len(chosen), same=same, part_words=count, part_errors=errors
    )


def _rounds(audio: Sequence[Float32], rate: int) -> Iterator[Float32]:
    """Seconds of the recordings, round and round."""
    whole = np.concatenate(list(audio))
    at = 0
    while True:
        yield np.take(whole, np.arange(at, at + rate), mode="wrap")
        at = (at + rate) % len(whole)


def _alone(recognizer: Recognizer, stream: Stream, pcm: Float32) -> list[Word]:
    words: list[Word] = []
    for at in range(0, len(pcm), stream.sample_rate):
        stream.accept(pcm[at : at + stream.sample_rate])
        while stream.ready:
            recognizer.step([stream])
        words += _words(stream.events())
    stream.finish()
    while stream.ready:
        recognizer.step([stream])
    return words + _words(stream.events())


def _words(events: Sequence[Event]) -> list[Word]:
    return [word for event in events if isinstance(event, Final) for word in event.words]


def resident_mb() -> float:
    """Memory of this process in RAM, in MB; 0 where the system does not say (not Linux)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0.0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def table(run: LongRun) -> str:
    """Markdown, and what it comes to."""
    lines = ["| hours | RSS MB | median ms/chunk | p95 | words |", "|---" * 5 + "|"]
    lines += [
        f"| {s.hours:.2f} | {s.rss_mb:.1f} | {s.median_ms:.2f} | {s.p95_ms:.2f} | {s.words} |"
        for s in run.stretches
    ]
    first, last = run.stretches[0], run.stretches[-1]
    lines.append(
        f"\nRSS {100 * (last.rss_mb / max(first.rss_mb, 1e-9) - 1):+.1f} %, time for a chunk "
        f"{100 * (last.median_ms / first.median_ms - 1):+.1f} % from the first stretch to the last"
        f"\n{run.same} of {run.parts} parts are the same alone, word for word and time for time; "
        f"{run.part_errors} of {run.part_words} words differ"
    )
    return "\n".join(lines)
