"""``loquent bench load`` and ``loquent bench soak``: how many real-time streams a server holds.

``load`` starts a server on one core and talks to it from another: N clients that send speech as a
microphone would, stop after some seconds, wait for their last words and begin anew. N grows until
the 99th percentile of the time from the end to the last final is over 300 ms and a chunk; the
largest N that was within is the result. It does so for every chunk size, in batches and one by
one. ``soak`` keeps N clients at it for long and adds what a server meets in the wild: connections
that are cut (and resumed), clients that do not read, and garbage. The last line is JSON.

Times of the clients are their own: if they cannot keep their own pace, the run says so and counts
as failed. Both programs belong on cores of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loquent.clients.client import Session, UnreachableError, connect
from loquent.clients.options import make_parser, positive_int
from loquent.engine.audio import load_audio
from loquent.engine.errors import LoquentError
from loquent.engine.events import Ended, Final, Partial
from loquent.engine.protocol import Start, WireError

RATE = 16000
# Seconds beyond a chunk for the last final, at the 99th percentile.
WITHIN = 0.3
PACKET = 0.1

EXAMPLES = """\
  loquent bench load                                   160 and 640 ms, batched and not
  loquent bench load --chunk-ms 320 --start 40         begin the search at 40 streams
  loquent bench load --chunk-ms 320 --streams 50       only at 50 streams
  loquent bench soak --streams 60 --minutes 30         with cuts, slow readers and garbage"""


@dataclasses.dataclass
class Tally:
    """What the clients of one run saw; times in seconds."""

    final: list[float] = dataclasses.field(default_factory=list)  # from the end to the last word
    first: list[float] = dataclasses.field(default_factory=list)  # of a word, to its first partial
    lag: list[float] = dataclasses.field(default_factory=list)  # of audio, at every message
    late: list[float] = dataclasses.field(default_factory=list)  # of our own packets
    sessions: int = 0
    resumed: int = 0
    refused: int = 0
    finals: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)  # sessions with other finals
    failures: list[str] = dataclasses.field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """The numbers for people and for JSON."""
        row: dict[str, Any] = {"sessions": self.sessions, "failures": len(self.failures)}
        for name, values in (("final", self.final), ("first", self.first), ("lag", self.lag)):
            for part in (50, 90, 99):
                row[f"{name}_p{part}"] = _percentile(values, part)
        row["late_p99"] = _percentile(self.late, 99)
        return row


def _percentile(values: Sequence[float], part: float) -> float | None:
    return round(float(np.percentile(values, part)), 3) if values else None


class Speech:
    """Packets of a recording, encoded once and for all; sessions begin at different places."""

    def __init__(self, path: Path) -> None:
        samples = load_audio(path, sample_rate=RATE)
        pcm = np.round(np.clip(samples, -1, 1) * 32767).astype("<i2")
        size = int(PACKET * RATE)
        self.packets: list[NDArray[np.int16]] = [
            pcm[at : at + size] for at in range(0, len(pcm) - size, size)
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class Utterance:
    """Packets `first` to `first + count`, and the finals that an undisturbed stream gives."""

    first: int
    count: int
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How clients talk: utterances of `shortest` to `longest` seconds, in chunks of `chunk_ms`."""

    url: str
    chunk_ms: float
    right_context_ms: int | None = None
    decoder: str | None = None
    shortest: float = 4.0
    longest: float = 8.0
    expected: Sequence[Utterance] = ()  # to be said, and what has to be heard; () for anything
    resume: bool = False
    cut_every: float = 0.0  # seconds between cuts of a client's connection, on the average


async def talk(rules: Rules, speech: Speech, tally: Tally, rng: random.Random) -> None:
    """One session: speak for a while in real time, stop, wait for the last word."""
    start = Start(
        sample_rate=RATE,
        chunk_ms=rules.chunk_ms,
        right_context_ms=rules.right_context_ms,
        decoder=rules.decoder,
        resume=True if rules.resume else None,
    )
    count = int(rng.uniform(rules.shortest, rules.longest) / PACKET)
    first = rng.randrange(len(speech.packets))
    expected: tuple[str, ...] | None = None
    if rules.expected:
        utterance = rng.choice(rules.expected)
        first, count, expected = utterance.first, utterance.count, utterance.texts
    heard: list[str] = []
    sent_at: list[float] = []
    ended_at = 0.0
    async with connect(rules.url, start, patience=30.0) as session:

        async def speak() -> None:
            nonlocal ended_at
            begin = time.monotonic()
            for number in range(count):
                due = begin + (number + 1) * PACKET
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tally.late.append(time.monotonic() - due)
                sent_at.append(time.monotonic())
                await session.send(speech.packets[(first + number) % len(speech.packets)])
            ended_at = time.monotonic()
            await session.end()

        cutter = asyncio.create_task(_cut(session, rules.cut_every, rng))
        speaker = asyncio.create_task(speak())
        seen = False
        try:
            async with asyncio.timeout(rules.longest + 90.0):
                async for event in session:
                    now = time.monotonic()
                    if not isinstance(event, Ended):
                        tally.lag.append(session.progress.lag)
                    if isinstance(event, Partial | Final) and not seen:
                        seen = True
                        packet = min(int(event.end / PACKET), len(sent_at) - 1)
                        tally.first.append(now - sent_at[packet])
                    if isinstance(event, Final):
                        heard.append(event.text)
                    if isinstance(event, Ended):
                        await speaker
                        tally.finals += len(heard)
                        if expected is not None and tuple(heard) != expected:
                            tally.wrong.append(f"got {heard}, expected {list(expected)}")
                        if abs(event.duration - count * PACKET) > 1e-6:
                            raise UnreachableError(
                                f"{event.duration:.3f} s were heard of {count * PACKET:.3f} s sent"
                            )
                        tally.final.append(now - ended_at)
        finally:
            cutter.cancel()
            speaker.cancel()
            await asyncio.gather(cutter, speaker, return_exceptions=True)
        tally.resumed += session.connections - 1
    tally.sessions += 1


async def _cut(session: Session, every: float, rng: random.Random) -> None:
    """Cut the connection again and again, as a bad network does."""
    while every:
        await asyncio.sleep(rng.expovariate(1 / every))
        if session._connection.transport is not None:
            session._connection.transport.abort()


async def keep_talking(
    rules: Rules, speech: Speech, tally: Tally, rng: random.Random, delay: float
) -> None:
    """Sessions one after another, for ever."""
    await asyncio.sleep(delay)
    while True:
        try:
            await talk(rules, speech, tally, rng)
        except WireError as exc:
            _failed(tally, exc, busy=exc.code == "busy")
            await asyncio.sleep(1.0)
        except (LoquentError, TimeoutError) as exc:
            _failed(tally, exc, busy="503" in str(exc))
            await asyncio.sleep(1.0)


def _failed(tally: Tally, exc: Exception, *, busy: bool) -> None:
    if busy:
        tally.refused += 1
    else:
        tally.failures.append(f"{type(exc).__name__}: {exc}")


async def run_streams(
    rules: Rules, speech: Speech, streams: int, seconds: float, *, seed: int = 0
) -> Tally:
    """`streams` clients for so long; what they do in the first utterance is not counted."""
    tally, warm = Tally(), rules.longest
    tasks = [
        asyncio.create_task(
            keep_talking(rules, speech, tally, random.Random(seed * 9973 + i), warm * i / streams)
        )
        for i in range(streams)
    ]
    try:
        await asyncio.sleep(warm * 1.5)
        for name in ("final", "first", "lag", "late"):
            getattr(tally, name).clear()
        await asyncio.sleep(seconds)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return tally


@dataclasses.dataclass(frozen=True, slots=True)
class Running:
    """A server that was started."""

    url: str
    process: subprocess.Popen[bytes]


def within(tally: Tally, chunk_ms: float) -> bool:
    """Whether everybody was served in time."""
    final = _percentile(tally.final, 99)
    return not tally.failures and final is not None and final <= WITHIN + chunk_ms / 1000


def search(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The largest number that fits, to about a twentieth; 0 if none does."""
    good, bad = 0, most + 1
    at = min(start, most)
    while bad - good > max(1, good // 20):
        if fits(at):
            good = at
        else:
            bad = at
        at = good * 3 // 2 if bad > most and good else (good + bad) // 2
        at = min(max(at, good + 1), most if bad > most else bad - 1)
        if good >= most:
            break
    return good


@contextmanager
def pinned_server(arguments: Sequence[str], core: int | None, log: Path) -> Iterator[Running]:
    """A server in its own process, on one core, that writes to `log`."""
    command = [sys.executable, "-m", "loquent.clients.cli", "serve", "--port", "0", *arguments]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    with log.open("w") as out:
        process = subprocess.Popen(command, stderr=out, env=environment)
    try:
        if core is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, {core})
        until = time.monotonic() + 60.0
        while not (match := re.search(r"wss?://\S+", log.read_text())):
            if process.poll() is not None or time.monotonic() > until:
                raise UnreachableError(f"the server did not start: {log.read_text().strip()}")
            time.sleep(0.1)
        yield Running(match[0], process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def parser() -> argparse.ArgumentParser:
    """The options of ``load``."""
    parser = make_parser("bench load", __doc__ or "", EXAMPLES)
    add_options(parser)
    parser.add_argument(
        "--chunk-ms", type=positive_int, action="append", help="may be repeated (160 and 640)"
    )
    parser.add_argument(
        "--seconds", type=positive_int, default=20, help="measured for each N (default: 20)"
    )
    parser.add_argument("--start", type=positive_int, default=16, help="N to begin with (16)")
    parser.add_argument("--most", type=positive_int, default=400, help="largest N tried (400)")
    parser.add_argument("--streams", type=positive_int, help="no search: only this N")
    parser.add_argument(
        "--mode",
        choices=("both", "batched", "unbatched"),
        default="both",
        help="unbatched is one stream in each step (default: both)",
    )
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """What both commands know."""
    add = parser.add_argument
    add("--bundle", default="en", help="of the server (default: en)")
    add("--right-context-ms", type=int, metavar="N", help="of the sessions (default: the bundle's)")
    add("--decoder", help="of the sessions (default: as the bundle says)")
    add("--audio", type=Path, help="speech to send (default: the bundled sample)")
    add("--utterance", type=positive_int, default=8, help="longest, in seconds (default: 8)")
    add("--server-core", type=int, default=0, help="for the server (default: 0, -1 for any)")
    add("--client-core", type=int, default=1, help="for the clients (default: 1, -1 for any)")


def speech_of(options: argparse.Namespace) -> Speech:
    """The recording to send, and our own core taken."""
    if options.client_core >= 0 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {options.client_core})
    sample = Path(sys.modules["loquent.engine"].__path__[0]) / "samples" / "morning.flac"
    return Speech(options.audio or sample)


def core_of(options: argparse.Namespace) -> int | None:
    """The server's core."""
    return options.server_core if options.server_core >= 0 else None


TABLE = (
    "| chunk ms | mode | N | sessions | final p50 | p90 | p99 | first p50 | p99 | lag p99 | |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def main(argv: Sequence[str]) -> int:
    """Run ``bench load``; returns the exit status."""
    options = parser().parse_args(argv)
    speech = speech_of(options)
    rows: list[dict[str, Any]] = []
    largest: dict[str, int] = {}
    print("\n".join(TABLE), flush=True)
    modes = ("batched", "unbatched") if options.mode == "both" else (options.mode,)
    for chunk_ms in options.chunk_ms or (160, 640):
        for mode in modes:
            found, best = _measure(options, speech, chunk_ms, mode)
            rows += found
            if best is not None:
                largest[f"{chunk_ms} {mode}"] = best
    for name, streams in largest.items():
        print(f"{name}: {streams} streams")
    print(json.dumps({"largest": largest, "runs": rows}))
    return 0


def _measure(
    options: argparse.Namespace, speech: Speech, chunk_ms: float, mode: str
) -> tuple[list[dict[str, Any]], int | None]:
    """The runs for one chunk size and mode, and the largest N unless only one was asked for."""
    arguments = ["--bundle", options.bundle, "--chunk-ms", str(chunk_ms)]
    arguments += ["--max-sessions", "2000", "--max-load", "0"]
    if mode == "unbatched":
        arguments += ["--max-batch", "1"]
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        pinned_server(arguments, core_of(options), Path(folder) / "log") as server,
    ):
        rules = Rules(
            url=server.url,
            chunk_ms=chunk_ms,
            right_context_ms=options.right_context_ms,
            decoder=options.decoder,
            shortest=options.utterance / 2,
            longest=options.utterance,
        )

        def fits(streams: int) -> bool:
            print(f"{mode}, {chunk_ms} ms, {streams} streams ...", file=sys.stderr, flush=True)
            tally = asyncio.run(run_streams(rules, speech, streams, options.seconds))
            ok = within(tally, chunk_ms)
            row = {"chunk_ms": chunk_ms, "mode": mode, "streams": streams, "ok": ok}
            rows.append(row | tally.row())
            print(_line(rows[-1]), flush=True)
            for failure in tally.failures[:3]:
                print(f"  {failure}", file=sys.stderr)
            return ok

        if options.streams:
            fits(options.streams)
            return rows, None
        return rows, search(fits, options.start, options.most)


def _line(row: dict[str, Any]) -> str:
    cells = [f"{row['chunk_ms']:g}", row["mode"], row["streams"], row["sessions"]]
    names = ("final_p50", "final_p90", "final_p99", "first_p50", "first_p99", "lag_p99")
    cells += ["-" if row[name] is None else f"{row[name]:.3f}" for name in names]
    late = row["late_p99"] is not None and row["late_p99"] > 0.05
    cells.append(("ok" if row["ok"] else "too late") + (", clients late" if late else ""))
    return "| " + " | ".join(map(str, cells)) + " |"
