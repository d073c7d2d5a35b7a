"""The connection of a session: messages go out in order, and nobody waits for ever for a client.

`Socket` is what a session needs of a WebSocket; `loquent.engine.server` and `loquent.engine.asgi`
make one out of their libraries' connections.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable
from typing import Protocol

# RFC 6455 section 7.4.1.
NORMAL_CLOSURE, GOING_AWAY, NO_STATUS = 1000, 1001, 1005
POLICY_VIOLATION, SERVICE_RESTART = 1008, 1012


class Gone(Exception):  # noqa: N818
    """The connection is closed or lost; says how.

    `code` is that of the client's close frame, None where it did not say good-bye.
    """

    def __init__(self, how: str, code: int | None = None) -> None:
        super().__init__(how)
        self.code = code

    @property
    def left(self) -> bool:
        """Whether the client left by its own will: what ends a session that could be resumed.

        Browsers send 1001 for a page that is closed, and no code for a plain ``close()``.
        """
        return self.code in (NORMAL_CLOSURE, GOING_AWAY, NO_STATUS)


class UnreadError(Exception):
    """The client has not read our messages for too long."""


class Socket(Protocol):
    """One open WebSocket."""

    async def receive(self) -> str | bytes:
        """The next message. Raises Gone."""

    async def send(self, text: str) -> None:
        """Send a text message; waits while the client does not read. Raises Gone."""

    async def close(self, code: int, reason: str) -> bool:
        """Close, once all is sent; whether the client has answered, and so has read it all.

        Does nothing if the connection is gone.
        """

    def abort(self) -> None:
        """Cut the connection. Does nothing if it is gone."""


class NoSocket:
    """Of a session that has no connection yet."""

    async def receive(self) -> str | bytes:
        raise Gone("no connection")

    async def send(self, text: str) -> None:
        raise Gone("no connection")

    async def close(self, code: int, reason: str) -> bool:
        return False

    def abort(self) -> None:
        pass


class Outlet:
    """The way out over one socket, for several tasks. `patience`: seconds to read a message in."""

    def __init__(self, socket: Socket, patience: float) -> None:
        self.socket = socket
        self._patience = patience
        # Messages in the order in which the protocol made them, whoever comes to send them.
        self._outgoing: deque[str] = deque()
        self._sending = asyncio.Lock()

    async def send(self, texts: Iterable[str]) -> None:
        """Send messages behind those that wait already. Raises Gone, UnreadError."""
        # All are in line before this waits for anything: the other task may go on then.
        self._outgoing.extend(texts)
        async with self._sending:
            while self._outgoing:
                try:
                    async with asyncio.timeout(self._patience):
                        await self.socket.send(self._outgoing.popleft())
                except TimeoutError:
                    raise UnreadError from None

    async def close(self, code: int, reason: str) -> bool:
        """Close, once all is sent; whether the client has read it all."""
        # A close frame holds 125 bytes, two of them the code.
        reason = reason.encode()[:123].decode(errors="ignore")
        # The client's answer comes behind all that it has sent, which nobody wants any more.
        discard = asyncio.create_task(self._discard())
        try:
            async with asyncio.timeout(self._patience):
                return await self.socket.close(code, reason)
        except TimeoutError:
            self.socket.abort()
            return False
        finally:
            discard.cancel()
            await asyncio.wait([discard])

    async def cut(self) -> None:
        """Say that messages were left unread, should the client read again soon, and cut."""
        reason = f"messages were left unread for {self._patience:g} s"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self.socket.close(POLICY_VIOLATION, reason)
        self.socket.abort()

    async def _discard(self) -> None:
        with contextlib.suppress(Gone):
            while True:
                await self.socket.receive()
