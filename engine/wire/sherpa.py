"""sherpa-onnx's protocol (its Python and C++ online WebSocket servers): ``/sherpa``.

    client                       server
    float32 audio, 16 kHz        {"text", "segment", "is_final", ...} whenever the text changes
    Done                         one last message with is_eof, ``Done!``, then close 1000

`text` is all of a segment, and replaces what came before for it. ``Done!`` is for programs; to
the page that comes with sherpa-onnx, which would take it for JSON, only the close is sent. There is
no message for errors: a reason comes with the close code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from loquent.engine.events import Ended, Event, Final, Partial, Word
from loquent.engine.lane import Marked
from loquent.engine.protocol import (
    Audio,
    End,
    Progress,
    Start,
    WireError,
    as_wire_error,
)
from loquent.engine.wire.pcm import PcmReader
from loquent.engine.wire.session import (
    Actions,
    Close,
    Context,
    Handshake,
    Open,
    Send,
    WireSession,
)

SAMPLE_RATE = 16000


class SherpaSession(WireSession):
    """A session at ``/sherpa``."""

    def __init__(self, handshake: Handshake, context: Context) -> None:
        self._done = ["Done!"] if "origin" not in handshake.headers else []
        self._reader = PcmReader("f32le")
        self._ending = False
        self._reason: WireError | None = None
        self._last: Partial | Final | None = None

    @property
    def draining(self) -> bool:
        """After ``Done``."""
        return self._ending

    def connected(self) -> Actions:
        """There is nothing to agree on."""
        self.state = "streaming"
        return [Open(start=Start(sample_rate=SAMPLE_RATE, encoding="f32le"))]

    def receive(self, message: str | bytes) -> Actions:
        """Audio or ``Done``."""
        if self._ending:
            return ()  # the result of what came before is still to be sent
        if isinstance(message, bytes):
            return [Audio(pcm=self._reader.accept(message))]
        if message.strip() != "Done":
            raise WireError("bad_type", f"got {message[:80]!r}, expected Done, or audio in bytes")
        self._ending = True
        self.state = "draining"
        return [End()]

    def event(self, event: Event | Marked, progress: Progress) -> Actions:
        """The segment's text."""
        match event:
            case Partial() | Final():
                self._last = event
                if isinstance(event, Final) and event.reason == "end":
                    return ()  # comes with is_eof
                return [self._told(eof=False)]
            case Ended():
                # Where nothing new is left to say the last segment comes again: clients show
                # their last message as the result.
                last = self._told(eof=True)
                if self._reason is not None:
                    return [last, *self.error(self._reason)]
                self.state = "closed"
                return [last, *(Send(text=text) for text in self._done), Close()]
        return ()

    def end(self, reason: WireError | None) -> Actions:
        """As ``Done`` does."""
        self._ending = True
        self._reason = reason
        return [End()]

    def error(self, error: Exception) -> Actions:
        """Nothing but the close code and its reason."""
        self.state = "failed"
        known = as_wire_error(error)
        return [Close(code=known.close_code, reason=str(known))]

    def _told(self, *, eof: bool) -> Send:
        event = self._last
        words: Sequence[Word] = event.words if event else ()
        start = event.start if event else 0.0
        fields = {
            "text": event.text if event else "",
            # Our tokens are words; a space tells where one begins, as sherpa-onnx's do.
            "tokens": [f" {word.text}" for word in words],
            "timestamps": [round(word.start - start, 3) for word in words],
            "segment": event.segment if event else 0,
            "words": [word.text for word in words],
            "start_time": round(start, 3),
            "is_final": eof or isinstance(event, Final),
            "is_eof": eof,
        }
        return Send(text=json.dumps(fields, ensure_ascii=False))
