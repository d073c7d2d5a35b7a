"""``loquent stream``: send a file to a server as a microphone would, and show the delays."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

from loquent.clients.client import Session, UnreachableError, connect
from loquent.clients.live import Float32, stream_rate
from loquent.clients.options import (
    CHUNK_MS,
    add_decoder_options,
    add_right_context_option,
    add_session_options,
    hotwords_of,
    make_parser,
    non_negative_float,
    positive_int,
)
from loquent.clients.terminal import DIM, PLAIN, is_live
from loquent.engine.audio import AudioFile
from loquent.engine.events import Ended, Final, Finalized, Partial
from loquent.engine.protocol import Start

API_KEY = "LOQUENT_API_KEY"

EXAMPLES = """\
  loquent stream talk.wav
  loquent stream talk.wav --chunk-ms 80 --packet-ms 100
  loquent stream talk.wav --rate 4                        four times as fast as speech
  loquent stream talk.wav --url ws://192.0.2.7:8765/v1/stream"""


@dataclass
class Timeline:
    """When which audio was sent and what came back when; all in seconds."""

    clock: Callable[[], float] = time.monotonic
    sent_audio: list[float] = field(default_factory=list)  # audio time at each packet's end ...
    sent_at: list[float] = field(default_factory=list)  # ... and wall time of its sending
    ended_at: float | None = None
    partial_lags: list[float] = field(default_factory=list)
    final_lags: list[float] = field(default_factory=list)
    last_final_at: float | None = None

    def sent(self, audio_end: float) -> None:
        """The audio up to `audio_end` is on its way."""
        self.sent_audio.append(audio_end)
        self.sent_at.append(self.clock())

    def finished(self) -> None:
        """All audio is sent."""
        self.ended_at = self.clock()

    def lag(self, event: Partial | Final) -> float:
        """Wall time since the audio in which the event's last word ends was sent."""
        # A word may be found to end in the silence that follows the last packet.
        packet = min(bisect_left(self.sent_audio, event.end), len(self.sent_at) - 1)
        now = self.clock()
        lag = now - self.sent_at[packet]
        if isinstance(event, Partial):
            self.partial_lags.append(lag)
        else:
            self.final_lags.append(lag)
            self.last_final_at = now
        return lag

    def summary(self) -> str:
        """One line with all of it."""
        parts = [_spread("partial lag", self.partial_lags), _spread("final lag", self.final_lags)]
        if self.ended_at is not None and self.last_final_at is not None:
            # Below zero where the last sentence was settled before all the audio was sent.
            after = self.last_final_at - self.ended_at
            parts.append(f"last final {after:+.3f} s from the end")
        audio = self.sent_audio[-1] if self.sent_audio else 0.0
        return "; ".join([f"{audio:.2f} s of audio", *parts])


def _spread(name: str, lags: Sequence[float]) -> str:
    if not lags:
        return f"{name}: none"
    p90 = quantiles(lags, n=10, method="inclusive")[-1] if len(lags) > 1 else lags[0]
    return f"{name}: median {median(lags):.3f} s, p90 {p90:.3f} s, n {len(lags)}"


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = make_parser(
        "stream",
        "Send an audio file to a server at the speed of speech and print its events. Each line: "
        "time in the audio, time since the audio of the last word was sent, event, text.",
        EXAMPLES,
    )
    parser.add_argument("file", metavar="FILE", help="an audio file")
    parser.add_argument(
        "--url",
        default="ws://127.0.0.1:8765/v1/stream",
        help=f"the server (default: %(default)s); an API key for it comes from {API_KEY}",
    )
    parser.add_argument(
        "--chunk-ms",
        type=positive_int,
        default=CHUNK_MS,
        metavar="N",
        help="how much speech is recognised at a time: 40 to 1280 ms (default: %(default)s)",
    )
    add_right_context_option(parser)
    parser.add_argument(
        "--packet-ms",
        type=positive_int,
        default=20,
        metavar="N",
        help="audio in one message (default: %(default)s)",
    )
    parser.add_argument(
        "--rate",
        type=non_negative_float,
        default=1.0,
        metavar="X",
        help="speed: 1 as speech, 2 twice as fast, 0 without pause (default: 1)",
    )
    add_decoder_options(parser)
    add_session_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options = parser().parse_args(argv)
    asyncio.run(_run(options))
    return 0


async def _run(options: argparse.Namespace) -> None:
    file = AudioFile(options.file)
    rate = stream_rate(file)
    # float32 carries the file's samples as `loquent transcribe` sees them: the same text comes out.
    start = Start(
        sample_rate=rate,
        encoding="f32le",
        chunk_ms=options.chunk_ms,
        right_context_ms=options.right_context_ms,
        decoder=options.decoder,
        blank_penalty=options.blank_penalty,
        lm_weight=options.lm_weight,
        endpoint_silence=options.endpoint_silence,
        leading_silence=options.leading_silence,
        max_utterance=options.max_utterance,
        vad=options.vad,
        finish=options.finish or None,
        hotwords=hotwords_of(options) or None,
        stability=options.stability,
    )
    timeline = Timeline()
    async with connect(options.url, start, key=os.environ.get(API_KEY)) as session:
        ready = session.ready
        print(
            f"{ready.bundle}, {ready.decoder}, {ready.chunk_ms:g} ms at a time, at best "
            f"{ready.latency_ms:g} ms behind",
            file=sys.stderr,
        )
        blocks = file.blocks(seconds=options.packet_ms / 1000, sample_rate=rate)
        sender = asyncio.create_task(_send(session, blocks, rate, options.rate, timeline))
        receiver = asyncio.create_task(_receive(session, timeline))
        tasks = (sender, receiver)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    print(timeline.summary(), file=sys.stderr)
    if timeline.ended_at is None:
        raise UnreachableError("the server ended the session before the file was sent")


async def _send(
    session: Session, blocks: Iterable[Float32], rate: int, speed: float, timeline: Timeline
) -> None:
    begin = time.monotonic()
    samples = 0
    try:
        for block in blocks:
            samples += len(block)
            if speed:
                # A packet leaves when a microphone would have heard all of it.
                await asyncio.sleep(begin + samples / rate / speed - time.monotonic())
            timeline.sent(samples / rate)
            await session.send(block)
        await session.end()
        timeline.finished()
    except UnreachableError:
        pass  # the receiving side learns the reason


async def _receive(session: Session, timeline: Timeline) -> None:
    dim, plain = (DIM, PLAIN) if is_live(sys.stdout) else ("", "")
    async for event in session:
        match event:
            case Ended():
                return
            case Finalized():
                continue
            case Partial():
                kind, text = "partial", f"{event.committed} {dim}{event.tentative}{plain}".strip()
            case Final():
                kind, text = f"final ({event.reason})", event.text
        print(f"{event.end:8.2f}  {timeline.lag(event):+7.3f}  {kind:<16}  {text}", flush=True)
