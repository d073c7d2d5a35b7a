"""The seam of the wire protocols: handshakes, dispatch, and marks in a lane."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from http import HTTPStatus

import numpy as np
import pytest
from numpy.typing import NDArray

from loquent.engine.batcher import Batcher
from loquent.engine.endpoint import EndpointRules
from loquent.engine.events import Ended, Event, Final
from loquent.engine.lane import Marked
from loquent.engine.protocol import SUBPROTOCOL
from loquent.engine.recognizer import Recognizer
from loquent.engine.wire.dispatch import PROTOCOLS, is_wire, open_session
from loquent.engine.wire.native import NativeSession
from loquent.engine.wire.session import Context, Handshake, Refused

Float32 = NDArray[np.float32]
CONTEXT = Context(session="ab", bundle="tiny")


def test_a_handshake_is_read_whole() -> None:
    handshake = Handshake.parse(
        "/v1/listen?keyterm=a&keyterm=b%20c&empty=", {"sec-websocket-protocol": "token, k1"}
    )
    assert handshake.path == "/v1/listen"
    assert handshake.query == {"keyterm": ("a", "b c"), "empty": ("",)}
    assert handshake.subprotocols == ("token", "k1")


def test_a_query_without_end_is_refused() -> None:
    with pytest.raises(Refused) as caught:
        Handshake.parse("/v1/listen?" + "a=1&" * 1000, {})
    assert caught.value.status == HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize(
    ("target", "headers"),
    [
        ("/", {"authorization": "Bearer k1"}),
        ("/", {"authorization": "token k1"}),
        ("/", {"api-key": "k1"}),
        ("/?api_key=k1", {}),
        ("/?access_token=k1", {}),
        ("/", {"sec-websocket-protocol": "token, k1"}),
        ("/", {"sec-websocket-protocol": "bearer,k1,other"}),
        ("/", {"sec-websocket-protocol": "realtime, openai-insecure-api-key.k1"}),
    ],
)
def test_credentials_are_found_wherever_they_are(target: str, headers: dict[str, str]) -> None:
    assert Handshake.parse(target, headers).credentials == ("k1",)


def test_no_credentials_are_none() -> None:
    headers = {"authorization": "Basic abc", "sec-websocket-protocol": "token"}
    assert Handshake.parse("/?token=", headers).credentials == ()


def test_the_path_chooses_the_protocol() -> None:
    assert all(map(is_wire, ["/", *PROTOCOLS]))
    assert not is_wire("/healthz")
    native = Handshake(path="/", subprotocols=(SUBPROTOCOL,))
    assert isinstance(open_session(native, CONTEXT), NativeSession)
    with pytest.raises(Refused, match="/v1/stream") as caught:
        open_session(Handshake(path="/elsewhere"), CONTEXT)
    assert caught.value.status == HTTPStatus.NOT_FOUND


def finals(events: Sequence[Event]) -> list[Final]:
    return [event for event in events if isinstance(event, Final)]


@pytest.mark.parametrize("seed", range(3))
async def test_marks_come_back_where_they_were_set(
    tiny: Recognizer, tones: Callable[..., Float32], run: Callable[..., list[Event]], seed: int
) -> None:
    """A mark stands behind exactly what the audio before it says by itself, however late read."""
    rng = random.Random(seed)
    pcm = tones([(rng.randrange(9), rng.uniform(0.05, 0.5)) for _ in range(20)])
    async with Batcher(tiny) as batcher:
        lane = batcher.add(tiny.stream(chunk_ms=160), 16000)
        marked_at = [0]
        position = 0
        while position < len(pcm):
            size = rng.randrange(1, 9000)
            await lane.feed(pcm[position : position + size])
            position += size
            marked_at.append(min(position, len(pcm)))
            await lane.mark()
        lane.finish()
        marks = iter(marked_at[1:])
        stream = tiny.stream(chunk_ms=160)
        fed = 0
        said: list[Event] = []
        while not said or not isinstance(said[-1], Ended):
            for event, progress in await lane.events():
                if not isinstance(event, Marked):
                    said.append(event)
                    continue
                upto = next(marks)
                stream.accept(pcm[fed:upto])
                fed = upto
                while stream.ready:
                    tiny.step([stream])
                assert progress.received == pytest.approx(upto / 16000)
                assert progress.processed == stream.processed
                expected = stream.events()
                assert said[-1:] == expected[-1:]  # of a segment's partials the newest is left
                assert finals(said) == finals(expected)
                said = []
        assert next(marks, None) is None


@pytest.mark.parametrize("seed", range(3))
async def test_rules_change_where_they_were_set(
    tiny: Recognizer, tones: Callable[..., Float32], run: Callable[..., list[Event]], seed: int
) -> None:
    """However far recognition had come: all audio waits when the other rules are set."""
    rng = random.Random(seed)
    pcm = tones([(1 + i % 4, 0.1) if i % 2 else (0, rng.uniform(0.3, 0.7)) for i in range(16)])
    at = rng.randrange(len(pcm) // 4, len(pcm) // 2)
    other = EndpointRules(trailing_silence=5.0)
    stream = tiny.stream(chunk_ms=80, endpoint=EndpointRules(trailing_silence=0.25))
    stream.accept(pcm[:at])
    while stream.ready:
        tiny.step([stream])
    stream.set_endpoint(other)
    expected = [*stream.events(), *run(tiny, stream, pcm[at:], [1600])]
    assert finals(expected)[0].reason == "endpoint"
    async with Batcher(tiny) as batcher:
        stream = tiny.stream(chunk_ms=80, endpoint=EndpointRules(trailing_silence=0.25))
        lane = batcher.add(stream, 16000)
        await lane.feed(pcm[:at])
        await lane.set_endpoint(other)
        await lane.feed(pcm[at:])
        lane.finish()
        said: list[Event] = []
        while not said or not isinstance(said[-1], Ended):
            said += [event for event, _ in await lane.events() if not isinstance(event, Marked)]
    assert finals(said) == finals(expected)
