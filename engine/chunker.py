"""Cuts a stream of feature frames into the windows that the encoder wants.

Window k covers the frames ``[k*S, k*S + S + R)``: a segment of S new frames and R frames of right
context and convolution look-ahead, which come again as the start of the next window. All lengths
are in feature frames.

After the last frame the signal goes on as silence until the last real frame has passed through the
encoder: see :func:`flush_frames`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def flush_frames(*, subsampling: int, right_context: int, lookahead: int) -> int:
    """Frames of silence behind the last real one that must still be encoded.

    An encoder frame that holds the last real feature frame sees ``lookahead + right_context``
    frames of what follows. Where words are followed by silence, which is how the model met them,
    their last token may come as late as the frame that has all of this behind it, and one encoder
    frame later still, because subsampling rounds. A constant would cut the last word of models with
    more context; a whole segment would make the end depend on the chunk size.
    """
    return lookahead + right_context + subsampling


class Chunker:
    """Windows of one stream.

    Args:
        segment: S, frames to advance by.
        right: R, frames of context and look-ahead behind the segment.
        flush: frames of silence that are encoded behind the end of the signal.
        pad_frame: (F,) features of silence.
    """

    def __init__(self, *, segment: int, right: int, flush: int, pad_frame: Float32) -> None:
        self.segment = segment
        self.length = segment + right
        self._flush = flush
        self._pad_frame = pad_frame
        self._frames: Float32 = np.zeros((0, len(pad_frame)), np.float32)
        self._start = 0  # index of the first frame held
        self._total: int | None = None

    @property
    def start(self) -> int:
        """First frame of the next window, counted from the start of the stream."""
        return self._start

    @property
    def needed(self) -> int:
        """Frames, counted from the start of the stream, that complete the next window."""
        return self._start + self.length

    @property
    def complete(self) -> bool:
        """Whether ``finish`` was called."""
        return self._total is not None

    @property
    def ready(self) -> bool:
        """Whether there is a window to take."""
        if self._total is None:
            return len(self._frames) >= self.length
        return self._start < self._total

    @property
    def exhausted(self) -> bool:
        """Whether no window will ever come again."""
        return self.complete and not self.ready

    @property
    def padded(self) -> bool:
        """Whether the next window goes on beyond the last frame."""
        return self.complete and len(self._frames) < self.length

    @property
    def valid(self) -> int:
        """Frames of the next window's segment that count: all but what lies beyond the flush."""
        if self._total is None:
            return self.segment
        return min(self.segment, self._total - self._start)

    def accept(self, frames: Float32) -> None:
        """Append (T, F) frames, any T."""
        assert self._total is None, "frames after finish()"
        self._frames = np.concatenate([self._frames, frames])

    def finish(self) -> None:
        """No frames follow; the windows that are left get padded. Idempotent."""
        if self._total is None:
            # A signal without a single frame has nothing to encode.
            received = self._start + len(self._frames)
            self._total = received + self._flush if received else 0

    def window(self) -> Float32:
        """The next window, (segment + right, F), without moving on to it."""
        assert self.ready
        missing = self.length - len(self._frames)
        if missing <= 0:
            return self._frames[: self.length]
        return np.concatenate([self._frames, np.tile(self._pad_frame, (missing, 1))])

    def advance(self) -> None:
        """Done with this window: move on by one segment."""
        assert self.ready
        self._frames = self._frames[self.segment :]
        self._start += self.segment
