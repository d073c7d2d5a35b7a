"""Audio blocks in, events out, as the audio comes: what mic, demo and transcribe have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from loquent.engine.audio import AudioFile
from loquent.engine.events import Event
from loquent.engine.recognizer import Recognizer
from loquent.engine.stream import Stream

Float32 = npt.NDArray[np.float32]

# What a stream takes as it is; files outside of this are resampled on the way in.
MIN_RATE, MAX_RATE, USUAL_RATE = 8000, 48000, 16000


def recognise(recognizer: Recognizer, stream: Stream, blocks: Iterable[Float32]) -> Iterator[Event]:
    """The events of `blocks`, mono, shape (N,) each; the last one is `Ended`."""
    for block in blocks:
        stream.accept(block)
        yield from _advance(recognizer, stream)
    stream.finish()
    yield from _advance(recognizer, stream)


def _advance(recognizer: Recognizer, stream: Stream) -> Iterator[Event]:
    while stream.ready:
        recognizer.step([stream])
        yield from stream.events()
    yield from stream.events()


def stream_rate(file: AudioFile) -> int:
    """The rate in Hz at which to read a file: its own where a stream takes that."""
    return file.sample_rate if MIN_RATE <= file.sample_rate <= MAX_RATE else USUAL_RATE
