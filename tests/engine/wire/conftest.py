"""Runs a session against a recogniser without a socket: every action is carried out at once."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loquent.engine.lane import Marked
from loquent.engine.protocol import Audio, End, Finalize, Progress, Ready, SetEndpoint, SetHotwords
from loquent.engine.recognizer import Recognizer
from loquent.engine.stream import Stream
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
)

Message = str | bytes


class Conversation:
    """What a client would see, in order: `sent`, texts parsed where they are JSON; `close`."""

    def __init__(self, session: WireSession, recognizer: Recognizer, *, chunk_ms: float) -> None:
        self.session = session
        self.sent: list[Any] = []
        self.close: Close | None = None
        self._recognizer = recognizer
        self._chunk_ms = chunk_ms
        self._stream: Stream | None = None
        self._actions: deque[Action] = deque()
        self._do(session.connected())

    def say(self, *messages: Message) -> list[Any]:
        """The client's messages; gives what they brought. Errors are told as the server does."""
        before = len(self.sent)
        for message in messages:
            if self.close is not None:
                break
            try:
                self._do(self.session.receive(message))
            except Exception as exc:
                self._do(self.session.error(exc))
        return self.sent[before:]

    def do(self, actions: Actions) -> list[Any]:
        """Actions that something else than a message brought."""
        before = len(self.sent)
        self._do(actions)
        return self.sent[before:]

    def _do(self, actions: Actions) -> None:
        self._actions.extend(actions)
        while self._actions:
            self._perform(self._actions.popleft())

    def _perform(self, action: Action) -> None:
        if isinstance(action, Send):
            self.sent.append(json.loads(action.text) if action.text[:1] == "{" else action.text)
        elif isinstance(action, Close):
            self.close = action
        elif isinstance(action, Open):
            start = action.start
            self._stream = self._recognizer.stream(
                sample_rate=start.sample_rate,
                chunk_ms=start.chunk_ms or self._chunk_ms,
                endpoint=action.endpoint,
            )
            bundle = self._recognizer.bundle.name
            ready = Ready(
                session="s",
                bundle=bundle,
                decoder=self._stream.decoder,
                chunk_ms=self._chunk_ms,
                latency_ms=self._stream.latency_ms,
                sample_rate=start.sample_rate,
            )
            self._actions.extendleft(reversed(self.session.ready(ready)))
        else:
            self._hear(action)

    def _hear(self, action: Audio | Mark | Finalize | SetHotwords | SetEndpoint | End) -> None:
        stream = self._stream
        assert stream is not None, "opened before it hears"
        said: list[Action] = []
        if isinstance(action, Audio):
            for at in range(0, len(action.pcm), 1600):
                stream.accept(action.pcm[at : at + 1600])
                said += self._advance(stream)
        elif isinstance(action, Finalize):
            stream.finalize()
        elif isinstance(action, SetHotwords):
            stream.set_hotwords(action.hotwords)
        elif isinstance(action, SetEndpoint):
            stream.set_endpoint(action.endpoint)
        elif isinstance(action, End):
            stream.finish()
        said += self._advance(stream)
        if isinstance(action, Mark):
            said += self.session.event(Marked(), self._progress(stream))
        self._actions.extendleft(reversed(said))

    def _advance(self, stream: Stream) -> list[Action]:
        said: list[Action] = []
        while stream.ready:
            self._recognizer.step([stream])
            for event in stream.events():
                said += self.session.event(event, self._progress(stream))
        return said

    def _progress(self, stream: Stream) -> Progress:
        return Progress(received=stream.received, processed=stream.processed)


Talk = Callable[..., Conversation]


@pytest.fixture
def talk(tiny: Recognizer) -> Talk:
    """Opens a session of a class, at an address, with headers."""

    def run(
        kind: Callable[[Handshake, Context], WireSession],
        target: str = "/",
        headers: dict[str, str] | None = None,
        *,
        languages: Iterable[str] = ("en",),
        chunk_ms: float = 160,
    ) -> Conversation:
        context = Context(
            session="ab12",
            bundle="tiny",
            languages=tuple(languages),
            chunks_ms=tiny.bundle.chunks_ms,
            now=1_700_000_000.0,
        )
        handshake = Handshake.parse(target, headers or {})
        return Conversation(kind(handshake, context), tiny, chunk_ms=chunk_ms)

    return run


SPEECH = [(0, 0.3), (1, 0.4), (2, 0.3), (0, 0.1), (3, 0.5), (4, 0.3), (0, 1.2), (5, 0.4), (7, 0.4)]


@pytest.fixture(scope="session")
def s16(tones: Callable[..., NDArray[np.float32]]) -> Callable[[int], bytes]:
    """Speech of two segments, as 16-bit samples of this rate."""

    def make(sample_rate: int = 16000) -> bytes:
        pcm = tones(SPEECH, sample_rate=sample_rate)
        return np.round(pcm * 32767).astype("<i2").tobytes()

    return make


@pytest.fixture(scope="session")
def texts(tiny: Recognizer, s16: Callable[[int], bytes]) -> Callable[[int], list[str]]:
    """What the recogniser makes of that speech on its own: the text of every final."""

    def transcribe(sample_rate: int = 16000) -> list[str]:
        pcm = np.frombuffer(s16(sample_rate), "<i2")
        return [final.text for final in tiny.transcribe(pcm, sample_rate, chunk_ms=160)]

    return transcribe
