"""How much one client may ask of the server. Knows no sockets; the time comes in as an argument."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator

from loquent.engine.protocol import WireError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on one client; 0 stands for no limit. Times in seconds.

    Attributes:
        sessions_per_key: at a time, of all who use keys of one name.
        sessions_per_address: at a time, of one IPv4 address or IPv6 /64. This machine's own
            addresses have no limit.
        session_seconds: how long a session may last.
        start_timeout: from the connection to the first message, where the client speaks first.
        max_speed: audio is read at most this many times faster than it was spoken, once the first
            `BURST_AUDIO` seconds are in; a client that sends faster has to wait.
        messages_per_second: what a session may send beside `MESSAGES_PER_AUDIO` messages for each
            second of audio, with `BURST_MESSAGES` to begin with. A long text counts for several.
            Without this limit there is none for hotwords either.
        file_seconds: audio in an uploaded file, which may be far longer than its bytes suggest.
    """

    sessions_per_key: int = 0
    sessions_per_address: int = 32
    session_seconds: float = 86400.0
    start_timeout: float = 15.0
    max_speed: float = 16.0
    messages_per_second: float = 100.0
    file_seconds: float = 14400.0


BURST_AUDIO = 30.0
# Packets of 5 ms and longer are never too many, however fast a recording is sent.
MESSAGES_PER_AUDIO = 200.0
BURST_MESSAGES = 2000.0
# Sixteen channels of 48 kHz float32 are 3 MB for a second.
BYTES_PER_AUDIO = 4e6
BYTES_PER_SECOND = 1e6
BURST_BYTES = 32e6
# Text that is no audio takes a hundred times as long to read.
TEXT_PER_MESSAGE = 1000.0
# Characters of hotwords, which take a few microseconds each to build: those of all sessions that
# one client has, and has had. Every list counts for some more, and one that is at hand for no more.
HOTWORDS_PER_SECOND = 20e3
BURST_HOTWORDS = 1e6
A_LIST = 1000.0
MAX_WAIT = 10.0


class Bucket:
    """A token bucket: `rate` tokens a second come in, up to `capacity`."""

    def __init__(self, rate: float, capacity: float, now: float) -> None:
        self._rate = rate
        self._capacity = capacity
        self._level = capacity
        self._now = now

    def fill(self, tokens: float) -> None:
        """Tokens that did not come with time."""
        self._level = min(self._capacity, self._level + tokens)

    def take(self, tokens: float, now: float) -> float:
        """Take tokens, though the bucket owe them; returns the seconds until it owes none."""
        self.fill((now - self._now) * self._rate)
        self._now = now
        self._level -= tokens
        return max(0.0, -self._level / self._rate)

    def full(self, now: float) -> bool:
        """Whether it is as if nothing had ever been taken."""
        return self._level + (now - self._now) * self._rate >= self._capacity


class Meter:
    """What one session sends. Audio that comes too fast waits; floods of messages are refused."""

    def __init__(self, limits: Limits, now: float) -> None:
        speed, messages = limits.max_speed, limits.messages_per_second
        self._audio = Bucket(speed, BURST_AUDIO, now) if speed else None
        self._messages = Bucket(messages, BURST_MESSAGES, now) if messages else None
        self._bytes = Bucket(BYTES_PER_SECOND, BURST_BYTES, now) if messages else None

    def message(self, size: int, now: float, *, text: bool = False) -> None:
        """A message of `size` bytes or characters came. Raises WireError."""
        weight = max(1.0, size / TEXT_PER_MESSAGE) if text else 1.0
        if self._messages is not None and self._messages.take(weight, now) > 0.0:
            raise WireError(
                "flooded",
                "got more messages than the audio in them accounts for; send audio in packets of "
                "20 to 200 ms",
            )
        if self._bytes is not None and self._bytes.take(float(size), now) > 0.0:
            raise WireError(
                "flooded", "got more bytes than the audio in them accounts for; send audio only"
            )

    def audio(self, seconds: float, now: float) -> float:
        """So much audio was in it; returns how long not to read on."""
        if self._messages is not None:
            self._messages.fill(seconds * MESSAGES_PER_AUDIO)
        if self._bytes is not None:
            self._bytes.fill(seconds * BYTES_PER_AUDIO)
        return self._audio.take(seconds, now) if self._audio is not None else 0.0


class HotwordMeter:
    """What clients ask of hotwords. Who asks for a little too much waits; for more, is refused."""

    def __init__(self, limits: Limits) -> None:
        self._limited = bool(limits.messages_per_second)
        self._buckets: dict[str, Bucket] = {}

    def change(self, client: str, characters: int, now: float) -> float:
        """A client has a list of so many characters built, 0 for one that is at hand.

        Returns how long to wait. Raises WireError, and nothing was taken.
        """
        if not self._limited:
            return 0.0
        self._buckets = {c: b for c, b in self._buckets.items() if not b.full(now)}
        bucket = self._buckets.get(client) or Bucket(HOTWORDS_PER_SECOND, BURST_HOTWORDS, now)
        self._buckets[client] = bucket
        tokens = A_LIST + characters
        wait = bucket.take(tokens, now)
        if wait > MAX_WAIT:
            bucket.fill(tokens)
            raise WireError(
                "flooded",
                f"got new hotwords of {characters} characters, expected at most "
                f"{HOTWORDS_PER_SECOND:g} characters a second in all your sessions; change them "
                "less often",
                retry_after=math.ceil(wait - MAX_WAIT),
            )
        return wait


class Seats:
    """Counts who has how many sessions."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = Counter[str]()

    def free(self, owner: str) -> bool:
        """Whether the owner may have one more."""
        return not self._limit or self._taken[owner] < self._limit

    @contextlib.contextmanager
    def seat(self, owner: str) -> Iterator[None]:
        """Count one more for as long as the block runs."""
        self._taken[owner] += 1
        try:
            yield
        finally:
            self._taken[owner] -= 1
            if not self._taken[owner]:
                del self._taken[owner]
