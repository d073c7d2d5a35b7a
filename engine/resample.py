"""Streaming sample-rate conversion with libsoxr.

The concatenated output of ``soxr.ResampleStream`` was measured to be the same bit for bit for
packets from one sample to the whole signal, at every rate tried between 8 and 48 kHz including odd
ones (8001, 44099, 47999 Hz); ``tests/engine/test_resample.py`` keeps it so. Only *when* samples
come out depends on the packets: the filter works in blocks and holds up to 40 ms (from 22 kHz up)
or 115 ms (from 8 kHz) back.

A soxr stream can be neither copied nor continued after its end. What it would give at its end is
therefore computed by a second one that starts a little earlier, where input and output samples
coincide; the filter's memory is shorter than that, and the two agree to 2e-7, float32's last bits.
"""

from __future__ import annotations

import math

import numpy as np
import soxr
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

_NOTHING: Float32 = np.zeros(0, np.float32)
# Seconds that the second stream starts before the samples that matter: far more than the filter.
_MEMORY = 0.3


class Resampler:
    """From ``rate_in`` to ``rate_out`` Hz, packet by packet; the identity when they are equal."""

    def __init__(self, rate_in: int, rate_out: int) -> None:
        self._rates = (rate_in, rate_out)
        self._ratio = rate_out / rate_in
        # Input samples from one that falls on an output sample to the next that does.
        self._period = rate_in // math.gcd(rate_in, rate_out)
        self._keep = math.ceil(_MEMORY * rate_in) + self._period
        self._recent = _NOTHING  # the last samples of the input
        self._received = 0
        self._produced = 0
        self._skip = 0  # samples that a filter which was started anew says again
        self._early = _NOTHING  # ... or that it said before the one that it stands in for
        self._soxr = None if rate_in == rate_out else self._stream()

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
        self._recent = np.concatenate([self._recent, samples])[-self._keep :]
        return self._count(self._soxr.resample_chunk(np.ascontiguousarray(samples)))

    def finish(self) -> Float32:
        """What the filter still holds. Call it once, last."""
        if self._soxr is None:
            return _NOTHING
        return self._count(self._soxr.resample_chunk(_NOTHING, last=True))

    def rest(self) -> Float32:
        """What ``finish`` would give now. Changes nothing: ``accept`` goes on as if never asked."""
        if self._soxr is None or not self._received:
            return _NOTHING
        oldest = self._received - len(self._recent)
        start = -(-oldest // self._period) * self._period
        again = self._stream().resample_chunk(self._recent[start - oldest :], last=True)
        rate_in, rate_out = self._rates
        rest: Float32 = again[self._produced - start * rate_out // rate_in :]
        return rest

    def restart(self) -> None:
        """Make the filter anew from the last samples of the input, where a snapshot left it out.

        Samples from here on agree with those of the filter that is lost to 2e-7, as in ``rest``.
        """
        rate_in, rate_out = self._rates
        self._soxr = None if rate_in == rate_out else self._stream()
        self._skip, self._early = 0, _NOTHING
        if self._soxr is None or not self._received:
            return
        oldest = self._received - len(self._recent)
        start = -(-oldest // self._period) * self._period
        again = self._soxr.resample_chunk(np.ascontiguousarray(self._recent[start - oldest :]))
        known = self._produced - start * rate_out // rate_in
        self._skip, self._early = max(0, known - len(again)), again[known:]

    def _stream(self) -> soxr.ResampleStream:
        return soxr.ResampleStream(*self._rates, 1, dtype="float32", quality="HQ")

    def _count(self, samples: NDArray[np.float32]) -> Float32:
        if self._skip or len(self._early):
            count = len(samples)
            samples = np.concatenate([self._early, samples[self._skip :]])
            self._skip, self._early = max(0, self._skip - count), _NOTHING
        self._produced += len(samples)
        return samples
