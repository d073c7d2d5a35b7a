"""A bounded buffer of samples addressed by their absolute index in the signal.

``head`` and ``tail`` only ever grow; they never wrap around for the caller, so a position is a
time. The idea is sherpa's ``circular-buffer.h``; where that exits when full, this one refuses the
whole packet and leaves it to the caller, who had been told to pause by the water marks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loquent.engine.errors import BufferFull

Float32 = NDArray[np.float32]


class Ring:
    """Samples ``[tail, head)`` of a signal, at most ``capacity`` of them.

    Args:
        capacity: samples that fit.
        high: from this fill on ``wants_audio`` is False ...
        low: ... until the fill is down to this.
    """

    def __init__(self, capacity: int, *, high: int, low: int) -> None:
        assert 0 <= low < high <= capacity, (low, high, capacity)
        self._data: Float32 = np.zeros(capacity, np.float32)
        self._high = high
        self._low = low
        self._paused = False
        self.head = 0
        self.tail = 0

    @property
    def capacity(self) -> int:
        """Samples that fit."""
        return len(self._data)

    @property
    def fill(self) -> int:
        """Samples held."""
        return self.head - self.tail

    @property
    def free(self) -> int:
        """Samples that can be pushed now."""
        return self.capacity - self.fill

    @property
    def wants_audio(self) -> bool:
        """False from the high water mark until the fill has come down to the low one."""
        return not self._paused

    def push(self, samples: Float32) -> None:
        """Append (N,) samples.

        Raises:
            BufferFull: they do not fit; nothing was consumed.
        """
        count = len(samples)
        if count > self.free:
            raise BufferFull(
                f"got {count} samples, expected no more than {self.free} (the buffer holds "
                f"{self.fill} of {self.capacity}); let the recogniser step first"
            )
        start = self.head % self.capacity
        first = min(count, self.capacity - start)
        self._data[start : start + first] = samples[:first]
        self._data[: count - first] = samples[first:]
        self.head += count
        if self.fill >= self._high:
            self._paused = True

    def read(self, count: int) -> Float32:
        """The oldest ``count`` samples, contiguous, without removing them.

        The array is read-only and may be a view: use it before the next ``push``.
        """
        assert 0 <= count <= self.fill, (count, self.fill)
        start = self.tail % self.capacity
        samples = self._data[start : start + count]
        if len(samples) < count:
            samples = np.concatenate([samples, self._data[: count - len(samples)]])
        samples.flags.writeable = False
        return samples

    def drop(self, count: int) -> None:
        """Forget the oldest ``count`` samples."""
        assert 0 <= count <= self.fill, (count, self.fill)
        self.tail += count
        if self.fill <= self._low:
            self._paused = False

    def refill(self, capacity: int, samples: Float32) -> None:
        """Hold these again, ``[tail, head)``: for a ring whose other fields are there already."""
        assert len(samples) == self.fill <= capacity, (len(samples), self.fill, capacity)
        self._data = np.zeros(capacity, np.float32)
        start = self.tail % capacity
        first = min(len(samples), capacity - start)
        self._data[start : start + first] = samples[:first]
        self._data[: len(samples) - first] = samples[first:]
