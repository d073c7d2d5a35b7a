"""Who gets a place when there is little left: a bounded line, first come, first served."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

# Seconds between two looks whether there is a place: load falls without any event.
_LOOK = 0.1
# A place that was granted and not taken is free again after so many seconds.
_GRANT = 10.0


class Line:
    """Those who wait for a place.

    Args:
        full: why there is no place for one more beside a number of granted ones, None if there is.
        length: of the line.
        patience: seconds that one waits in it.
    """

    def __init__(self, full: Callable[[int], str | None], *, length: int, patience: float) -> None:
        self._full = full
        self._length = length
        self._patience = patience
        self._waiting: deque[object] = deque()
        self._granted: dict[str, float] = {}

    @property
    def waiting(self) -> int:
        """How many stand in line."""
        return len(self._waiting)

    async def enter(self, name: str) -> str | None:
        """Get a place, by waiting if need be; returns why there is none."""
        if not self._waiting and self._why() is None:
            self._granted[name] = time.monotonic()
            return None
        if len(self._waiting) >= self._length:
            return self._why() or "others wait for a place already"
        me = object()
        self._waiting.append(me)
        until = time.monotonic() + self._patience
        try:
            while True:
                # Only the first in line may take a place.
                if self._waiting[0] is me and self._why() is None:
                    self._granted[name] = time.monotonic()
                    return None
                if time.monotonic() >= until:
                    return self._why() or "others wait for a place already"
                await asyncio.sleep(_LOOK)
        finally:
            self._waiting.remove(me)

    def take(self, name: str) -> str | None:
        """The session begins, whether it was granted a place or not; returns why it must not."""
        if self._granted.pop(name, None) is not None:
            return None
        return self._why()

    def release(self, name: str) -> None:
        """A place that was granted will not be taken. Idempotent."""
        self._granted.pop(name, None)

    def _why(self) -> str | None:
        old = time.monotonic() - _GRANT
        self._granted = {name: when for name, when in self._granted.items() if when > old}
        return self._full(len(self._granted))
