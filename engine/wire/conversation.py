"""Loquent's own protocol on the server's side, without a socket: what may be said when.

    NEW --start--> CONFIGURED --audio--> STREAMING --end--> DRAINING --ended--> CLOSED
         --finalize, hotwords-->   (both stay as they are)   (any live state) --error--> FAILED

The table below is the whole rule: a signal that it does not list for a state is an error. The
messages themselves are `loquent.engine.protocol`'s.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Collection, Mapping
from typing import Any, get_args
from typing import Final as Const

import numpy as np

from loquent.engine.errors import ConfigError
from loquent.engine.events import Ended, EndReason, Event
from loquent.engine.hotwords import DEFAULT_BOOST, MAX_PHRASES, Hotword, check_size
from loquent.engine.protocol import (
    DTYPES,
    MAX_MESSAGE,
    Audio,
    Command,
    End,
    Finalize,
    Pcm,
    Progress,
    Ready,
    Resume,
    SetHotwords,
    Start,
    WireError,
    as_wire_error,
    encode_event,
    read_message,
)


class State(enum.Enum):
    """Where a session stands."""

    NEW = "new"
    CONFIGURED = "configured"
    STREAMING = "streaming"
    DRAINING = "draining"
    CLOSED = "closed"
    FAILED = "failed"


class Signal(enum.Enum):
    """What can happen to a session. START to END come from the client, the rest from us."""

    START = "start"
    AUDIO = "audio"
    FINALIZE = "finalize"
    HOTWORDS = "hotwords"
    END = "end"
    ENDED = "ended"
    ERROR = "error"
    LOST = "lost"


_LIVE: Const = {Signal.ERROR: State.FAILED, Signal.LOST: State.CLOSED}
TRANSITIONS: Const[Mapping[State, Mapping[Signal, State]]] = {
    State.NEW: {Signal.START: State.CONFIGURED, **_LIVE},
    State.CONFIGURED: {
        Signal.AUDIO: State.STREAMING,
        Signal.FINALIZE: State.CONFIGURED,
        Signal.HOTWORDS: State.CONFIGURED,
        Signal.END: State.DRAINING,
        **_LIVE,
    },
    State.STREAMING: {
        Signal.AUDIO: State.STREAMING,
        Signal.FINALIZE: State.STREAMING,
        Signal.HOTWORDS: State.STREAMING,
        Signal.END: State.DRAINING,
        **_LIVE,
    },
    State.DRAINING: {Signal.ENDED: State.CLOSED, **_LIVE},
    State.CLOSED: {},
    State.FAILED: {},
}


_FROM_CLIENT: Const = (
    Signal.START,
    Signal.AUDIO,
    Signal.FINALIZE,
    Signal.HOTWORDS,
    Signal.END,
)


class ServerProtocol:
    """The server's side of one session.

    `receive` turns a message into a command, `ready`, `event` and `error` return the text to send.
    `languages` are those that a client may ask for (None allows any).
    """

    def __init__(
        self, *, languages: Collection[str] | None = None, max_message: int = MAX_MESSAGE
    ) -> None:
        self.state = State.NEW
        self._languages = languages
        self._max_message = max_message
        self._dtype = DTYPES["s16le"]
        self._carry = b""
        self._end_reason: EndReason = "end"

    def receive(self, message: str | bytes) -> Command:
        """The client's next message. Raises WireError; the caller then sends `error`."""
        size = len(message)
        if size > self._max_message:
            raise WireError(
                "too_big",
                f"got a message of {size} bytes, expected at most {self._max_message}: "
                "send the audio in smaller packets (20 to 200 ms each)",
            )
        if isinstance(message, bytes):
            self._signal(Signal.AUDIO)
            return Audio(pcm=self._samples(message))
        fields = read_message(message)
        match fields.pop("type", None):
            case "start":
                self._signal(Signal.START)
                start = _parse_start(fields, self._languages)
                self._dtype = DTYPES[start.encoding]
                return start
            case "resume":
                self._signal(Signal.START)
                return _parse_resume(fields)
            case "hotwords":
                self._signal(Signal.HOTWORDS)
                return SetHotwords(hotwords=_parse_hotwords(fields.get("hotwords")))
            case "finalize":
                self._signal(Signal.FINALIZE)
                return Finalize()
            case "end":
                self._signal(Signal.END)
                return End()
            case other:
                raise WireError(
                    "bad_type",
                    f'got a message of type {other!r}, expected "start", "finalize", '
                    '"hotwords" or "end" (audio goes in binary messages)',
                )

    def ready(self, ready: Ready) -> str:
        """The answer to a `Start`, or to a `Resume`: the next packet begins with a whole sample."""
        self._carry = b""
        fields = dataclasses.asdict(ready)
        if ready.resume is None:
            del fields["resume"]
        return json.dumps({"type": "ready", **fields})

    def event(self, event: Event, progress: Progress, seq: int | None = None) -> str:
        """One event of the recogniser as a message. `Ended` closes the session."""
        if isinstance(event, Ended):
            self._signal(Signal.ENDED)
            event = dataclasses.replace(event, reason=self._end_reason)
        return encode_event(event, progress, seq)

    def end(self, reason: EndReason) -> None:
        """The server ends the session itself, as though the client had; `ended` says why."""
        if self.state in (State.CONFIGURED, State.STREAMING):
            self._end_reason = reason
            self._signal(Signal.END)

    def error(self, error: Exception) -> tuple[str, int]:
        """The message and the WebSocket close code for a failure; the session is then FAILED.

        Mistakes of the client are told in full; anything else only as "internal", because a
        stranger's browser has no business with our tracebacks.
        """
        known = as_wire_error(error)
        if Signal.ERROR in TRANSITIONS[self.state]:
            self._signal(Signal.ERROR)
        fields: dict[str, Any] = {"type": "error", "code": known.code, "message": str(known)}
        if known.retry_after is not None:
            fields["retry_after"] = known.retry_after
        text = json.dumps(fields)
        return text, known.close_code

    def freeze(self, *, finished: bool) -> dict[str, str]:
        """Where the session stands, for another process; without `finished` before its ``end``."""
        state = self.state
        if state is State.DRAINING and not finished:
            state = State.STREAMING
        return {"state": state.value, "dtype": self._dtype.str, "end_reason": self._end_reason}

    def thaw(self, frozen: Mapping[str, str]) -> None:
        """Inverse of `freeze`."""
        self.state = State(frozen["state"])
        self._dtype = np.dtype(frozen["dtype"])
        reasons: Mapping[str, EndReason] = {name: name for name in get_args(EndReason)}
        self._end_reason = reasons[frozen["end_reason"]]

    def lost(self) -> None:
        """The client is gone."""
        if Signal.LOST in TRANSITIONS[self.state]:
            self._signal(Signal.LOST)

    def _signal(self, signal: Signal) -> None:
        allowed = TRANSITIONS[self.state]
        if signal not in allowed:
            from_client = [s.value for s in allowed if s in _FROM_CLIENT]
            raise WireError(
                "bad_type",
                f"got {signal.value} while the session is {self.state.value}, expected "
                + (" or ".join(from_client) or "nothing more from the client"),
            )
        self.state = allowed[signal]

    def _samples(self, message: bytes) -> Pcm:
        # A packet may end inside a sample: what is left over is the head of the next packet. The
        # one to three bytes that may remain at the end are no sample and are not heard.
        data = self._carry + message if self._carry else message
        whole = len(data) - len(data) % self._dtype.itemsize
        self._carry = data[whole:]
        pcm = np.frombuffer(data, self._dtype, whole // self._dtype.itemsize)
        return pcm.astype(self._dtype.newbyteorder("="), copy=False)


_KINDS: Const[Mapping[str, tuple[str, tuple[type, ...]]]] = {
    "sample_rate": ("a whole number (Hz)", (int,)),
    "encoding": ("a string", (str,)),
    "chunk_ms": ("a number (milliseconds)", (int, float)),
    "decoder": ("a string", (str,)),
    "language": ("a string", (str,)),
    "right_context_ms": ("a number (milliseconds)", (int, float)),
    "blank_penalty": ("a number", (int, float)),
    "lm_weight": ("a number", (int, float)),
    "hotwords": ("a list of phrases", (list,)),
    "resume": ("true or false", (bool,)),
    "endpoint_silence": ("a number (seconds)", (int, float)),
    "max_utterance": ("a number (seconds)", (int, float)),
    "leading_silence": ("a number (seconds)", (int, float)),
    "vad": ("a string", (str,)),
    "finish": ("true or false", (bool,)),
    "stability": ("a number (seconds)", (int, float)),
}


def _parse_start(fields: dict[str, Any], languages: Collection[str] | None) -> Start:
    if unknown := sorted(fields.keys() - _KINDS.keys()):
        raise WireError(
            "bad_config",
            f"got unknown field {unknown[0]!r} in start, expected among {', '.join(_KINDS)}",
        )
    if "sample_rate" not in fields:
        raise WireError(
            "bad_config", 'start needs "sample_rate": the rate of the audio in Hz, 8000 to 48000'
        )
    for name, value in fields.items():
        expected, kinds = _KINDS[name]
        # bool is an int in Python, but `true` is no number on the wire.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise WireError("bad_config", f"got {name} = {value!r}, expected {expected}")
    if "hotwords" in fields:
        fields["hotwords"] = _parse_hotwords(fields["hotwords"])
    start = Start(**fields)
    if start.encoding not in DTYPES:
        raise WireError(
            "bad_config",
            f"got encoding {start.encoding!r}, expected {' or '.join(DTYPES)} (mono)",
        )
    if languages is not None and start.language is not None and start.language not in languages:
        raise WireError(
            "bad_config",
            f"got language {start.language!r}, this server has {', '.join(sorted(languages))}",
        )
    return start


_HOTWORDS: Const = 'a list of phrases, or of {"phrase": "New York", "boost": 2.0}'


def _parse_hotwords(value: object) -> tuple[Hotword, ...]:
    if not isinstance(value, list):
        raise WireError("bad_config", f"got hotwords = {value!r:.80}, expected {_HOTWORDS}")
    if len(value) > MAX_PHRASES:
        raise WireError("bad_config", f"got {len(value)} hotwords, expected at most {MAX_PHRASES}")
    try:
        found = tuple(map(_parse_hotword, value))
        check_size(found)
    except ConfigError as exc:
        raise WireError("bad_config", str(exc)) from exc
    return found


def _parse_hotword(item: object) -> Hotword:
    fields = {"phrase": item} if isinstance(item, str) else item
    if (
        not isinstance(fields, dict)
        or not isinstance(fields.get("phrase"), str)
        or not isinstance(boost := fields.get("boost", DEFAULT_BOOST), int | float)
        or isinstance(boost, bool)
        or fields.keys() - {"phrase", "boost"}
    ):
        raise WireError("bad_config", f"got {item!r:.80} in hotwords, expected {_HOTWORDS}")
    return Hotword(phrase=fields["phrase"], boost=float(boost))


def _parse_resume(fields: dict[str, Any]) -> Resume:
    token, seq = fields.get("token"), fields.get("seq", 0)
    if not isinstance(token, str) or not isinstance(seq, int) or not 0 <= seq < 2**53:
        raise WireError(
            "bad_config", 'resume needs "token", as ready gave it, and "seq", a number of an event'
        )
    return Resume(token=token, seq=seq)
