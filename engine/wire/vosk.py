"""Vosk's protocol (vosk-server/websocket/asr_server.py): ``/vosk``, and ``/`` by default.

    client                                   server
    {"config": {"sample_rate": 16000, ...}}  nothing
    s16le audio, any size                    {"partial"} or {"result", "text"}, one each
    {"reset": 1}                             {"result", "text"}, of all that was heard so far
    {"eof": 1}                               {"result", "text"}, then close 1000

Clients send and receive in lock step, so every binary message gets exactly one answer, in order.
It is made when all audio up to that message is recognised as far as chunks go: the same audio in
the same messages gives the same answers, however busy the server is. A segment that ends inside a
message is its answer; if several end there they come as one, as Vosk too looks for an end only
after a message. The protocol has no message for errors: a reason comes with the close code.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from loquent.engine.events import Ended, Event, Final, Finalized, Partial, Word
from loquent.engine.lane import Marked
from loquent.engine.protocol import (
    Audio,
    End,
    Finalize,
    Progress,
    Start,
    WireError,
    as_wire_error,
)
from loquent.engine.wire.pcm import PcmReader
from loquent.engine.wire.session import (
    Action,
    Actions,
    Close,
    Context,
    Handshake,
    Mark,
    Open,
    Send,
    WireSession,
    read_json,
)

logger = logging.getLogger(__name__)

DEFAULT_RATE = 8000
_KNOWN = {"sample_rate", "words", "max_alternatives"}


class VoskSession(WireSession):
    """A session at ``/vosk``."""

    def __init__(self, handshake: Handshake, context: Context) -> None:
        self._id = context.session
        self._rate = DEFAULT_RATE
        self._words = True
        self._alternatives = 0
        self._reader: PcmReader | None = None
        self._ending = False
        self._reason: WireError | None = None
        self._partial = ""
        self._heard: list[Word] = []  # of segments that ended and were not told yet
        self._ended = False  # whether one did

    @property
    def draining(self) -> bool:
        """After ``eof``."""
        return self._ending

    def receive(self, message: str | bytes) -> Actions:
        """Audio, ``config``, ``reset`` or ``eof``."""
        if self._ending:
            return ()  # the result of what came before is still to be sent
        if isinstance(message, bytes):
            opening = self._open()
            assert self._reader is not None, "made by _open"
            return [*opening, Audio(pcm=self._reader.accept(message)), Mark()]
        fields = read_json(message, '{"config": {"sample_rate": 16000}} or {"eof": 1}')
        if "config" in fields:
            self._configure(fields["config"])
            return ()
        if fields.get("eof"):
            self._ending = True
            self.state = "draining"
            return [End()] if self._reader else [self._result(), Close()]
        if fields.get("reset"):
            return [Finalize()] if self._reader else [self._result()]
        raise WireError(
            "bad_type", f'got {message[:80]!r}, expected "config", "eof" or "reset" in it'
        )

    def event(self, event: Event | Marked, progress: Progress) -> Actions:
        """What is said is kept until a message has its answer due."""
        match event:
            case Partial():
                self._partial = event.text
            case Final():
                self._heard += event.words
                self._ended = True
                self._partial = ""
            case Marked() if not self._ended:
                return [Send(text=_dump({"partial": self._partial}))]
            case Marked() | Finalized():
                return [self._result()]
            case Ended():
                if self._reason is not None:
                    return [self._result(), *self.error(self._reason)]
                self.state = "closed"
                return [self._result(), Close()]
        return ()

    def end(self, reason: WireError | None) -> Actions:
        """As ``eof`` does."""
        self._ending = True
        self._reason = reason
        if self._reader is not None:
            return [End()]
        return [Close()] if reason is None else self.error(reason)

    def error(self, error: Exception) -> Actions:
        """Nothing but the close code and its reason."""
        self.state = "failed"
        known = as_wire_error(error)
        return [Close(code=known.close_code, reason=str(known))]

    def _open(self) -> Sequence[Action]:
        if self._reader is not None:
            return ()
        self.state = "streaming"
        self._reader = PcmReader("s16le")
        return [Open(start=Start(sample_rate=self._rate))]

    def _configure(self, config: object) -> None:
        if not isinstance(config, dict):
            raise WireError("bad_config", f"got config = {config!r:.80}, expected an object")
        self._words = bool(config.get("words", self._words))
        self._alternatives = _whole(config, "max_alternatives", self._alternatives)
        rate = _whole(config, "sample_rate", self._rate)
        if self._reader is not None and rate != self._rate:
            raise WireError(
                "bad_config",
                f"got sample_rate {rate} after audio of {self._rate} Hz, expected it before",
            )
        self._rate = rate
        if unknown := sorted(config.keys() - _KNOWN):
            logger.info("session %s: not supported here: %s", self._id, ", ".join(unknown)[:200])

    def _result(self) -> Send:
        words, self._heard, self._ended, self._partial = self._heard, [], False, ""
        text = " ".join(word.text for word in words)
        told = [
            {
                "conf": round(word.confidence, 6),
                "end": round(word.end, 6),
                "start": round(word.start, 6),
                "word": word.text,
            }
            for word in words
        ]
        if not self._alternatives:
            with_words = {"result": told} if told and self._words else {}
            return Send(text=_dump({**with_words, "text": text}))
        # One alternative, as our decoders give one; its confidence is a log-likelihood.
        score = sum(math.log(max(word.confidence, 1e-6)) for word in words)
        without = [{k: v for k, v in word.items() if k != "conf"} for word in told]
        with_words = {"result": without} if told and self._words else {}
        best = {"confidence": round(score, 6), **with_words, "text": text}
        return Send(text=_dump({"alternatives": [best]}))


def _whole(config: Mapping[str, Any], name: str, default: int) -> int:
    # Vosk's server takes whatever Python's float() takes.
    value = config.get(name, default)
    try:
        number = float(value)
        if isinstance(value, bool) or number != int(number) or not 0 <= number < 1e6:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise WireError(
            "bad_config", f"got {name} = {value!r:.80}, expected a whole number"
        ) from None
    return int(number)


def _dump(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False)
