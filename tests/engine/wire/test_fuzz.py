"""Whatever a client sends, in every protocol: a refusal or an answer, no crash and no growth.

Sessions are driven as the server does it, with a real recogniser behind them. `fuzz.py` beside this
file goes on from here under libFuzzer.
"""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loquent.engine.events import Ended
from loquent.engine.lane import Marked
from loquent.engine.protocol import (
    Audio,
    End,
    Finalize,
    Progress,
    Ready,
    SetEndpoint,
    Start,
    WireError,
    as_wire_error,
)
from loquent.engine.recognizer import Recognizer
from loquent.engine.stream import Stream
from loquent.engine.wire.dispatch import PROTOCOLS, open_session
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
)

Message = str | bytes
PROGRESS = Progress(received=0.0, processed=0.0)


class Conversation:
    """One session without sockets: a protocol, and a stream once it asks for one."""

    def __init__(self, recognizer: Recognizer, wire: WireSession) -> None:
        self.recognizer = recognizer
        self.wire = wire
        self.stream: Stream | None = None
        self.over = False
        self.said = 0  # characters

    def begin(self) -> None:
        """The socket is open."""
        self._guarded(self.wire.connected)

    def hear(self, message: Message) -> None:
        """The client says something."""
        if not self.over:
            self._guarded(lambda: self.wire.receive(message))

    def end(self, reason: WireError | None) -> None:
        """The server goes down, or the client was silent for too long."""
        if not self.over:
            self._guarded(lambda: self.wire.end(reason))
        assert self.over or self.stream is None, "a stream that ended ends the session"

    def _guarded(self, happen: Any) -> None:
        try:
            self._perform(happen())
        except Exception as exc:
            if as_wire_error(exc).code == "internal":
                raise
            self._perform(self.wire.error(exc))
            assert self.over, "an error closes the session"

    def _perform(self, actions: Actions) -> None:
        for action in actions:
            self._act(action)

    def _act(self, action: Action) -> None:
        match action:
            case Send(text=text):
                self.said += len(text)
                text.encode()
            case Open(start=start, endpoint=endpoint):
                assert self.stream is None, "a session has one stream"
                self.stream = self.recognizer.stream(
                    sample_rate=start.sample_rate,
                    chunk_ms=start.chunk_ms if start.chunk_ms is not None else 160,
                    decoder=start.decoder,
                    right_context_ms=start.right_context_ms,
                    endpoint=endpoint,
                )
                self._perform(
                    self.wire.ready(
                        Ready(
                            session="0" * 16,
                            bundle="tiny",
                            decoder="ctc",
                            chunk_ms=160,
                            latency_ms=200,
                            sample_rate=start.sample_rate,
                        )
                    )
                )
            case Close(code=code, reason=reason):
                assert 1000 <= code < 1016
                assert code not in (1004, 1005, 1006, 1015)
                reason.encode()
                self.over = True
            case Audio(pcm=pcm):
                assert self.stream is not None, "protocols start before they hear"
                for at in range(0, len(pcm), 1600):
                    self.stream.accept(pcm[at : at + 1600])
                    self._step()
            case Mark():
                self._perform(self.wire.event(Marked(), PROGRESS))
            case SetEndpoint(endpoint=endpoint):
                assert self.stream is not None, "protocols start before they change rules"
                self.stream.set_endpoint(endpoint)
            case Finalize():
                assert self.stream is not None, "protocols start before they finalize"
                self.stream.finalize()
                self._step()
            case End():
                assert self.stream is not None, "protocols start before they end"
                if not self.over:
                    self.stream.finish()
                    self._step()

    def _step(self) -> None:
        assert self.stream is not None, "called with a stream"
        while self.stream.ready:
            self.recognizer.step([self.stream])
        for event in self.stream.events():
            self._perform(self.wire.event(event, PROGRESS))
            if isinstance(event, Ended):
                assert self.over, "Ended ends the session"


def converse(
    recognizer: Recognizer,
    target: str,
    headers: Mapping[str, str],
    messages: Sequence[Message],
    reason: WireError | None = None,
) -> Conversation | None:
    """A whole session; None if the request was refused."""
    context = Context(
        session="0" * 16,
        bundle="tiny",
        languages=recognizer.bundle.languages,
        chunks_ms=recognizer.bundle.chunks_ms,
        now=1.8e9,
    )
    try:
        wire = open_session(Handshake.parse(target, headers), context)
    except Refused as exc:
        refused = exc
    else:
        return _converse(recognizer, wire, headers, messages, reason)
    assert 400 <= refused.status < 500
    str(refused).encode()
    assert all(value.isascii() and value.isprintable() for value in refused.headers.values())
    return None


def _converse(
    recognizer: Recognizer,
    wire: WireSession,
    headers: Mapping[str, str],
    messages: Sequence[Message],
    reason: WireError | None,
) -> Conversation:
    if wire.subprotocol is not None:
        assert wire.subprotocol in headers["sec-websocket-protocol"]
    conversation = Conversation(recognizer, wire)
    conversation.begin()
    for message in messages:
        conversation.hear(message)
    conversation.end(reason)
    # What is said grows with what was heard, and never much faster.
    heard = sum(map(len, messages))
    assert conversation.said <= 20_000 * (len(messages) + 2) + 20 * heard
    return conversation


# What clients might say.

# fmt: off
NAMES = (
    "type", "start", "end", "finalize", "sample_rate", "encoding", "chunk_ms", "decoder",
    "language", "right_context_ms", "hotwords", "config", "words", "max_alternatives",
    "phrase_list", "eof", "reset", "session", "audio", "input", "format", "rate", "transcription",
    "model", "prompt", "turn_detection", "server_vad", "threshold", "silence_duration_ms",
    "prefix_padding_ms", "noise_reduction", "include", "event_id", "KeepAlive", "Finalize",
    "CloseStream", "Configure", "session.update", "transcription_session.update",
    "input_audio_buffer.append", "audio/pcm", "audio/pcmu", "input_audio_buffer.commit",
    "input_audio_buffer.clear", "pcm16", "g711_ulaw", "s16le", "f32le", "linear16", "mulaw",
    "interim_results", "endpointing", "utterance_end_ms", "vad_events", "punctuate", "channels",
    "true", "false", "16000", "8000", "1", "0", "-1", "AAAA", "AAAAAAAA", "Done", "null",
)
# fmt: on
names = st.sampled_from(NAMES)
scalars = st.one_of(
    names,
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["\ud800", "\0", "\u2028", "𝄞"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
likely = [
    Start(sample_rate=16000).encode(),
    Start(sample_rate=8000, encoding="f32le", chunk_ms=40).encode(),
    '{"type": "end"}',
    '{"type": "finalize"}',
    '{"config": {"sample_rate": 16000, "words": 1}}',
    '{"eof": 1}',
    '{"reset": 1}',
    "Done",
    '{"type": "KeepAlive"}',
    '{"type": "Finalize"}',
    '{"type": "CloseStream"}',
    '{"type": "session.update", "session": {"type": "transcription"}}',
    '{"type": "session.update", "session": {"turn_detection": null}}',
    '{"type": "session.update", "session": {"turn_detection": {"silence_duration_ms": 900}}}',
    '{"type": "input_audio_buffer.append", "audio": "' + "AAAA" * 400 + '"}',
    '{"type": "input_audio_buffer.commit", "event_id": "\\ud800"}',
    '{"type": "input_audio_buffer.clear"}',
    "[" * 100_000,
    '{"a": 1, "a": 2}',
    '{"a": ' + "9" * 5000 + "}",
]
messages = st.one_of(
    st.sampled_from(likely),
    st.binary(max_size=4000),
    st.binary(max_size=40).map(lambda unit: unit * 100),
    st.text(max_size=30),
    st.dictionaries(names, values, max_size=4).map(json.dumps),
    values.map(json.dumps),
)
queries = st.lists(
    st.tuples(names | st.text(max_size=5), names | st.text(max_size=5)), max_size=4
).map(lambda pairs: "&".join(f"{name}={value}" for name, value in pairs))
headers = st.dictionaries(
    st.sampled_from(["sec-websocket-protocol", "authorization", "openai-beta", "origin"]),
    st.sampled_from(["token, KEY", "loquent.v1", "realtime, x", "realtime=v1", ",,", "", "Bearer"]),
    max_size=3,
)
reasons = st.sampled_from([None, WireError("idle", "silent"), WireError("session_limit", "long")])


@settings(max_examples=40)
@given(query=queries, headers=headers, said=st.lists(messages, max_size=8), reason=reasons)
@pytest.mark.parametrize("path", [*PROTOCOLS, "/"])
def test_whatever_a_client_says(
    tiny: Recognizer,
    path: str,
    query: str,
    headers: Mapping[str, str],
    said: list[Message],
    reason: WireError | None,
) -> None:
    converse(tiny, f"{path}?{query}", headers, said, reason)


@settings(max_examples=40)
@given(target=st.text(max_size=40), headers=headers)
def test_whatever_the_request_is(tiny: Recognizer, target: str, headers: Mapping[str, str]) -> None:
    converse(tiny, target, headers, [])


@pytest.mark.parametrize("path", [*PROTOCOLS])
def test_a_session_does_not_grow(tiny: Recognizer, path: str) -> None:
    """The same over and over, with what a client of any protocol may repeat for ever."""
    opening = [Start(sample_rate=16000).encode()] if path == "/v1/stream" else []
    query = "?encoding=linear16&sample_rate=16000"
    gc.collect()
    gc.freeze()  # what is there already takes no part in the collections below
    for repeated in (bytes(64), *likely[3:17], b"R"):
        wire = open_session(
            Handshake.parse(path + query, {}), Context(session="0" * 16, bundle="tiny")
        )
        conversation = Conversation(tiny, wire)
        conversation.begin()
        for message in opening:
            conversation.hear(message)
        sizes = []
        tracemalloc.start()
        try:
            for count in (50, 150):
                for _ in range(count):
                    conversation.hear(repeated)
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        assert sizes[1] - sizes[0] < 100_000, (repeated[:40], sizes)
    gc.unfreeze()
