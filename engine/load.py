"""How much work the sessions are, measured: what one more would cost, and how late results are.

Knows no clock: durations come in as arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

# Weight of a new measurement: about the last 50 of a kind count.
_NEW = 0.02


@dataclasses.dataclass
class _Line:
    """A straight line through (batch, seconds), the older points fading."""

    weight: float = 0.0
    batch: float = 0.0
    seconds: float = 0.0
    batch_batch: float = 0.0
    batch_seconds: float = 0.0

    def add(self, batch: int, seconds: float) -> None:
        for name, value in (
            ("weight", 1.0),
            ("batch", batch),
            ("seconds", seconds),
            ("batch_batch", batch * batch),
            ("batch_seconds", batch * seconds),
        ):
            setattr(self, name, getattr(self, name) * (1 - _NEW) + value * _NEW)

    def per_stream(self, batch: float) -> float:
        """Seconds for one stream of a batch of this size."""
        mean_b, mean_s = self.batch / self.weight, self.seconds / self.weight
        spread = self.batch_batch / self.weight - mean_b**2
        # Batches are relied upon as far as they were seen to pay, and no slope is below half of
        # what a stream cost on the average: a line through few points would say work is free.
        slope = mean_s / mean_b
        if spread > 0.1:
            line = (self.batch_seconds / self.weight - mean_b * mean_s) / spread
            slope = min(max(line, 0.5 * slope), slope)
        return slope + max(0.0, mean_s - slope * mean_b) / batch


class LoadMeter:
    """Measures rounds and foresees what a number of streams needs of the worker's time."""

    def __init__(self) -> None:
        self._lines: dict[float, _Line] = {}
        self.delay = 0.0

    def round(self, chunk: float, batch: int, seconds: float) -> None:
        """`batch` streams were advanced by a chunk of `chunk` seconds in `seconds`."""
        self._lines.setdefault(chunk, _Line()).add(batch, seconds)

    def waited(self, seconds: float) -> None:
        """A chunk had its results so many seconds after its audio was complete."""
        self.delay += 4 * _NEW * (seconds - self.delay)

    def idle(self) -> None:
        """Nothing waits for results."""
        self.delay = 0.0

    def load(self, streams: Mapping[float, int], max_batch: int) -> float:
        """Share of the worker's time that real-time streams need in batches of up to `max_batch`.

        Args:
            streams: number of streams by their chunk in seconds.
        """
        total = 0.0
        for chunk, count in streams.items():
            if count and (line := self._line(chunk)):
                total += count / chunk * line.per_stream(min(count, max_batch))
        return total

    def _line(self, chunk: float) -> _Line | None:
        if not self._lines:
            return None
        # For a chunk that nobody has used yet, the nearest: a chunk costs less than in proportion.
        return self._lines[min(self._lines, key=lambda known: abs(known - chunk))]
