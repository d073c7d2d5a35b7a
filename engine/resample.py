"""Streaming sample-rate conversion with libsoxr.

The concatenated output of ``soxr.ResampleStream`` was measured to be the same bit for bit for
packets from one sample to the whole signal, at every rate tried between 8 and 48 kHz including odd
ones (8001, 44099, 47999 Hz); ``tests/engine/test_resample.py`` keeps it so. Only *when* samples
come out depends on the packets: the filter works in blocks and holds up to 40 ms (from 22 kHz up)
or 115 ms (from 8 kHz) back.
"""

from __future__ import annotations

import math

import numpy as np
import soxr
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

_NOTHING: Float32 = np.zeros(0, np.float32)


class Resampler:
    """From ``rate_in`` to ``rate_out`` Hz, packet by packet; the identity when they are equal."""

    def __init__(self, rate_in: int, rate_out: int) -> None:
        self._ratio = rate_out / rate_in
        self._received = 0
        self._produced = 0
        self._soxr = (
            None
            if rate_in == rate_out
            else soxr.ResampleStream(rate_in, rate_out, 1, dtype="float32", quality="HQ")
        )

    def most(self, count: int) -> int:
        """An upper bound of what ``accept`` of ``count`` samples and ``finish`` give together."""
        if self._soxr is None:
            return count
        return math.ceil((self._received + count) * self._ratio) + 1 - self._produced

    def accept(self, samples: Float32) -> Float32:
        """(N,) float32 in, (M,) float32 out; M may be 0."""
        if self._soxr is None:
            return samples
        self._received += len(samples)
        if len(samples) == 0:
            return _NOTHING
        return self._count(self._soxr.resample_chunk(np.ascontiguousarray(samples)))

    def finish(self) -> Float32:
        """What the filter still holds. Call it once, last."""
        if self._soxr is None:
            return _NOTHING
        return self._count(self._soxr.resample_chunk(_NOTHING, last=True))

    def _count(self, samples: NDArray[np.float32]) -> Float32:
        self._produced += len(samples)
        return samples
