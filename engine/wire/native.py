"""Loquent's own protocol (`loquent.engine.protocol`) behind the seam that all protocols share."""

from __future__ import annotations

from collections.abc import Mapping

from loquent.engine.batcher import Marked
from loquent.engine.events import Ended, EndReason, Event
from loquent.engine.protocol import (
    SUBPROTOCOL,
    Code,
    End,
    Progress,
    Ready,
    ServerProtocol,
    Start,
    State,
    WireError,
    as_wire_error,
)
from loquent.engine.wire.session import (
    Actions,
    Close,
    Context,
    Handshake,
    Open,
    Send,
    WireSession,
)

_REASONS: Mapping[Code, EndReason] = {"idle": "idle", "session_limit": "session_limit"}


class NativeSession(WireSession):
    """A session at ``/v1/stream``."""

    def __init__(self, handshake: Handshake, context: Context) -> None:
        self._protocol = ServerProtocol(languages=context.languages)
        # Naming the subprotocol is optional, and one that we do not know is no reason to refuse.
        self.subprotocol = SUBPROTOCOL if SUBPROTOCOL in handshake.subprotocols else None

    @property
    def state(self) -> str:  # type: ignore[override]
        """The protocol's."""
        return self._protocol.state.value

    @property
    def draining(self) -> bool:
        """After ``end``."""
        return self._protocol.state is State.DRAINING

    def receive(self, message: str | bytes) -> Actions:
        """One message is one command."""
        command = self._protocol.receive(message)
        return [Open(start=command) if isinstance(command, Start) else command]

    def ready(self, ready: Ready) -> Actions:
        """``ready``."""
        return [Send(text=self._protocol.ready(ready))]

    def event(self, event: Event | Marked, progress: Progress) -> Actions:
        """One event is one message; `Ended` closes."""
        assert not isinstance(event, Marked), "nothing here asks for marks"
        said = Send(text=self._protocol.event(event, progress))
        return [said, Close()] if isinstance(event, Ended) else [said]

    def end(self, reason: WireError | None) -> Actions:
        """Finish what was heard; ``ended`` then names the reason."""
        started = self._protocol.state is not State.NEW
        if reason is not None and not started:
            return self.error(reason)
        self._protocol.end(_REASONS.get(reason.code, "end") if reason else "stopping")
        return [End()] if started else [Close()]

    def error(self, error: Exception) -> Actions:
        """``error`` and the close code that belongs to it."""
        text, code = self._protocol.error(error)
        return [Send(text=text), Close(code=code, reason=str(as_wire_error(error)))]

    def lost(self) -> None:
        """The client is gone."""
        self._protocol.lost()
