"""What a server is apart from its sockets: recogniser, batcher, sessions and who gets one."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections.abc import Collection, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loquent.engine import web
from loquent.engine.auth import Keys
from loquent.engine.batcher import Batcher
from loquent.engine.gate import Gate, Visitor
from loquent.engine.limits import Limits
from loquent.engine.protocol import WireError
from loquent.engine.recognizer import Recognizer
from loquent.engine.wire.dispatch import Bare, open_session
from loquent.engine.wire.session import Context, Handshake, WireSession

if TYPE_CHECKING:
    from loquent.engine.driver import Session

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How to serve. Times in seconds; port 0 takes any free one.

    page: the folder of the web page, None for no page. bare: the protocol of a WebSocket at ``/``.
    record: a folder in which the audio of every session is kept as a wav file, for debugging.
    allow_origins: web origins other than the server's own and this machine's whose pages may
    connect. keys: who may connect, everybody if there are none. limits: see `Limits`.
    trusted_proxies: addresses whose ``X-Forwarded-For`` is believed. idle_timeout: how long a
    client may say nothing. send_timeout: how long it may leave a message unread. drain_timeout: how
    long sessions may take to finish when the server is stopped.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    chunk_ms: int = 320
    max_sessions: int = 64
    page: Traversable | None = None
    bare: Bare = "vosk"
    record: Path | None = None
    allow_origins: Collection[str] = ()
    keys: Keys = dataclasses.field(default_factory=Keys)
    limits: Limits = dataclasses.field(default_factory=Limits)
    trusted_proxies: Collection[str] = ()
    idle_timeout: float = 60.0
    send_timeout: float = 30.0
    drain_timeout: float = 10.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A session that a request was granted: its id, its protocol and whose it is."""

    session: str
    wire: WireSession
    visitor: Visitor


class Host:
    """Serves one recogniser, over whatever sockets. Use as ``async with Host(...) as host``."""

    def __init__(self, recognizer: Recognizer, config: ServerConfig | None = None) -> None:
        self.recognizer = recognizer
        self.config = config or ServerConfig()
        self.batcher = Batcher(recognizer)
        self._gate = Gate(
            keys=self.config.keys,
            limits=self.config.limits,
            allow_origins=self.config.allow_origins,
            trusted_proxies=self.config.trusted_proxies,
            local=web.is_loopback(self.config.host),
        )
        self.sessions: set[Session] = set()
        self.draining = False

    async def __aenter__(self) -> Host:
        await self.batcher.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.batcher.__aexit__()

    def open(self, peer: str, target: str, headers: Mapping[str, str]) -> Opened:
        """The session that a WebSocket request asks for.

        Args:
            peer: the address at the other end of the socket.
            target: path and query.
            headers: names in lower case.

        Raises:
            Refused: it gets none; says the HTTP status and why.
        """
        handshake = Handshake.parse(target, headers)
        visitor = self._gate.admit(peer, handshake)
        bundle = self.recognizer.bundle
        context = Context(
            session=secrets.token_hex(8),
            bundle=bundle.name,
            languages=bundle.languages,
            chunks_ms=bundle.chunks_ms,
            now=time.time(),
        )
        wire = open_session(handshake, context, bare=self.config.bare)
        return Opened(session=context.session, wire=wire, visitor=visitor)

    async def run(self, session: Session) -> None:
        """Serve a client until either side is done."""
        if len(self.sessions) >= self.config.max_sessions:
            limit = self.config.max_sessions
            busy = WireError("busy", f"all {limit} sessions of this server are taken; try later")
            await session.fail(busy)
            return
        self.sessions.add(session)
        try:
            with self._gate.seat(session.visitor):
                if self.draining:
                    session.stop()
                await session.run()
        except WireError as busy:
            await session.fail(busy)
        finally:
            self.sessions.discard(session)

    def stop(self) -> None:
        """Take no more sessions, let those there are finish."""
        self.draining = True
        for session in list(self.sessions):
            session.stop()

    def abort(self) -> None:
        """Cut the sessions that have not finished."""
        logger.warning("%d sessions did not finish in time", len(self.sessions))
        for session in list(self.sessions):
            session.abort()

    def health(self) -> dict[str, Any]:
        """For ``/healthz``."""
        return {
            "status": "draining" if self.draining else "ok",
            "bundle": self.recognizer.bundle.name,
            "sessions": len(self.sessions),
            "max_sessions": self.config.max_sessions,
        }
