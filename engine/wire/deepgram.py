"""Deepgram's streaming protocol (its docs, and the types of deepgram-python-sdk 7): ``/v1/listen``.

    client                         server
    audio                          Results: is_final false, replaced later (interim_results=true);
                                   is_final true, immutable, one behind the other
    {"type": "KeepAlive"}          nothing
    {"type": "Finalize"}           always one Results with from_finalize, even without words
    {"type": "Configure", ...}     ConfigureSuccess for keyterms, ConfigureFailure otherwise
    {"type": "CloseStream"}        Results for the rest, Metadata, close 1000
    no JSON, or of unknown type    Error, and the session goes on

    Partial                      -> Results is_final=false; SpeechStarted before a segment's first
    Final, endpoint              -> Results is_final, speech_final; is_final alone where
                                    endpointing is false or longer than utterance_end_ms
    Final, limit                 -> Results is_final
    Final, finalize + Finalized  -> Results is_final, speech_final, from_finalize
    Final, end + Ended           -> Results is_final, speech_final; Metadata; close
    silence after the last word  -> UtteranceEnd (utterance_end_ms); if endpointing is longer,
                                    then Results is_final, speech_final, without words

With punctuate or smart_format finals are finished (casing, punctuation, digits) where there is a
finisher for the language; interim results never are. Options come in the query; those that we do
not know are accepted, logged and listed as warnings in Metadata. Options that cannot be met, such
as an encoding, refuse the handshake with dg-error.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from loquent.engine.events import Ended, Event, Final, Finalized, Partial, Word
from loquent.engine.lane import Marked
from loquent.engine.protocol import (
    Audio,
    Code,
    End,
    Finalize,
    Progress,
    SetHotwords,
    Start,
    WireError,
    as_wire_error,
)
from loquent.engine.wire.deepgram_options import Options, keyterms
from loquent.engine.wire.pcm import PcmReader, read_wav_head
from loquent.engine.wire.session import (
    Action,
    Actions,
    Close,
    Context,
    Handshake,
    Mark,
    Open,
    Refused,
    Send,
    WireSession,
    read_json,
)
from loquent.engine.wire.written import written

logger = logging.getLogger(__name__)

_CLOSE: Mapping[Code, tuple[int, str]] = {
    "bad_audio": (1008, "DATA-0000"),
    "bad_config": (1008, "DATA-0000"),
    "idle": (1011, "NET-0001"),
    "internal": (1011, "NET-0000"),
}


class DeepgramSession(WireSession):
    """A session at ``/v1/listen``."""

    patience = 10.0  # as Deepgram has it: audio or KeepAlive within ten seconds

    def __init__(self, handshake: Handshake, context: Context) -> None:
        self._id = context.session
        self._bundle = context.bundle
        self._created = datetime.datetime.fromtimestamp(context.now, datetime.UTC)
        self.headers = {"dg-request-id": self._id}
        # A browser gets only a subprotocol that it offered: the scheme that carried its key.
        self.subprotocol = next(
            (name for name in handshake.subprotocols if name.lower() in ("token", "bearer")), None
        )
        try:
            self._options = Options.parse(
                handshake.query,
                context.languages,
                finishes=context.finishes,
                spells=context.spells,
            )
        except ValueError as exc:
            raise Refused(
                HTTPStatus.BAD_REQUEST, str(exc), {**self.headers, "dg-error": str(exc)}
            ) from exc
        if self._options.unused:
            logger.info(
                "session %s: not supported here: %s", self._id, ", ".join(self._options.unused)
            )
        self._finishes = self._options.punctuate and context.finishes
        self._spells = context.spells
        self._reader: PcmReader | None = None
        self._head = b""  # of a wav file, while it is not whole
        self._ending = False
        self._reason: WireError | None = None
        self._digest = hashlib.sha256()
        self._settled = 0.0  # seconds up to which results are final
        self._held: Final | None = None  # goes out with what asked for it
        self._growing = False  # there are words that are not final yet
        self._speaking = False  # there are final words since the last speech_final
        self._segment = -1  # the last one that SpeechStarted was sent for
        self._word_end: float | None = None  # of the last final word, until its UtteranceEnd

    @property
    def draining(self) -> bool:
        """After ``CloseStream``."""
        return self._ending

    def connected(self) -> Actions:
        """Raw audio is described by the query; a wav file by its head."""
        self.state = "streaming"
        raw = self._options.raw
        if raw is None:
            return ()
        return self._open(PcmReader(raw, self._options.channels), self._options.sample_rate)

    def receive(self, message: str | bytes) -> Actions:
        """Audio or a control message."""
        if self._ending:
            return ()  # what is still under way when a client closes
        if isinstance(message, bytes):
            # An empty message is the old way to close the stream.
            return self._audio(message) if message else self._finish()
        try:
            fields = read_json(message, '{"type": "KeepAlive"}')
        except WireError as exc:
            return [self._schema_error(message, str(exc))]
        match fields.get("type"):
            case "KeepAlive":
                return ()
            case "Finalize" if self._reader is None:
                return [self._results(None, 0.0, final=True, speech_final=False, finalize=True)]
            case "Finalize":
                return [Finalize()]
            case "CloseStream":
                return self._finish()
            case "Configure":
                return self._configure(fields.get("keyterms"))
            case other:
                expected = "KeepAlive, Finalize, Configure or CloseStream"
                return [self._schema_error(message, f"got type {other!r:.80}, expected {expected}")]

    def event(self, event: Event | Marked, progress: Progress) -> Actions:
        """See the table at the top."""
        match event:
            case Partial():
                self._growing = bool(event.words)
                return [*self._began(event), *self._interim(event)]
            case Final():
                return self._final(event)
            case Finalized():
                return [self._flushed(event.position, finalize=True)]
            case Marked():
                return [] if self._growing else self._silence(progress.processed)
            case Ended():
                return self._ended(event.duration)

    def end(self, reason: WireError | None) -> Actions:
        """As ``CloseStream`` does."""
        self._reason = reason
        return self._finish()

    def error(self, error: Exception) -> Actions:
        """Nothing but the close code and its reason."""
        self.state = "failed"
        known = as_wire_error(error)
        code, name = _CLOSE.get(known.code, (known.close_code, known.code))
        return [Close(code=code, reason=f"{name}: {known}")]

    def _open(self, reader: PcmReader, sample_rate: int) -> list[Action]:
        self._reader = reader
        start = Start(
            sample_rate=sample_rate,
            encoding=reader.encoding,
            hotwords=self._options.hotwords or None,
            finish=self._finishes or None,
        )
        return [Open(start=start, endpoint=self._options.segments)]

    def _configure(self, phrases: object) -> list[Action]:
        about = {"request_id": self._id}
        try:
            if self._reader is None or not isinstance(phrases, list):
                raise ValueError("expected a list of keyterms, once there is audio")
            found = keyterms(phrases, self._spells)
        except ValueError as exc:
            code = "CONFIGURE_INTERNAL_ERROR"
            failure = {"type": "ConfigureFailure", **about, "code": code, "description": str(exc)}
            return [_send(failure)]
        success = {"type": "ConfigureSuccess", **about, "keyterms": phrases}
        return [_send(success), SetHotwords(hotwords=found)]

    def _audio(self, data: bytes) -> list[Action]:
        self._digest.update(data)
        opening: list[Action] = []
        if self._reader is None:
            self._head += data
            try:
                head = read_wav_head(self._head)
            except ValueError as exc:
                raise WireError(
                    "bad_audio",
                    f"got {exc}, expected a wav file, or raw audio with encoding=linear16 and "
                    "sample_rate in the address",
                ) from exc
            if head is None:
                return []
            data, self._head = self._head[head.start :], b""
            opening = self._open(PcmReader(head.raw, head.channels), head.sample_rate)
            assert self._reader is not None, "made by _open"
        heard: list[Action] = [*opening, Audio(pcm=self._reader.accept(data))]
        return [*heard, Mark()] if self._options.utterance_end else heard

    def _finish(self) -> Actions:
        self._ending = True
        self.state = "draining"
        return [End()] if self._reader is not None else self._over(0.0)

    def _began(self, event: Partial | Final) -> list[Action]:
        """What a segment's first words bring with them."""
        if not event.words:
            return []
        said = self._silence(event.words[0].start)
        if self._options.vad_events and event.segment != self._segment:
            timestamp = round(event.start, 3)
            said.append(_send({"type": "SpeechStarted", "channel": [0, 1], "timestamp": timestamp}))
        self._segment = event.segment
        return said

    def _interim(self, event: Partial) -> list[Action]:
        if not self._options.interim_results:
            return []
        return [self._results(event, max(event.end, self._settled))]

    def _final(self, event: Final) -> list[Action]:
        said = self._began(event)
        self._growing = False
        self._word_end = event.end
        self._speaking = True
        if event.reason in ("finalize", "end"):
            self._held = event
            return said
        over = event.reason == "endpoint" and self._options.segments == self._options.endpoint
        self._speaking = not over
        end = max(event.end, self._settled)
        return [*said, self._results(event, end, final=True, speech_final=over)]

    def _flushed(self, position: float, *, finalize: bool = False) -> Send:
        held, self._held = self._held, None
        spoke, self._speaking = self._speaking, False
        return self._results(held, position, final=True, speech_final=spoke, finalize=finalize)

    def _silence(self, now: float) -> list[Action]:
        """What is due if no word follows the last final one before `now` seconds."""
        said: list[Action] = []
        silence, last = self._options.utterance_end, self._word_end
        if silence and last is not None and now - last >= silence:
            self._word_end = None
            about = {"channel": [0, 1], "last_word_end": round(last, 3)}
            said.append(_send({"type": "UtteranceEnd", **about}))
        if self._speaking and now - self._settled >= self._options.endpoint.trailing_silence:
            self._speaking = False
            said.append(self._results(None, self._settled, final=True, speech_final=True))
        return said

    def _ended(self, duration: float) -> list[Action]:
        rest = self._flushed(max(duration, self._settled))
        return [rest, *self._silence(duration), *self._over(duration)]

    def _over(self, duration: float) -> list[Action]:
        warnings = [
            {
                "parameter": name,
                "type": "unsupported",
                "message": "This server cannot do this; it was ignored.",
            }
            for name in self._options.unused
        ]
        metadata = {
            "type": "Metadata",
            "transaction_key": "deprecated",
            "request_id": self._id,
            "sha256": self._digest.hexdigest(),
            "created": self._created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "duration": round(duration, 3),
            "channels": 1,
            **({"warnings": warnings} if warnings else {}),
        }
        if self._reason is not None:
            return [_send(metadata), *self.error(self._reason)]
        self.state = "closed"
        return [_send(metadata), Close()]

    def _results(
        self,
        said: Partial | Final | None,
        end: float,
        *,
        final: bool = False,
        speech_final: bool = False,
        finalize: bool = False,
    ) -> Send:
        start = self._settled
        if final:
            self._settled = end
        words = said.words if said else ()
        confidence = sum(word.confidence for word in words) / len(words) if words else 0.0
        shown = [(word, word.text) for word in words]
        if self._finishes and isinstance(said, Final):
            shown = written(words, said.text)
        alternative = {
            "transcript": " ".join(text for _, text in shown),
            "confidence": round(confidence, 6),
            "words": [self._word(word, text) for word, text in shown],
        }
        return _send(
            {
                "type": "Results",
                "channel_index": [0, 1],
                "duration": round(end - start, 3),
                "start": round(start, 3),
                "is_final": final,
                "speech_final": speech_final,
                "from_finalize": finalize,
                "channel": {"alternatives": [alternative]},
                "metadata": {
                    "request_id": self._id,
                    "model_info": {"name": self._bundle, "version": "1", "arch": "emformer"},
                    "model_uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, self._bundle)),
                },
            }
        )

    def _word(self, word: Word, text: str) -> dict[str, Any]:
        fields = {
            "word": word.text,
            "start": round(word.start, 3),
            "end": round(word.end, 3),
            "confidence": round(word.confidence, 6),
        }
        return {**fields, "punctuated_word": text} if self._options.punctuate else fields

    def _schema_error(self, message: str, description: str) -> Send:
        fields = {"type": "Error", "variant": "SchemaError", "description": description}
        return _send({**fields, "message": message[:1000]})


def _send(fields: Mapping[str, Any]) -> Send:
    return Send(text=json.dumps(fields, ensure_ascii=False))
