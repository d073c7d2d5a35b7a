"""The seam between wire protocols and the server: messages and events in, actions out.

    request -> Handshake -> Factory -> WireSession
    socket -> receive(message) ─┐                     ┌─> Send, Close          -> socket
    lane   -> event(event)     ─┴─> list of actions ──┴─> Start, Audio, ...    -> lane

A session knows neither sockets nor clocks nor recognisers. Every method returns what is to be done
now, in order; the server does it. What a client did wrong is a WireError that `receive` raises, and
the server then carries out `error` of it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from loquent.engine.endpoint import EndpointRules
from loquent.engine.events import Event
from loquent.engine.lane import Marked
from loquent.engine.protocol import (
    Audio,
    End,
    Finalize,
    Progress,
    Ready,
    Resume,
    SetEndpoint,
    SetHotwords,
    Standing,
    Start,
    WireError,
)
from loquent.engine.recognizer import DEFAULT_ENDPOINT
from loquent.engine.wire.strict_json import parse_object

MAX_FIELDS = 100  # of a query


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """A text message for the client."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """The session is over: close the WebSocket once everything before is sent."""

    code: int = 1000
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """Comes back as `Marked` once all audio before it is recognised as far as chunks go."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Make the stream; `endpoint` says when its segments end."""

    start: Start
    endpoint: EndpointRules | None = DEFAULT_ENDPOINT


Action = Send | Close | Open | Resume | Audio | Mark | Finalize | SetHotwords | SetEndpoint | End
Actions = Sequence[Action]


class Refused(Exception):  # noqa: N818
    """A handshake that cannot become a session; answered with HTTP `status`."""

    def __init__(
        self, status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Handshake:
    """What a WebSocket request says.

    Attributes:
        path: without the query.
        query: every field with its values in order.
        headers: names in lower case.
        subprotocols: as offered, in order.
    """

    path: str
    query: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    subprotocols: tuple[str, ...] = ()

    @classmethod
    def parse(cls, target: str, headers: Mapping[str, str]) -> Handshake:
        """From a request's target and its headers, names in lower case. Raises Refused."""
        if not target.isascii():  # raw bytes, which could not be sent back as text
            raise Refused(HTTPStatus.BAD_REQUEST, "An address is ASCII; quote the rest with %.")
        try:
            url = urlsplit(target)
            query = parse_qs(url.query, keep_blank_values=True, max_num_fields=MAX_FIELDS)
        except ValueError as exc:
            raise Refused(HTTPStatus.BAD_REQUEST, f"This address is not understood: {exc}") from exc
        offered = headers.get("sec-websocket-protocol", "").split(",")
        return cls(
            path=url.path,
            query={name: tuple(values) for name, values in query.items()},
            headers=headers,
            subprotocols=tuple(name for part in offered if (name := part.strip())),
        )

    @property
    def credentials(self) -> tuple[str, ...]:
        """Every key or token that the request carries, wherever its protocol puts them.

        ``Authorization: Bearer KEY`` or ``Token KEY``, ``Api-Key: KEY``; ``?api_key=``,
        ``?access_token=`` or ``?token=``; the subprotocols ``token, KEY`` and ``bearer, KEY``
        (Deepgram's, for browsers) and ``openai-insecure-api-key.KEY`` (OpenAI's).
        """
        found = []
        scheme, _, key = self.headers.get("authorization", "").partition(" ")
        if scheme.lower() in ("bearer", "token"):
            found.append(key.strip())
        found += [self.headers.get(name, "").strip() for name in ("api-key", "x-api-key")]
        for name in ("api_key", "access_token", "token"):
            found += self.query.get(name, ())
        for scheme, key in zip(self.subprotocols, self.subprotocols[1:], strict=False):
            if scheme.lower() in ("token", "bearer"):
                found.append(key)
        prefix = "openai-insecure-api-key."
        found += [n.removeprefix(prefix) for n in self.subprotocols if n.startswith(prefix)]
        return tuple(key for key in found if key)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a session may say about the server.

    Attributes:
        session: the session's id, a random hex string.
        bundle: the bundle's name.
        languages, chunks_ms: those of the bundle.
        now: seconds since 1970 at the handshake.
        finishes: there is a finisher for the language.
        spells: whether the model can spell a phrase, so that it may be a hotword.
    """

    session: str
    bundle: str
    languages: Collection[str] = ()
    chunks_ms: Collection[float] = ()
    now: float = 0.0
    finishes: bool = False
    spells: Callable[[str], bool] = bool


class WireSession(ABC):
    """One client's session in one protocol.

    Attributes:
        state: a word for the log.
        subprotocol: the one to accept, if any.
        headers: to be added to the answer to the handshake.
        patience: seconds that a client may say nothing, None for the server's own limit.
        returning: the client comes to resume, and says so in its request: see `returns`.
        resumable: the session waits for its client if the connection is lost; the driver then
            calls `resumed` in place of `lost`.
    """

    state: str = "new"
    returning: bool = False
    resumable: bool = False
    subprotocol: str | None = None
    headers: Mapping[str, str] = {}
    patience: ClassVar[float | None] = None

    @property
    def draining(self) -> bool:
        """The client has said that it is done, and may now be silent for as long as we need."""
        return False

    def connected(self) -> Actions:
        """The WebSocket is open."""
        return ()

    @abstractmethod
    def receive(self, message: str | bytes) -> Actions:
        """The client's next message. Raises WireError."""

    def ready(self, ready: Ready) -> Actions:
        """`Open` was carried out: what the server chose."""
        return ()

    def resumed(self, standing: Standing, seq: int) -> Actions:
        """The client is back, on another connection, and has events up to number `seq`.

        Raises WireError if that is too long ago.
        """
        raise NotImplementedError

    @abstractmethod
    def event(self, event: Event | Marked, progress: Progress) -> Actions:
        """What the recogniser says next."""

    @abstractmethod
    def end(self, reason: WireError | None) -> Actions:
        """The server ends the session: it stops (None), or the client was silent for too long.

        What was heard is finished as though the client had ended it.
        """

    @abstractmethod
    def error(self, error: Exception) -> Actions:
        """The session failed. The last action is a `Close`."""

    def lost(self) -> None:
        """The client is gone."""
        self.state = "lost"


def returns(handshake: Handshake) -> bool:
    """Whether a request says that its first message will be ``resume``: with ``?resume=1``.

    It then needs no place, as the session that it comes for has one, and cannot start another.
    """
    return handshake.query.get("resume") == ("1",)


Factory = Callable[[Handshake, Context], WireSession]


def read_json(text: str, example: str) -> dict[str, Any]:
    """A client's JSON object. Raises WireError, which names an `example` of what is expected."""
    try:
        return parse_object(text)
    except ValueError as exc:
        raise WireError(
            "bad_json", f"got {text[:80]!r}, expected JSON such as {example} ({exc})"
        ) from exc
