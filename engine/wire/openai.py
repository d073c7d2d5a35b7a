"""OpenAI's Realtime transcription (the types of openai-python 3): ``/v1/realtime``.

    client                              server
    (connects)                          session.created
    session.update                      session.updated, of what is in force for audio from here on
    input_audio_buffer.append           nothing
    input_audio_buffer.commit           .committed, conversation.item.added, .completed
    input_audio_buffer.clear            .cleared
    anything wrong                      error, and the session goes on

    Partial, Final     -> .delta: what is committed and was not sent yet, never taken back
    Finalized          -> .committed, conversation.item.added, .completed; or nothing after a clear
    and with server_vad or semantic_vad, where a segment is an item and the server commits
    first words        -> .speech_started
    Final, by silence  -> .delta, .speech_stopped, .committed, conversation.item.added, .completed

Audio is recognised while it is appended, so that a commit has little left to do, and an item's
deltas come before it. The deltas of an item are its transcript. A commit is answered once all audio
before it is recognised: which words are in which item does not depend on how far we had come. Turn
detection may change between two appends in the same way; the audio's format and delay, which is the
stream's chunk size, are settled by the first. The older names of the beta
(transcription_session.update, input_audio_format) are understood too.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from loquent.engine.events import Ended, Event, Final, Finalized, Partial, Word
from loquent.engine.lane import Marked
from loquent.engine.protocol import (
    Audio,
    End,
    Finalize,
    Progress,
    SetEndpoint,
    SetHotwords,
    Start,
    WireError,
    as_wire_error,
)
from loquent.engine.wire.openai_config import Config, SettingError
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

SHORTEST = 0.1  # seconds that a commit needs
_CODES = {
    "bad_json": "invalid_json",
    "bad_type": "invalid_event",
    "bad_audio": "invalid_audio",
    "idle": "session_expired",
    "session_limit": "session_expired",
}
_TRANSCRIPTION = "conversation.item.input_audio_transcription"


@dataclasses.dataclass(slots=True)
class _Item:
    """One piece of the conversation. `text` is what its deltas have said so far."""

    id: str
    text: str = ""
    finals: str = ""  # text of its segments that are over
    words: list[Word] = dataclasses.field(default_factory=list)
    started: bool = False  # speech_started was sent


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """A commit or a clear that waits for its `Finalized`."""

    keep: bool
    event_id: object = None


class OpenAiSession(WireSession):
    """A session at ``/v1/realtime``."""

    # It has no KeepAlive, and who pushes to talk is silent in between.
    patience = 900.0

    def __init__(self, handshake: Handshake, context: Context) -> None:
        self._id = context.session
        self._created = int(context.now)
        self._beta = "realtime=v1" in handshake.headers.get("openai-beta", "")
        self.subprotocol = "realtime" if "realtime" in handshake.subprotocols else None
        model = (handshake.query.get("model") or ("",))[-1]
        self._config = Config(
            model=model or context.bundle,
            languages=tuple(context.languages),
            spells=context.spells,
        )
        self._in_force = self._config  # for the audio that events tell of ...
        self._changes: deque[Config] = deque()  # ... and what is to be for what is not heard yet
        self._chunks = tuple(context.chunks_ms)
        self._reader: PcmReader | None = None
        self._events = 0
        self._items = 0
        self._previous: str | None = None
        self._item = self._new_item()
        self._begin = 0.0  # seconds where its audio begins
        self._cuts: deque[_Cut] = deque()
        self._ending = False
        self._reason: WireError | None = None

    def connected(self) -> Actions:
        """``session.created``."""
        self.state = "streaming"
        kind = "transcription_session.created" if self._beta else "session.created"
        return [self._send(kind, session=self._session())]

    def receive(self, message: str | bytes) -> Actions:
        """One event of the client. What is wrong with it is told, and the session goes on."""
        if self._ending:
            return ()
        event_id = None
        try:
            if isinstance(message, bytes):
                raise WireError(
                    "bad_type", "got a binary message, expected audio as base64 in JSON"
                )
            fields = read_json(message, '{"type": "input_audio_buffer.append", "audio": "..."}')
            event_id = fields.get("event_id")
            return self._receive(fields)
        except SettingError as exc:
            return [self._error(str(exc), "invalid_value", event_id, param=exc.param)]
        except WireError as exc:
            return [self._error(str(exc), _CODES.get(exc.code, exc.code), event_id)]

    def event(self, event: Event | Marked, progress: Progress) -> Actions:
        """See the tables at the top."""
        match event:
            case Partial():
                return [*self._began(event), *self._delta(event.committed)]
            case Final():
                return self._final(event)
            case Finalized():
                return self._cut(self._cuts.popleft(), event.position)
            case Ended():
                return self._ended(event.duration)
            case Marked():
                self._in_force = self._changes.popleft()
                return ()

    def end(self, reason: WireError | None) -> Actions:
        """What was appended is committed."""
        self._ending = True
        self._reason = reason
        self.state = "draining"
        return [End()] if self._reader is not None else self._over()

    def error(self, error: Exception) -> Actions:
        """``failed`` for every item that waits, ``error``, and the close code."""
        self.state = "failed"
        known = as_wire_error(error)
        code = _CODES.get(known.code, known.code)
        kind = "server_error" if code in ("internal", "busy") else "invalid_request_error"
        why = {"type": kind, "code": code, "message": str(known)}
        failed = [
            self._send(
                f"{_TRANSCRIPTION}.failed", item_id=self._item.id, content_index=0, error=why
            )
            for _ in [cut for cut in self._cuts if cut.keep][:1]
        ]
        close = Close(code=known.close_code, reason=str(known))
        return [*failed, self._error(str(known), code, None, kind=kind), close]

    def _receive(self, fields: Mapping[str, Any]) -> list[Action]:
        match fields.get("type"):
            case "session.update" | "transcription_session.update" as kind:
                return self._update(fields.get("session"), kind)
            case "input_audio_buffer.append":
                return self._append(fields.get("audio"))
            case "input_audio_buffer.commit":
                if self._reader is None:
                    return [self._too_short(0.0, fields.get("event_id"))]
                self._cuts.append(_Cut(keep=True, event_id=fields.get("event_id")))
                return [Finalize()]
            case "input_audio_buffer.clear":
                cleared = self._send("input_audio_buffer.cleared")
                if self._reader is None:
                    return [cleared]
                # The audio is heard already, or soon is; what is said in it is nobody's.
                self._cuts.append(_Cut(keep=False))
                return [cleared, Finalize()]
            case other:
                raise WireError(
                    "bad_type",
                    f"got type {other!r:.80}, expected session.update, or append, commit or "
                    "clear of input_audio_buffer: this server transcribes and does nothing else",
                )

    def _update(self, session: object, kind: str) -> list[Action]:
        config = self._config.updated(session)
        changes = self._enforced(config)
        self._config = config
        if config.unused:
            logger.info("session %s: not supported here: %s", self._id, ", ".join(config.unused))
        return [self._send(f"{kind}d", session=self._session()), *changes]

    def _enforced(self, config: Config) -> list[Action]:
        """What brings an update into force. Raises SettingError for what is too late."""
        if self._reader is None:
            self._in_force = config
            return []
        for name in ("format", "delay"):
            if getattr(config, name) != getattr(self._config, name):
                raise SettingError(
                    name,
                    f"got another {name} after the first append, which settled it; leave it out "
                    "or connect again",
                )
        changes: list[Action] = []
        if _turns(config) != _turns(self._config):
            self._changes.append(config)
            changes += [Mark(), SetEndpoint(endpoint=config.endpoint)]
        if config.hotwords != self._config.hotwords:
            changes.append(SetHotwords(hotwords=config.hotwords))
        return changes

    def _append(self, audio: object) -> list[Action]:
        try:
            if not isinstance(audio, str):
                raise ValueError(f"{type(audio).__name__}, expected a string")
            data = base64.b64decode(audio, validate=True)
        except (binascii.Error, ValueError) as exc:
            raise WireError("bad_audio", f"got audio that is no base64: {exc}") from exc
        opening: list[Action] = []
        if self._reader is None:
            raw, rate = self._config.format
            self._reader = PcmReader(raw)
            start = Start(
                sample_rate=rate,
                chunk_ms=self._config.chunk_ms(self._chunks),
                hotwords=self._config.hotwords or None,
            )
            opening = [Open(start=start, endpoint=self._config.endpoint)]
        return [*opening, Audio(pcm=self._reader.accept(data))]

    @property
    def _cleared(self) -> bool:
        """Whether the client has dropped the audio that is recognised now."""
        return bool(self._cuts) and not self._cuts[0].keep

    def _began(self, event: Partial | Final) -> list[Action]:
        if not self._in_force.turns or not event.words or self._item.started or self._cleared:
            return []
        self._item.started = True
        padded = max(event.start - self._in_force.prefix_padding, self._begin)
        return [
            self._send(
                "input_audio_buffer.speech_started",
                audio_start_ms=round(padded * 1000),
                item_id=self._item.id,
            )
        ]

    def _delta(self, settled: str) -> list[Action]:
        """What of a segment's settled text was not sent yet."""
        item = self._item
        text = f"{item.finals} {settled}".strip()
        new = text[len(item.text) :]
        if not new or self._cleared:
            return []
        assert text.startswith(item.text), "committed text never changes"
        item.text = text
        return [self._send(f"{_TRANSCRIPTION}.delta", item_id=item.id, content_index=0, delta=new)]

    def _final(self, event: Final) -> list[Action]:
        said = [*self._began(event), *self._delta(event.text)]
        self._item.finals = self._item.text
        self._item.words += event.words
        if not self._in_force.turns or self._cleared or event.reason in ("finalize", "end"):
            return said  # what asked for it comes next
        return [*said, *self._commit(event.end)]

    def _cut(self, cut: _Cut, position: float) -> list[Action]:
        if not cut.keep:
            self._item, self._begin = self._new_item(), position
            return []
        seconds = position - self._begin
        if seconds < SHORTEST and not self._item.text:
            return [self._too_short(seconds, cut.event_id)]
        return self._commit(position)

    def _commit(self, end: float) -> list[Action]:
        """The open item, with the audio up to `end` seconds, is done."""
        item, self._item = self._item, self._new_item()
        seconds, self._begin = max(end - self._begin, 0.0), max(end, self._begin)
        stopped = "input_audio_buffer.speech_stopped"
        milliseconds = round(end * 1000)
        said: list[Action] = (
            [self._send(stopped, audio_end_ms=milliseconds, item_id=item.id)]
            if item.started
            else []
        )
        previous, self._previous = self._previous, item.id
        about = {
            "id": item.id,
            "object": "realtime.item",
            "type": "message",
            "status": "completed",
            "role": "user",
            "content": [{"type": "input_audio", "transcript": None}],
        }
        kind = "conversation.item.created" if self._beta else "conversation.item.added"
        logprobs = (
            {"logprobs": [_logprob(word) for word in item.words]} if self._config.logprobs else {}
        )
        return [
            *said,
            self._send("input_audio_buffer.committed", item_id=item.id, previous_item_id=previous),
            self._send(kind, item=about, previous_item_id=previous),
            self._send(
                f"{_TRANSCRIPTION}.completed",
                item_id=item.id,
                content_index=0,
                transcript=item.text,
                usage={"type": "duration", "seconds": round(seconds, 3)},
                **logprobs,
            ),
        ]

    def _too_short(self, seconds: float, event_id: object) -> Send:
        return self._error(
            f"got a commit of {seconds * 1000:.2f} ms of audio, expected at least "
            f"{SHORTEST * 1000:.0f} ms",
            "input_audio_buffer_commit_empty",  # clients know this code, and go on
            event_id,
        )

    def _ended(self, duration: float) -> list[Action]:
        said = self._commit(duration) if self._item.text else []
        return [*said, *self._over()]

    def _over(self) -> list[Action]:
        if self._reason is not None:
            return list(self.error(self._reason))
        self.state = "closed"
        return [Close()]

    def _session(self) -> dict[str, Any]:
        about = {"id": f"sess_{self._id}", "expires_at": None}
        return {**about, **self._config.describe(beta=self._beta)}

    def _new_item(self) -> _Item:
        self._items += 1
        return _Item(id=f"item_{self._id}_{self._items}")

    def _error(
        self,
        message: str,
        code: str,
        event_id: object,
        *,
        param: str | None = None,
        kind: str = "invalid_request_error",
    ) -> Send:
        about = {"type": kind, "code": code, "message": message, "param": param}
        caused_by = event_id if isinstance(event_id, str) else None
        return self._send("error", error={**about, "event_id": caused_by})

    def _send(self, kind: str, **fields: Any) -> Send:
        self._events += 1
        event = {"type": kind, "event_id": f"event_{self._id}_{self._events}", **fields}
        return Send(text=json.dumps(event, ensure_ascii=False))


def _turns(config: Config) -> tuple[object, ...]:
    """All that turn detection is made of."""
    return config.turns, config.endpoint, config.prefix_padding


def _logprob(word: Word) -> dict[str, Any]:
    # Our tokens are words; a space tells where one begins.
    token = f" {word.text}"
    logprob = round(math.log(max(word.confidence, 1e-6)), 6)
    return {"token": token, "bytes": list(token.encode()), "logprob": logprob}
