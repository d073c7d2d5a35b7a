"""Loquent's own protocol (`loquent.engine.protocol`) behind the seam that all protocols share."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import Any

from loquent.engine.endpoint import endpoint_rules
from loquent.engine.events import Ended, EndReason, Event, Partial
from loquent.engine.lane import Beat, Marked
from loquent.engine.protocol import (
    PATH,
    SUBPROTOCOL,
    Code,
    End,
    Progress,
    Ready,
    Standing,
    Start,
    WireError,
    as_wire_error,
    encode_progress,
)
from loquent.engine.wire.conversation import ServerProtocol, State
from loquent.engine.wire.session import (
    Actions,
    Close,
    Context,
    Handshake,
    Open,
    Send,
    WireSession,
    returns,
)

_REASONS: Mapping[Code, EndReason] = {"idle": "idle", "session_limit": "session_limit"}


# Numbered messages kept for a client that may have missed them; partials are not among them, but
# for the last. At an utterance every two seconds they reach back for two minutes.
MAX_LOG = 64


class NativeSession(WireSession):
    """A session at ``/v1/stream``."""

    def __init__(self, handshake: Handshake, context: Context) -> None:
        self._protocol = ServerProtocol(languages=context.languages)
        self.returning = returns(handshake)
        self._ready: Ready | None = None
        self._log: deque[tuple[int, str]] = deque(maxlen=MAX_LOG)
        self._last_is_partial = False
        self._seq = 0
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
        if isinstance(command, Start):
            if self.returning:
                raise WireError(
                    "bad_type",
                    "got start at an address with resume=1, expected resume; leave it out",
                )
            self.resumable = bool(command.resume)
            rules = endpoint_rules(
                endpoint_silence=command.endpoint_silence,
                max_utterance=command.max_utterance,
                leading_silence=command.leading_silence,
            )
            return [Open(start=command, endpoint=rules)]
        return [command]

    def ready(self, ready: Ready) -> Actions:
        """``ready``."""
        self._ready = ready
        return [Send(text=self._protocol.ready(ready))]

    def resumed(self, standing: Standing, seq: int) -> Actions:
        """``ready`` again, and what the client has missed."""
        assert self._ready is not None, "resumable from then on"
        if seq > self._seq or (len(self._log) == MAX_LOG and seq < self._log[0][0] - 1):
            raise WireError("gone", f"events behind number {seq} are not kept; start anew")
        ended = self._protocol.state in (State.DRAINING, State.CLOSED)
        standing = dataclasses.replace(standing, ended=ended)
        ready = dataclasses.replace(self._ready, resume=standing)
        said = [Send(text=self._protocol.ready(ready))]
        said += [Send(text=text) for number, text in self._log if number > seq]
        return [*said, Close()] if self._protocol.state is State.CLOSED else said

    def event(self, event: Event | Marked, progress: Progress) -> Actions:
        """One event is one message; `Ended` closes."""
        if isinstance(event, Beat):
            return [Send(text=encode_progress(progress))]
        assert not isinstance(event, Marked), "nothing here asks for marks"
        said = Send(text=self._number(event, progress))
        return [said, Close()] if isinstance(event, Ended) else [said]

    def freeze(self, *, finished: bool) -> dict[str, Any]:
        """The state between two messages, as JSON values; `finished`: the stream has the end."""
        assert self._ready is not None, "resumable from then on"
        # An end whose audio the stream has not taken will be sent again, as that will.
        return {
            "ready": dataclasses.asdict(dataclasses.replace(self._ready, resume=None)),
            "protocol": self._protocol.freeze(finished=finished),
            "log": list(self._log),
            "last_is_partial": self._last_is_partial,
            "seq": self._seq,
        }

    @classmethod
    def thaw(cls, frozen: Mapping[str, Any]) -> NativeSession:
        """Inverse of `freeze`."""
        session = cls(Handshake(path=PATH), Context(session="", bundle=""))
        session.resumable = True
        session._ready = Ready(**frozen["ready"])
        session._protocol.thaw(frozen["protocol"])
        session._log.extend((int(number), str(text)) for number, text in frozen["log"])
        session._last_is_partial = bool(frozen["last_is_partial"])
        session._seq = int(frozen["seq"])
        return session

    def _number(self, event: Event, progress: Progress) -> str:
        if not self.resumable:
            return self._protocol.event(event, progress)
        self._seq += 1
        text = self._protocol.event(event, progress, self._seq)
        if self._last_is_partial:
            self._log.pop()  # the new one says all of it, or settles it
        self._log.append((self._seq, text))
        self._last_is_partial = isinstance(event, Partial)
        return text

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
