"""``loquent bench soak``: many clients for long, and everything that a server meets in the wild.

N clients speak without a pause in between; their connections are cut at random and they resume.
Beside them there are clients that send and never read, and garbage of all kinds. Every final is
held against what an undisturbed stream of the same audio gives. The server's memory is written down
all the time. The run passes if no final is missing or wrong, nobody failed, and the memory did not
grow after the first tenth of the time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import WebSocketException

from loquent.clients.load import (
    PACKET,
    RATE,
    Rules,
    Speech,
    Tally,
    Utterance,
    add_options,
    core_of,
    keep_talking,
    pinned_server,
    speech_of,
)
from loquent.clients.options import make_parser, positive_int
from loquent.engine.events import Final
from loquent.engine.protocol import Start
from loquent.engine.recognizer import Recognizer

EXAMPLES = """\
  loquent bench soak --streams 60 --minutes 30"""
UTTERANCES = 24
# Growth of the server's memory, from the first tenth of the time to the end, that is no leak.
GROWTH_MB = 24.0


def expected(recognizer: Recognizer, speech: Speech, rules: Rules) -> list[Utterance]:
    """Utterances with the finals of an undisturbed stream."""
    rng = random.Random(7)
    utterances = []
    for _ in range(UTTERANCES):
        first = rng.randrange(len(speech.packets))
        count = int(rng.uniform(rules.shortest, rules.longest) / PACKET)
        stream = recognizer.stream(
            sample_rate=RATE,
            chunk_ms=rules.chunk_ms,
            right_context_ms=rules.right_context_ms,
            decoder=rules.decoder,
        )
        texts = []
        for number in range(count + 1):
            if number < count:
                stream.accept(speech.packets[(first + number) % len(speech.packets)])
            else:
                stream.finish()
            while stream.ready:
                recognizer.step([stream])
            texts += [event.text for event in stream.events() if isinstance(event, Final)]
        utterances.append(Utterance(first, count, tuple(texts)))
    return utterances


@contextlib.asynccontextmanager
async def rude(url: str, **options: Any) -> AsyncIterator[ClientConnection]:
    """A connection that ends without a word; waiting for an answer could be cut off at the end."""
    connection = await open_websocket(url, compression=None, proxy=None, **options)
    try:
        yield connection
    finally:
        connection.transport.abort()


async def never_read(url: str, speech: Speech, rng: random.Random) -> None:
    """A client that sends as fast as it can and reads nothing, until it is cut off."""
    start = Start(sample_rate=RATE, chunk_ms=160)
    with contextlib.suppress(OSError, WebSocketException, TimeoutError):
        async with rude(url, max_queue=1) as connection:
            await connection.send(start.encode())
            async with asyncio.timeout(60.0):
                while True:
                    await connection.send(rng.choice(speech.packets).tobytes())
                    await asyncio.sleep(PACKET / 2)


async def garbage(url: str, rng: random.Random) -> None:
    """One piece of rubbish."""
    where = urlsplit(url)
    kind = rng.randrange(6)
    with contextlib.suppress(OSError, WebSocketException, TimeoutError):
        async with asyncio.timeout(10.0):
            if kind < 2:
                _, writer = await asyncio.open_connection(where.hostname, where.port)
                head = b"GET /v1/stream HTTP/1.1\r\nUpgrade: websocket\r\n" if kind else b""
                try:
                    writer.write(head + rng.randbytes(rng.randrange(1, 5000)))
                    await writer.drain()
                    await asyncio.sleep(rng.random())
                finally:
                    writer.transport.abort()
                return
            async with rude(url) as connection:
                if kind == 2:
                    await connection.send(rng.randbytes(rng.randrange(1, 3000)))
                elif kind == 3:
                    await connection.send("{" * rng.randrange(1, 3000))
                elif kind == 4:
                    await connection.send(Start(sample_rate=RATE).encode())
                    await connection.send(rng.randbytes(3_000_000))
                else:
                    await connection.send(Start(sample_rate=48000, encoding="f32le").encode())
                    await connection.send(rng.randbytes(40_000))
                await connection.recv()
                await asyncio.sleep(rng.random())


async def throw_garbage(url: str, rng: random.Random, counts: dict[str, int]) -> None:
    """Rubbish every second or so, for ever."""
    while True:
        await garbage(url, rng)
        counts["garbage"] += 1
        await asyncio.sleep(rng.uniform(0.5, 1.5))


async def not_reading(url: str, speech: Speech, rng: random.Random, counts: dict[str, int]) -> None:
    """Clients that do not read, one after another, for ever."""
    while True:
        await never_read(url, speech, rng)
        counts["slow_readers"] += 1
        await asyncio.sleep(1.0)


def memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"process {pid} is gone")


async def soak(
    rules: Rules, speech: Speech, pid: int, options: argparse.Namespace
) -> tuple[Tally, list[tuple[float, float]], dict[str, int]]:
    """What the clients saw, the memory in MB by seconds, and how much trouble was made."""
    tally, counts = Tally(), {"garbage": 0, "slow_readers": 0}
    rngs = [random.Random(i) for i in range(options.streams)]
    tasks = [
        asyncio.create_task(
            keep_talking(rules, speech, tally, rng, rules.longest * i / options.streams)
        )
        for i, rng in enumerate(rngs)
    ]
    tasks.append(asyncio.create_task(throw_garbage(rules.url, random.Random(-1), counts)))
    tasks += [
        asyncio.create_task(not_reading(rules.url, speech, random.Random(-2 - i), counts))
        for i in range(options.slow_readers)
    ]
    began, curve = time.monotonic(), []
    seconds = options.minutes * 60
    try:
        while (now := time.monotonic() - began) < seconds:
            curve.append((round(now, 1), round(memory_mb(pid), 1)))
            print(
                f"{now:6.0f} of {seconds} s: {tally.sessions} sessions, {tally.finals} finals, "
                f"{tally.resumed} resumed, {len(tally.wrong)} wrong, {len(tally.failures)} failed, "
                f"{tally.refused} refused, {curve[-1][1]:.0f} MB",
                file=sys.stderr,
                flush=True,
            )
            await asyncio.sleep(min(10.0, max(1.0, seconds / 60)))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return tally, curve, counts


def growth(curve: Sequence[tuple[float, float]]) -> float:
    """MB by which the last tenth's memory is above that after the first tenth."""
    tenth = max(1, len(curve) // 10)
    values = [value for _, value in curve]
    early, late = values[tenth : 2 * tenth] or values, values[-tenth:]
    return round(max(late) - max(early), 1)


def parser() -> argparse.ArgumentParser:
    """The options of ``soak``."""
    parser = make_parser("bench soak", __doc__ or "", EXAMPLES)
    add_options(parser)
    add = parser.add_argument
    add("--chunk-ms", type=positive_int, default=160, help="default: 160")
    add("--streams", type=positive_int, default=16, help="clients at a time (default: 16)")
    add("--minutes", type=float, default=30.0, help="default: 30")
    add("--cut-every", type=float, default=15.0, help="seconds between a client's cuts (15)")
    add("--slow-readers", type=int, default=3, help="clients that do not read (default: 3)")
    add("--workers", type=positive_int, default=1, help="processes of the server (default: 1)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``bench soak``; returns the exit status."""
    options = parser().parse_args(argv)
    speech = speech_of(options)
    arguments = ["--bundle", options.bundle, "--max-sessions", str(2 * options.streams + 50)]
    arguments += ["--max-load", "0", "--max-parked", str(2 * options.streams)]
    arguments += ["--log-level", "warning", "--workers", str(options.workers)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with pinned_server(arguments, core_of(options), log) as server:
            rules = Rules(
                url=server.url,
                chunk_ms=options.chunk_ms,
                right_context_ms=options.right_context_ms,
                decoder=options.decoder,
                shortest=options.utterance / 2,
                longest=options.utterance,
                resume=True,
                cut_every=options.cut_every,
            )
            recognizer = Recognizer.load(options.bundle)
            rules = dataclasses.replace(rules, expected=expected(recognizer, speech, rules))
            tally, curve, counts = asyncio.run(soak(rules, speech, server.process.pid, options))
        logged = [line for line in log.read_text().splitlines() if _is_news(line)]
    grown = growth(curve)
    passed = not tally.wrong and not tally.failures and grown <= GROWTH_MB and not logged
    for name, lines in (("wrong", tally.wrong), ("failed", tally.failures), ("logged", logged)):
        for line in lines[:5]:
            print(f"{name}: {line}", file=sys.stderr)
    result: dict[str, Any] = {
        "passed": passed,
        "streams": options.streams,
        "chunk_ms": options.chunk_ms,
        "minutes": options.minutes,
        "finals": tally.finals,
        "wrong": len(tally.wrong),
        "resumed": tally.resumed,
        "refused": tally.refused,
        **counts,
        **tally.row(),
        "grown_mb": grown,
        "memory_mb": curve,
        "log_lines": len(logged),
    }
    print(json.dumps(result))
    return 0 if passed else 1


def _is_news(line: str) -> bool:
    told = ("page  ", "WebSocket  ", "Ctrl-C", "stopping", os.linesep)
    return bool(line.strip()) and not line.startswith(told)
