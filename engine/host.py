"""What a server is apart from its sockets: recogniser, batcher, sessions and who gets one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping
from http import HTTPStatus
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loquent.engine import memory, web
from loquent.engine.admission import Line
from loquent.engine.auth import Keys, same_key
from loquent.engine.batcher import MAX_BATCH, Batcher
from loquent.engine.builder import HotwordBuilder
from loquent.engine.errors import SnapshotError
from loquent.engine.finish import has_finisher
from loquent.engine.gate import Gate, Visitor
from loquent.engine.handover import Folder
from loquent.engine.limits import Limits
from loquent.engine.metrics import Metrics
from loquent.engine.protocol import WireError
from loquent.engine.recognizer import Recognizer
from loquent.engine.wire.dispatch import Bare, open_session
from loquent.engine.wire.session import Context, Handshake, Refused, WireSession, returns

if TYPE_CHECKING:
    from loquent.engine.driver import Session

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds after which a client that got no place may ask again.
RETRY_AFTER = 5
# So many seconds, and times, a session that another server has is looked for.
_LOOK, _LOOKS = 0.1, 30
# Seconds between two looks whether another server wants one of ours.
_LISTEN = 0.5
# No more sessions while chunks wait longer than this for their results, in seconds.
MAX_DELAY = 0.3
# Seconds after which memory that sessions have left is given back to the system.
TRIM_EVERY = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How to serve. Times in seconds; port 0 takes any free one.

    page: the folder of the web page, None for no page. bare: the protocol of a WebSocket at ``/``.
    record: a folder in which the audio of every session is kept as a wav file, for debugging.
    allow_origins: web origins other than the server's own and this machine's whose pages may
    connect. keys: who may connect, everybody if there are none. limits: see `Limits`.
    trusted_proxies: addresses whose ``X-Forwarded-For`` is believed. tls: serve https and wss with
    it. metrics_token: who presents it as a bearer may read ``/metrics``, without one only this
    machine may. reuse_port: share the port with other processes (``SO_REUSEPORT``). idle_timeout:
    how long a client may say nothing. send_timeout: how long it may leave a message unread.
    drain_timeout: how long sessions may take to finish when the server is stopped. resume_timeout:
    how long a session that asked for it waits for its client after the connection was lost;
    max_parked: how many wait at a time, beside max_sessions that are connected; snapshots: a
    folder in which they and the connected ones are kept when the server is stopped, for the one
    that follows; without it they end; share_parked: other servers take sessions from there,
    too, so whoever loses its connection is kept there at once. max_load: no more sessions from
    the share of the recogniser's time on that those there need, as measured; 0 for no such limit.
    max_waiting, wait_timeout: how many requests wait for a place, and for how long. max_batch:
    streams in one step. right_context_ms: of sessions that do not say; the bundle's by default.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    chunk_ms: int = 320
    right_context_ms: int | None = None
    max_sessions: int = 64
    page: Traversable | None = None
    bare: Bare = "vosk"
    record: Path | None = None
    allow_origins: Collection[str] = ()
    keys: Keys = dataclasses.field(default_factory=Keys)
    limits: Limits = dataclasses.field(default_factory=Limits)
    trusted_proxies: Collection[str] = ()
    tls: ssl.SSLContext | None = None
    metrics_token: str | None = dataclasses.field(default=None, repr=False)
    reuse_port: bool = False
    idle_timeout: float = 60.0
    send_timeout: float = 30.0
    drain_timeout: float = 10.0
    resume_timeout: float = 60.0
    max_parked: int = 64
    snapshots: Path | None = None
    share_parked: bool = False
    max_load: float = 0.85
    max_waiting: int = 16
    wait_timeout: float = 5.0
    max_batch: int = MAX_BATCH


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A session that a request was granted: its id, its protocol, whose it is, and whether a web
    page asked for it."""

    session: str
    wire: WireSession
    visitor: Visitor
    page: bool = False


class Host:
    """Serves one recogniser, over whatever sockets. Use as ``async with Host(...) as host``."""

    def __init__(self, recognizer: Recognizer, config: ServerConfig | None = None) -> None:
        self.recognizer = recognizer
        self.config = config or ServerConfig()
        self.metrics = Metrics(recognizer.bundle.name)
        self.batcher = Batcher(
            recognizer,
            max_batch=self.config.max_batch,
            chunk_ms=self.config.chunk_ms if self.config.max_load else None,
            observer=self.metrics,
        )
        self.hotwords = HotwordBuilder(recognizer, self.config.limits)
        self._line = Line(
            self._full, length=self.config.max_waiting, patience=self.config.wait_timeout
        )
        self._gate = Gate(
            keys=self.config.keys,
            limits=self.config.limits,
            allow_origins=self.config.allow_origins,
            trusted_proxies=self.config.trusted_proxies,
            local=web.is_loopback(self.config.host),
        )
        # There is a finisher for the language.
        self.finishes = any(has_finisher(code) for code in list(recognizer.bundle.languages)[:1])
        self.sessions: set[Session] = set()
        self._by_token: dict[str, Session] = {}
        # Connections that come to resume and have no place of their own, by the names of their
        # sessions; None before these run.
        self._arriving: dict[str, Session | None] = {}
        self._restored: set[asyncio.Task[Any]] = set()
        self.folder = Folder(self.config.snapshots) if self.config.snapshots else None
        self.files = 0  # that are being transcribed
        self.draining = False

    async def __aenter__(self) -> Host:
        await self.batcher.__aenter__()
        self._watching = [asyncio.create_task(self._watch(), name="loquent-lag")]
        if self.folder is not None and self.config.share_parked:
            listening = self._listen(self.folder)
            self._watching.append(asyncio.create_task(listening, name="loquent-handover"))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        while self._restored:
            await asyncio.wait(self._restored)
        for task in self._watching:
            task.cancel()
        await asyncio.wait(self._watching)
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
        try:
            return self._open(peer, Handshake.parse(target, headers))
        except Refused as refused:
            self.metrics.refuse(refused.status)
            logger.info("a request from %s was refused: %s", peer, refused)
            raise

    def _open(self, peer: str, handshake: Handshake) -> Opened:
        page = "origin" in handshake.headers
        visitor = self._gate.admit(peer, handshake, seated=page or returns(handshake))
        bundle = self.recognizer.bundle
        context = Context(
            session=secrets.token_hex(8),
            bundle=bundle.name,
            languages=bundle.languages,
            chunks_ms=bundle.chunks_ms,
            now=time.time(),
            finishes=self.finishes,
            spells=self.recognizer.can_spell,
        )
        wire = open_session(handshake, context, bare=self.config.bare)
        return Opened(
            session=context.session,
            wire=wire,
            visitor=visitor,
            page=page,
        )

    async def find(self, token: str, arrival: Session) -> Session:
        """The session that the token stands for, here or in the folder.

        Raises WireError: there is none, or its place was taken while its client was away.
        """
        session = self._by_token.get(token)
        if session is None and self.folder is not None:
            # Not to be cut short by a stop: what is out of the folder is nowhere else.
            session = await asyncio.shield(self._keep(self._restore(token, self.folder)))
        # Whoever came with a key has to come back with it.
        if session is None or session.visitor.key != arrival.visitor.key:
            raise WireError("gone", "this session is over or was not kept; start a new one")
        # Its load was there a moment ago, so only places count. One whose old connection seems
        # alive has a place, and an arrival with a place of its own leaves it to the session.
        most = self.config.max_sessions
        if session.parked and arrival.id in self._arriving and self.connected >= most:
            raise WireError(
                "busy",
                f"all {most} sessions of this server are taken meanwhile; try again",
                retry_after=1,
            )
        return session

    async def _restore(self, token: str, folder: Folder) -> Session | None:
        from loquent.engine.driver import Session

        try:
            # The other server may not have noticed yet that the client is gone.
            for look in range(_LOOKS if self.config.share_parked else 1):
                if (handed := await asyncio.to_thread(folder.take, token)) is not None:
                    break
                if look == 1:
                    await asyncio.to_thread(folder.want, token)
                await asyncio.sleep(_LOOK)
            await asyncio.to_thread(folder.unwant, token)
            if handed is None:
                return None
            stream = await self.batcher.restore(handed.stream)
            session = Session.restored(self, token, handed, stream)
        except (SnapshotError, OSError) as exc:
            logger.error("a session could not be taken over: %s", exc)
            return None
        self._by_token[token] = session
        self.sessions.add(session)
        self._keep(self._run_restored(session))
        return session

    def _keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """As a task that a stop waits for."""
        task = asyncio.create_task(work, name="loquent-restored")
        self._restored.add(task)
        task.add_done_callback(self._restored.discard)
        return task

    async def _run_restored(self, session: Session) -> None:
        try:
            with self._gate.seat(session.visitor):
                if self.draining:
                    session.stop()
                await session.run()
        finally:
            self.sessions.discard(session)

    async def admit(self, opened: Opened) -> None:
        """Wait for a place. Raises Refused with 503.

        A page cannot see why a WebSocket was refused, so it is let in to be told, by `run`, also
        where its key or its address has no seat. Who comes to resume is let in without a place: the
        session has its own.
        """
        if (
            opened.wire.returning
            and not self.draining
            and len(self._arriving) < self.config.max_parked
        ):
            self._arriving[opened.session] = None
            return
        if opened.page and self._gate.full(opened.visitor):
            return
        why = await self._line.enter(opened.session)
        if why is not None and not opened.page:
            self.metrics.refuse(HTTPStatus.SERVICE_UNAVAILABLE)
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, why, {"Retry-After": str(RETRY_AFTER)})

    def release(self, opened: Opened) -> None:
        """The client is gone before its session began. Idempotent."""
        self._line.release(opened.session)
        self._arriving.pop(opened.session, None)

    def _full(self, granted: int) -> str | None:
        if self.draining:
            return "this server is stopping; try another"
        config = self.config
        if self.connected + granted >= config.max_sessions:
            return f"all {config.max_sessions} sessions of this server are taken; try later"
        if config.max_load and self.connected:
            load = self.batcher.load(extra=config.chunk_ms / 1000, count=granted + 1)
            if load > config.max_load or self.batcher.meter.delay > MAX_DELAY:
                return (
                    f"this server has as much to do as it can ({self.connected} sessions, load "
                    f"{load:.2f} with one more); try later"
                )
        return None

    async def run(self, session: Session) -> None:
        """Serve a client until either side is done."""
        if session.id in self._arriving:
            self._arriving[session.id] = session
            try:
                if self.draining:
                    session.stop()
                await session.run()
            finally:
                self._arriving.pop(session.id, None)
        else:
            await self._run_placed(session)
        # From here on it is the other one that counts.
        await session.bequeath()

    async def _run_placed(self, session: Session) -> None:
        why = self._line.take(session.id)
        # The seat that was free at the request may have been taken since.
        if why := self._gate.full(session.visitor) or why:
            await session.fail(WireError("busy", why, retry_after=RETRY_AFTER))
            return
        self.sessions.add(session)
        try:
            with self._gate.seat(session.visitor):
                if self.draining:
                    session.stop()
                await session.run()
        finally:
            self.sessions.discard(session)

    @contextlib.asynccontextmanager
    async def place(
        self, peer: str, target: str, headers: Mapping[str, str]
    ) -> AsyncIterator[None]:
        """Count a request without a WebSocket as a session while the block runs. Raises Refused."""
        name = secrets.token_hex(8)
        try:
            visitor = self._gate.admit(peer, Handshake.parse(target, headers))
            why = await self._line.enter(name) or self._line.take(name)
            if why is not None:
                retry = {"Retry-After": str(RETRY_AFTER)}
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, why, retry)
            self._gate.check(visitor)  # the seat may have been taken since
        except Refused as refused:
            self.metrics.refuse(refused.status)
            raise
        with self._gate.seat(visitor):
            self.files += 1
            try:
                yield
            finally:
                self.files -= 1

    def page_of(self, peer: str, headers: Mapping[str, str]) -> str | None:
        """The origin of the page that sends a request, if it is one that may read the answer."""
        allowed = self._gate.origin_allowed(peer, Handshake(path="/", headers=headers))
        return headers.get("origin") if allowed else None

    @property
    def connected(self) -> int:
        """How many sessions have a client just now."""
        return self.files + sum(not session.parked for session in self.sessions)

    def keep(self, session: Session) -> str:
        """A new token that stands for the session, until `forget`."""
        token = secrets.token_urlsafe(24)
        self._by_token[token] = session
        return token

    def forget(self, session: Session) -> None:
        """The session is over. Idempotent."""
        if session.token is not None:
            self._by_token.pop(session.token, None)
            session.token = None

    @property
    def may_park(self) -> bool:
        """Whether one more session may wait for its client."""
        return len(self.sessions) - self.connected < self.config.max_parked

    def stop(self) -> None:
        """Take no more sessions, let those there are finish."""
        self.draining = True
        for session in self._all():
            session.stop()

    def move_out(self) -> None:
        """Hand the sessions that can be resumed to the other servers that share the folder.

        Their clients are told to come back; the rest goes on here.
        """
        if self.folder is not None and self.config.share_parked:
            for session in list(self._by_token.values()):
                session.let_go()

    @property
    def lag(self) -> float:
        """Seconds of audio that wait in the session that is furthest behind."""
        lags = (lane.received - lane.processed for lane in self.batcher.lanes)
        return max(lags, default=0.0)

    def abort(self) -> None:
        """Cut the sessions that have not finished."""
        logger.warning("%d sessions did not finish in time", len(self.sessions))
        for session in self._all():
            session.abort()

    def _all(self) -> list[Session]:
        return [*self.sessions, *filter(None, self._arriving.values())]

    def replace_keys(self, keys: Keys) -> None:
        """Other keys from now on; sessions that are open stay."""
        self._gate.keys = keys
        self.config = dataclasses.replace(self.config, keys=keys)

    def may_read_metrics(self, peer: str, headers: Mapping[str, str]) -> bool:
        """Whether a request for ``/metrics`` is answered: see ``ServerConfig.metrics_token``."""
        handshake = Handshake(path="/metrics", headers=headers)
        if (token := self.config.metrics_token) is None:
            return web.is_loopback(self._gate.address_of(peer, handshake))
        return any(same_key(given, token) for given in handshake.credentials)

    async def _listen(self, folder: Folder) -> None:
        """Let go of the sessions whose clients have come to another server."""
        while True:
            await asyncio.sleep(_LISTEN)
            try:
                wanted = await asyncio.to_thread(folder.wanted, list(self._by_token))
            except OSError as exc:
                logger.error("nobody can be handed over: %s", exc)
                continue
            for token in wanted:
                if (session := self._by_token.get(token)) is not None:
                    session.let_go(deserted=True)

    async def _watch(self) -> None:
        for second in itertools.count(1):
            self.metrics.lag.set(self.lag)
            await asyncio.sleep(1.0)
            if second % TRIM_EVERY == 0:
                await asyncio.to_thread(memory.trim)

    @property
    def status(self) -> str:
        """``ok``, ``full`` (of sessions or of work) or ``draining`` (it is being stopped)."""
        if self.draining:
            return "draining"
        return "ok" if self._full(0) is None else "full"

    def health(self) -> dict[str, Any]:
        """For ``/healthz`` and ``/readyz``."""
        return {
            "status": self.status,
            "bundle": self.recognizer.bundle.name,
            "keys": bool(self.config.keys),
            "sessions": len(self.sessions),
            "max_sessions": self.config.max_sessions,
            "load": round(self.batcher.load(), 3),
        }
