"""Recordings through the engine chunk by chunk, as a server would do it: what it hears, and when.

Clips run side by side as a batch of streams of different ages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from loquent.engine.events import Event, Final, Partial
from loquent.engine.recognizer import Recognizer
from loquent.engine.stream import Stream

Float32 = NDArray[np.float32]
BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A word of the final text.

    Attributes:
        text: the word.
        shown: seconds of audio heard when it stood there as it finally was, and stayed.
        settled: seconds of audio heard when it was committed, and could change no more.
    """

    text: str
    shown: float
    settled: float


@dataclass
class Watcher:
    """Follows the words of one stream through its events."""

    said: list[Said] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)
    _shown: list[float] = field(default_factory=list)
    _settled: list[float] = field(default_factory=list)

    def see(self, event: Event, heard: float) -> None:
        """Take an event that came when ``heard`` seconds of the audio had been used."""
        if isinstance(event, Partial):
            self._update([w.text for w in event.words], len(event.committed.split()), heard)
        elif isinstance(event, Final):
            words = [w.text for w in event.words]
            # What stands behind a final that was cut at the limit goes on into the next segment.
            self._update([*words, *self._open[len(words) :]], len(words), heard)
            for text, shown, settled in zip(words, self._shown, self._settled, strict=False):
                self.said.append(Said(text=text, shown=shown, settled=settled))
            for row in (self._open, self._shown, self._settled):
                del row[: len(words)]

    def _update(self, words: list[str], settled: int, heard: float) -> None:
        for i, word in enumerate(words):
            if i == len(self._open):
                self._open.append(word)
                self._shown.append(heard)
            elif self._open[i] != word:
                self._open[i], self._shown[i] = word, heard
        del self._open[len(words) :], self._shown[len(words) :]
        del self._settled[len(words) :]
        self._settled += [heard] * (settled - len(self._settled))


class _Clip:
    """A recording on its way through a stream."""

    def __init__(self, index: int, stream: Stream, pcm: Float32) -> None:
        self.index, self.stream, self.pcm = index, stream, pcm
        self.sent = 0
        self.watcher = Watcher()

    def feed(self) -> None:
        """Give the stream as much as it wants."""
        while self.stream.wants_audio and self.sent < len(self.pcm):
            self.stream.accept(self.pcm[self.sent : self.sent + self.stream.sample_rate])
            self.sent += self.stream.sample_rate
        if self.sent >= len(self.pcm):
            self.stream.finish()

    @property
    def heard(self) -> float:
        """Seconds of audio that the next step will have used."""
        window = self.stream.latency_ms / 1000
        return min(self.stream.processed + window, len(self.pcm) / self.stream.sample_rate)


def stream_all(
    recognizer: Recognizer,
    audio: Sequence[Callable[[], Float32]],
    *,
    decoder: str,
    chunk_ms: float,
    right_context_ms: float | None = None,
    batch: int = BATCH,
) -> list[list[Said]]:
    """The words of each recording, streamed ``batch`` at a time; a free place is filled at once.

    Args:
        recognizer: of the bundle.
        audio: give the samples, at the bundle's rate, when their turn comes.
        decoder, chunk_ms, right_context_ms: of every stream.
        batch: recordings side by side.
    """
    words: list[list[Said]] = [[] for _ in audio]
    waiting = iter(range(len(audio)))
    running: list[_Clip] = []
    with tqdm(total=len(audio), unit="clip", leave=False, disable=None) as bar:
        bar.set_description(f"{decoder} {chunk_ms:g} ms")
        while True:
            while len(running) < batch and (i := next(waiting, None)) is not None:
                stream = recognizer.stream(
                    sample_rate=recognizer.bundle.sample_rate,
                    decoder=decoder,
                    chunk_ms=chunk_ms,
                    right_context_ms=right_context_ms,
                )
                running.append(_Clip(i, stream, audio[i]()))
            if not running:
                return words
            for clip in running:
                clip.feed()
            heard = [clip.heard for clip in running]
            recognizer.step([clip.stream for clip in running])
            for clip, seconds in zip(running, heard, strict=True):
                for event in clip.stream.events():
                    clip.watcher.see(event, seconds)
                words[clip.index] = clip.watcher.said
            bar.update(sum(clip.stream.done for clip in running))
            running = [clip for clip in running if not clip.stream.done]
