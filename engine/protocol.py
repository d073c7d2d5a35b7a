"""The wire protocol, version 1, without a socket: messages in, messages out.

One session is one WebSocket at ``/v1/stream``. The client sends ``start`` (text, JSON), then audio
(binary), then ``end`` (text); the server answers ``ready``, any number of ``partial`` and
``final``, and ``ended``. In between, ``finalize`` (text) settles all audio sent so far: what was
not final yet comes as a ``final``, and then, always, ``finalized``; ``hotwords`` (text) replaces
the phrases that ``start`` named, from the next chunk on. Anything that goes wrong is one ``error``
message and then a close code.

With ``"resume": true`` in ``start`` the session outlives its connection for a while, unless the
client closes it itself, with 1000, 1001 or no code. ``ready`` then has a secret ``token``, every
event a number ``seq``, and messages say how many ``samples`` are safe. After ``resume`` (the token,
and the last ``seq`` seen) on a new connection, ``ready`` says which sample is expected next, and
the events that were missed follow. Of numbers that never come the events were partials that a newer
one has replaced. A connection whose address has ``?resume=1`` says beforehand that it comes for
that, and is not counted as one more session.

Here are the messages and their JSON; what may be said when is in `engine.wire.conversation`. This
module knows neither sockets nor clocks nor recognisers, so that every rule can be tested with plain
values.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar
from typing import Final as Const

import numpy as np
import numpy.typing as npt

from loquent.engine.endpoint import EndpointRules
from loquent.engine.errors import AudioError, ConfigError, ProtocolError
from loquent.engine.events import Ended, Event, Final, Finalized, Partial, Word
from loquent.engine.hotwords import Hotword
from loquent.engine.wire.strict_json import parse_object

VERSION: Const = 1
SUBPROTOCOL: Const = "loquent.v1"
PATH: Const = "/v1/stream"
# One second of 48 kHz float32 is 192 kB, so this holds more than five seconds of any input.
MAX_MESSAGE: Const = 1 << 20

Encoding = Literal["s16le", "f32le"]
Code = Literal[
    "bad_json",
    "bad_type",
    "bad_config",
    "bad_audio",
    "too_big",
    "flooded",
    "busy",
    "idle",
    "gone",
    "session_limit",
    "internal",
]
Pcm = npt.NDArray[np.int16] | npt.NDArray[np.float32]

# RFC 6455 section 7.4.1: 1002 protocol error, 1003 unsupported data, 1008 policy, 1009 too big,
# 1011 the server's own failure.
CLOSE_CODES: Const[Mapping[Code, int]] = {
    "bad_json": 1003,
    "bad_type": 1002,
    "bad_config": 1008,
    "bad_audio": 1003,
    "too_big": 1009,
    "flooded": 1008,
    "busy": 1013,
    "idle": 1008,
    "gone": 1008,
    "session_limit": 1008,
    "internal": 1011,
}
DTYPES: Const[Mapping[str, np.dtype[Any]]] = {
    "s16le": np.dtype("<i2"),
    "f32le": np.dtype("<f4"),
}


class WireError(ProtocolError):
    """A session that cannot go on: `code` is the wire's, `close_code` the WebSocket's.

    `retry_after` is in seconds, where it makes sense to try again.
    """

    def __init__(self, code: Code, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code: Code = code
        self.retry_after = retry_after

    @property
    def close_code(self) -> int:
        """The WebSocket close code that belongs to `code`."""
        return CLOSE_CODES[self.code]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The client's first message. What is left at None is the server's to choose.

    sample_rate is in Hz, chunk_ms and right_context_ms in milliseconds; blank_penalty, lm_weight
    and hotwords as `Recognizer.stream` takes them; on the wire a hotword is a phrase, or an object
    with ``phrase`` and ``boost``. endpoint_silence (0: no endpoints), max_utterance and
    leading_silence are in seconds, see `EndpointRules`. vad is "silero" or nothing; finish asks for
    casing, punctuation and digits in the finals' text; stability is in seconds, see
    `Recognizer.stream`.
    """

    sample_rate: int
    encoding: Encoding = "s16le"
    chunk_ms: float | None = None
    decoder: str | None = None
    language: str | None = None
    right_context_ms: float | None = None
    blank_penalty: float | None = None
    lm_weight: float | None = None
    hotwords: tuple[Hotword, ...] | None = None
    resume: bool | None = None  # keep the session for a while if the connection is lost
    endpoint_silence: float | None = None
    max_utterance: float | None = None
    leading_silence: float | None = None
    vad: str | None = None
    finish: bool | None = None
    stability: float | None = None

    def encode(self) -> str:
        """The message as the client sends it."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return json.dumps({"type": "start", **fields})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """The first message on a new connection: go on with the session that `token` stands for.

    seq is the number of the last event that the client has.
    """

    token: str
    seq: int = 0

    def encode(self) -> str:
        """The message as the client sends it."""
        return json.dumps({"type": "resume", **dataclasses.asdict(self)})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Audio:
    """Whole samples, mono, shape (N,); N is 0 when a packet held less than one sample."""

    pcm: Pcm


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finalize:
    """The client wants everything that it has sent so far settled, and goes on."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The client has sent all its audio."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SetHotwords:
    """The phrases to lean towards from now on."""

    hotwords: tuple[Hotword, ...]

    def encode(self) -> str:
        """The message as the client sends it."""
        return json.dumps({"type": "hotwords", **dataclasses.asdict(self)})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SetEndpoint:
    """The rules that end segments from now on; only other people's protocols can change them."""

    endpoint: EndpointRules | None


FINALIZE: Const = '{"type": "finalize"}'
END: Const = '{"type": "end"}'
Command = Start | Resume | Audio | Finalize | SetHotwords | End


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a session stands that can be resumed, and the token that stands for it.

    Attributes:
        samples: that the server has, counted from the start: the next one belongs behind them.
        finalizes: how many `finalize` it has.
        ended: it has `end`.
    """

    token: str
    samples: int = 0
    finalizes: int = 0
    ended: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The server's answer to `Start`: what it chose. latency_ms is chunk plus right context.

    language is the one that is heard (None from a server of before it was named). resume is there
    if the session can be resumed, and comes again with every connection.
    """

    session: str
    bundle: str
    decoder: str
    chunk_ms: float
    latency_ms: float
    sample_rate: int
    language: str | None = None
    resume: Standing | None = None
    protocol: int = VERSION


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Seconds of audio that the server has received and processed so far.

    Attributes:
        lag: seconds that wait, the chunk that is not whole yet among them.
        lagging: more waits than that chunk explains; partials may be left out until it is less.
        samples: that the recogniser has, at the client's rate: a client that may have to resume
            can forget the audio before.
    """

    received: float
    processed: float
    lag: float = 0.0
    lagging: bool = False
    samples: int = 0


def as_wire_error(error: Exception) -> WireError:
    """Any failure as the one that the client is told."""
    if isinstance(error, WireError):
        return error
    if isinstance(error, ConfigError):
        return WireError("bad_config", str(error))
    if isinstance(error, AudioError):
        return WireError("bad_audio", str(error))
    return WireError(
        "internal", "the server failed on this session; its log says why. Please connect again"
    )


def read_message(text: str) -> dict[str, Any]:
    """A message's fields. Raises WireError."""
    try:
        return parse_object(text)
    except ValueError as exc:
        raise WireError(
            "bad_json", f'got {text[:80]!r}, expected JSON such as {{"type": "start", ...}} ({exc})'
        ) from exc


def encode_event(event: Event, progress: Progress, seq: int | None = None) -> str:
    """An event as the server sends it; `seq` is its number if the session can be resumed."""
    fields = dataclasses.asdict(event)
    if not isinstance(event, Ended):
        fields |= dataclasses.asdict(progress)
        if seq is None:
            del fields["samples"]  # nobody is going to send them again
    if seq is not None:
        fields["seq"] = seq
    return json.dumps({"type": type(event).__name__.lower(), **fields})


def encode_progress(progress: Progress) -> str:
    """How far the server is, where no event says so."""
    return json.dumps({"type": "progress", **dataclasses.asdict(progress)})


def decode_message(text: str) -> tuple[Ready | Event, Progress | None]:
    """A server's message, for clients. Raises WireError for an `error` and for anything unknown."""
    message, progress, _ = decode_numbered(text)
    if message is None:
        raise WireError("bad_type", "got a progress message, which only resumable sessions have")
    return message, progress


def decode_numbered(text: str) -> tuple[Ready | Event | None, Progress | None, int | None]:
    """Likewise, in a session that can be resumed: message, progress and number; each may be None.

    Without a message it is only progress that is told.
    """
    fields = read_message(text)
    kind = fields.pop("type", None)
    if kind == "error":
        known = [code for code in CLOSE_CODES if code == fields.get("code")]
        raise WireError(known[0] if known else "internal", str(fields.get("message")))
    try:
        seq = fields.get("seq")
        if kind == "ready":
            if (standing := fields.get("resume")) is not None:
                fields["resume"] = _build(Standing, standing)
            return _build(Ready, fields), None, None
        if kind == "progress":
            return None, _build(Progress, fields), None
        if kind == "ended":
            return _build(Ended, fields), None, seq
        if kind == "finalized":
            return _build(Finalized, fields), _build(Progress, fields), seq
        if kind in ("partial", "final"):
            fields["words"] = tuple(_build(Word, word) for word in fields["words"])
            progress = _build(Progress, fields)
            if kind == "partial":
                return _build(Partial, fields), progress, seq
            return _build(Final, fields), progress, seq
    except (TypeError, KeyError) as exc:
        raise WireError("bad_type", f"got a {kind!r} message that does not fit: {exc}") from exc
    raise WireError("bad_type", f"got a message of unknown type {kind!r} from the server")


T = TypeVar("T")


def _build(kind: type[T], fields: Mapping[str, Any]) -> T:
    # A field that a later server adds is left out, so that this client goes on working with it.
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in fields.items() if name in names})
