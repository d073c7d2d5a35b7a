"""Every error that a user of the engine may meet.

    LoquentError
    ├── AudioError        the audio itself: unreadable file, not finite, wrong shape or type
    ├── BundleError       a model bundle that is missing, damaged or not made for this engine
    ├── ConfigError       an option outside what the bundle or the engine allows (a ValueError too)
    ├── MissingExtra      an optional dependency is not installed (an ImportError too)
    ├── ProtocolError     a peer broke the wire protocol
    └── StreamError
        ├── BufferFull    more audio than the stream's buffer can take; nothing was consumed
        └── StreamClosed  audio after ``finish()``

Messages say what came, what was expected and what to do. Our own mistakes are assertions. Names
without "Error" say what happened.
"""

from __future__ import annotations


class LoquentError(Exception):
    """Base of all errors raised on purpose."""


class AudioError(LoquentError):
    """Audio that cannot be used."""


class BundleError(LoquentError):
    """A model bundle that cannot be used."""


class ConfigError(LoquentError, ValueError):
    """An option with a value that is not allowed."""


class MissingExtra(LoquentError, ImportError):  # noqa: N818
    """A dependency of an extra of this distribution is not installed."""


class ProtocolError(LoquentError):
    """A message that the wire protocol does not allow."""


class StreamError(LoquentError):
    """A stream that cannot take the call."""


class BufferFull(StreamError):  # noqa: N818
    """The stream's buffer cannot hold the audio; none of it was consumed."""


class StreamClosed(StreamError):  # noqa: N818
    """Audio came after ``finish()``."""


class SnapshotError(LoquentError):
    """A stream that cannot be written down, or a snapshot that cannot be read."""
