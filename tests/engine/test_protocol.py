"""The wire protocol with plain values: no socket, no recogniser."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loquent.engine.errors import AudioError, BundleError, ConfigError
from loquent.engine.events import Ended, Event, Final, Finalized, Partial, Word
from loquent.engine.hotwords import Hotword
from loquent.engine.protocol import (
    CLOSE_CODES,
    END,
    FINALIZE,
    MAX_MESSAGE,
    Audio,
    End,
    Finalize,
    Progress,
    Ready,
    SetHotwords,
    Start,
    WireError,
    as_wire_error,
    decode_message,
    encode_event,
)
from loquent.engine.wire.conversation import TRANSITIONS, ServerProtocol, Signal, State

START = Start(sample_rate=16000, chunk_ms=320)
WORDS = (
    Word(text="good", start=0.12, end=0.4, confidence=0.9),
    Word(text="mörning", start=0.44, end=0.8, confidence=0.25),
)
PARTIAL = Partial(
    segment=3, start=0.12, end=0.8, committed="good", tentative="mörning", words=WORDS
)
FINAL = Final(segment=3, start=0.12, end=0.8, text="good mörning", words=WORDS, reason="endpoint")
FINALIZED = Finalized(position=1.5)
ENDED = Ended(duration=2.5, segments=4)
PROGRESS = Progress(received=1.5, processed=1.28)


def started(start: Start = START) -> ServerProtocol:
    protocol = ServerProtocol(languages=["en"])
    assert protocol.receive(start.encode()) == start
    return protocol


def failure(protocol: ServerProtocol, message: str | bytes) -> WireError:
    with pytest.raises(WireError) as caught:
        protocol.receive(message)
    text, close_code = protocol.error(caught.value)
    assert protocol.state is State.FAILED
    sent = json.loads(text)
    assert sent == {"type": "error", "code": caught.value.code, "message": str(caught.value)}
    assert close_code == CLOSE_CODES[caught.value.code]
    return caught.value


def test_a_whole_session() -> None:
    protocol = ServerProtocol()
    states = [protocol.state]
    assert protocol.receive(START.encode()) == START
    states.append(protocol.state)
    audio = protocol.receive(b"\x01\x00\xff\xff")
    states.append(protocol.state)
    assert isinstance(audio, Audio)
    assert audio.pcm.tolist() == [1, -1]
    assert protocol.receive(END) == End()
    states.append(protocol.state)
    assert json.loads(protocol.event(FINAL, PROGRESS))["text"] == "good mörning"
    assert json.loads(protocol.event(ENDED, PROGRESS))["type"] == "ended"
    states.append(protocol.state)
    assert states == [
        State.NEW,
        State.CONFIGURED,
        State.STREAMING,
        State.DRAINING,
        State.CLOSED,
    ]


def test_a_session_without_audio_ends_too() -> None:
    protocol = started()
    assert protocol.receive(END) == End()
    protocol.event(Ended(duration=0.0, segments=0), PROGRESS)
    assert protocol.state is State.CLOSED


def test_the_table_names_every_state_and_leads_only_to_such() -> None:
    assert set(TRANSITIONS) == set(State)
    for state, moves in TRANSITIONS.items():
        assert set(moves.values()) <= set(State)
        over = state in (State.CLOSED, State.FAILED)
        assert (moves == {}) == over
        assert over or {Signal.ERROR, Signal.LOST} <= set(moves)


MESSAGES: dict[Signal, str | bytes] = {
    Signal.START: START.encode(),
    Signal.AUDIO: b"\0\0",
    Signal.FINALIZE: FINALIZE,
    Signal.END: END,
}


def brought_to(state: State) -> ServerProtocol:
    protocol = ServerProtocol()
    way: dict[State, list[Signal]] = {
        State.NEW: [],
        State.CONFIGURED: [Signal.START],
        State.STREAMING: [Signal.START, Signal.AUDIO],
        State.DRAINING: [Signal.START, Signal.AUDIO, Signal.END],
        State.CLOSED: [Signal.START, Signal.END],
        State.FAILED: [],
    }
    for signal in way[state]:
        protocol.receive(MESSAGES[signal])
    if state is State.CLOSED:
        protocol.event(ENDED, PROGRESS)
    if state is State.FAILED:
        protocol.error(WireError("idle", "too long"))
    assert protocol.state is state
    return protocol


@pytest.mark.parametrize("signal", MESSAGES, ids=lambda signal: signal.value)
@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
def test_every_message_in_every_state(state: State, signal: Signal) -> None:
    protocol = brought_to(state)
    if signal in TRANSITIONS[state]:
        protocol.receive(MESSAGES[signal])
        assert protocol.state is TRANSITIONS[state][signal]
    else:
        with pytest.raises(WireError, match=f"got {signal.value} while .* {state.value}") as caught:
            protocol.receive(MESSAGES[signal])
        assert caught.value.code == "bad_type"
        assert protocol.state is state


@pytest.mark.parametrize("encoding", ["s16le", "f32le"])
@given(data=st.data())
def test_packets_may_end_inside_a_sample(encoding: str, data: st.DataObject) -> None:
    dtype = {"s16le": "<i2", "f32le": "<f4"}[encoding]
    sent = np.arange(40, dtype=dtype).tobytes()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=12)))
    protocol = started(Start(sample_rate=16000, encoding=encoding))  # type: ignore[arg-type]
    heard = []
    for begin, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        audio = protocol.receive(sent[begin:end])
        assert isinstance(audio, Audio)
        heard.append(audio.pcm)
    assert np.concatenate(heard).tolist() == list(range(40))


def test_a_broken_last_sample_is_not_heard() -> None:
    protocol = started()
    audio = protocol.receive(b"\x05\x00\x06")
    assert isinstance(audio, Audio)
    assert audio.pcm.tolist() == [5]
    assert protocol.receive(END) == End()


@pytest.mark.parametrize(
    ("message", "code", "said"),
    [
        ("hello", "bad_json", "expected JSON"),
        ("", "bad_json", "expected JSON"),
        ('{"type": "start"', "bad_json", "expected JSON"),
        ("[" * 100_000, "bad_json", "expected JSON"),
        ("[1, 2]", "bad_json", "expected an object"),
        ("null", "bad_json", "expected an object"),
        ("{}", "bad_type", "None"),
        ('{"type": "stop"}', "bad_type", "'stop'"),
        ('{"type": ["start"]}', "bad_type", "start"),
        (b"\0\0", "bad_type", "audio while the session is new, expected start"),
        (END, "bad_type", "end while the session is new"),
        ('{"type": "start"}', "bad_config", "sample_rate"),
        ('{"type": "start", "sample_rate": "16000"}', "bad_config", "'16000'"),
        ('{"type": "start", "sample_rate": true}', "bad_config", "True"),
        ('{"type": "start", "sample_rate": null}', "bad_config", "None"),
        ('{"type": "start", "sample_rate": 16000.5}', "bad_config", "16000.5"),
        ('{"type": "start", "sample_rate": 16000, "chunkms": 80}', "bad_config", "'chunkms'"),
        ('{"type": "start", "sample_rate": 16000, "chunk_ms": "80"}', "bad_config", "'80'"),
        ('{"type": "start", "sample_rate": 16000, "lm_weight": "1"}', "bad_config", "a number"),
        ('{"type": "start", "sample_rate": 16000, "encoding": "mp3"}', "bad_config", "s16le"),
        ('{"type": "start", "sample_rate": 16000, "encoding": 16}', "bad_config", "a string"),
        ('{"type": "start", "sample_rate": 16000, "language": "xx"}', "bad_config", "has en"),
        (b"\0" * (MAX_MESSAGE + 1), "too_big", str(MAX_MESSAGE)),
        (" " * (MAX_MESSAGE + 1), "too_big", str(MAX_MESSAGE)),
    ],
)
def test_mistakes_are_told(message: str | bytes, code: str, said: str) -> None:
    error = failure(ServerProtocol(languages=["en"]), message)
    assert error.code == code
    assert said in str(error)
    assert len(str(error)) < 400


def test_every_code_has_a_close_code() -> None:
    assert set(CLOSE_CODES.values()) <= {1002, 1003, 1008, 1009, 1011, 1013}
    assert len(CLOSE_CODES) == 11


def test_other_failures_are_translated_and_bugs_stay_inside() -> None:
    assert as_wire_error(ConfigError("chunk_ms 50")).code == "bad_config"
    assert as_wire_error(AudioError("nan")).code == "bad_audio"
    for error in (BundleError("/secret/path"), ZeroDivisionError("secret")):
        told = as_wire_error(error)
        assert told.code == "internal"
        assert "secret" not in str(told)


def test_an_error_after_the_end_changes_nothing() -> None:
    protocol = brought_to(State.CLOSED)
    protocol.error(WireError("internal", "late"))
    protocol.lost()
    protocol.end("stopping")
    assert protocol.state is State.CLOSED


def test_the_server_may_end_or_lose_a_session() -> None:
    protocol = brought_to(State.STREAMING)
    states = []
    protocol.end("idle")
    states.append(protocol.state)
    assert json.loads(said := protocol.event(ENDED, PROGRESS))["reason"] == "idle"
    assert decode_message(said)[0] == dataclasses.replace(ENDED, reason="idle")
    states.append(protocol.state)
    assert states == [State.DRAINING, State.CLOSED]
    protocol = brought_to(State.STREAMING)
    protocol.lost()
    assert protocol.state is State.CLOSED


@pytest.mark.parametrize(
    "event", [PARTIAL, FINAL, FINALIZED, ENDED], ids=lambda event: type(event).__name__
)
def test_events_survive_the_wire(event: Event) -> None:
    decoded, progress = decode_message(encode_event(event, PROGRESS))
    assert decoded == event
    assert progress == (None if event is ENDED else PROGRESS)


HOTWORDS = (Hotword(phrase="New York", boost=2.0), Hotword(phrase="Loquent"))


def test_hotwords_on_the_wire() -> None:
    start = Start(sample_rate=16000, hotwords=HOTWORDS)
    protocol = started(start)
    assert json.loads(start.encode())["hotwords"][0] == {"phrase": "New York", "boost": 2.0}
    said = SetHotwords(hotwords=HOTWORDS)
    assert protocol.receive(said.encode()) == said
    assert protocol.state is State.CONFIGURED
    protocol.receive(b"\0\0")
    short = '{"type": "hotwords", "hotwords": ["Loquent"]}'
    assert protocol.receive(short) == SetHotwords(hotwords=HOTWORDS[1:])
    assert protocol.state is State.STREAMING
    assert protocol.receive('{"type": "hotwords", "hotwords": []}') == SetHotwords(hotwords=())


@pytest.mark.parametrize(
    ("hotwords", "said"),
    [
        ('"x"', "expected a list of phrases"),
        ("[1]", "got 1 in hotwords, expected a list of phrases"),
        ('[{"phrase": "x", "boost": "1"}]', "expected a list of phrases"),
        ('[{"phrase": "x", "boost": 100}]', "got boost 100.0 for the hotword 'x'"),
        ('[{"phrase": "x", "weight": 1}]', "expected a list of phrases"),
        ('[""]', "got an empty hotword"),
        (json.dumps(["x"] * 5001), "got 5001 hotwords, expected at most 5000"),
        (json.dumps(["x" * 100] * 1001), "100100 characters together, expected at most 100000"),
    ],
)
def test_hotwords_that_do_not_work(hotwords: str, said: str) -> None:
    for message in (
        f'{{"type": "start", "sample_rate": 16000, "hotwords": {hotwords}}}',
        f'{{"type": "hotwords", "hotwords": {hotwords}}}',
    ):
        protocol = started() if '"start"' not in message else ServerProtocol()
        error = failure(protocol, message)
        assert error.code == "bad_config"
        assert said in str(error)


def test_finalize_leaves_the_session_where_it_was() -> None:
    protocol = started()
    assert protocol.receive(FINALIZE) == Finalize()
    assert protocol.state is State.CONFIGURED
    protocol.receive(b"\0\0")
    assert protocol.receive(FINALIZE) == Finalize()
    assert protocol.state is State.STREAMING
    sent = json.loads(protocol.event(FINALIZED, PROGRESS))
    assert sent == {
        "type": "finalized",
        "position": 1.5,
        "received": 1.5,
        "processed": 1.28,
        "lag": 0.0,
        "lagging": False,
    }
    assert protocol.state is State.STREAMING


def test_the_partial_on_the_wire() -> None:
    assert json.loads(encode_event(PARTIAL, PROGRESS)) == {
        "type": "partial",
        "segment": 3,
        "start": 0.12,
        "end": 0.8,
        "committed": "good",
        "tentative": "mörning",
        "words": [
            {"text": "good", "start": 0.12, "end": 0.4, "confidence": 0.9},
            {"text": "mörning", "start": 0.44, "end": 0.8, "confidence": 0.25},
        ],
        "received": 1.5,
        "processed": 1.28,
        "lag": 0.0,
        "lagging": False,
    }


def test_ready_survives_the_wire_and_later_fields_are_left_out() -> None:
    ready = Ready(
        session="ab",
        bundle="en",
        decoder="rnnt",
        chunk_ms=320,
        latency_ms=370.0,
        sample_rate=16000,
    )
    text = ServerProtocol().ready(ready)
    assert json.loads(text)["protocol"] == 1
    assert decode_message(text) == (ready, None)
    later = json.dumps({**json.loads(text), "mood": "good"})
    assert decode_message(later) == (ready, None)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"type": "error", "code": "busy", "message": "full"}', "busy"),
        ('{"type": "error", "code": "new-code", "message": "full"}', "internal"),
        ('{"type": "partial"}', "bad_type"),
        ('{"type": "ready"}', "bad_type"),
        ('{"type": "hello"}', "bad_type"),
        ("no json", "bad_json"),
    ],
)
def test_clients_get_errors_for_what_they_cannot_use(text: str, code: str) -> None:
    with pytest.raises(WireError) as caught:
        decode_message(text)
    assert caught.value.code == code


def test_a_new_protocol_expects_start_first_with_defaults() -> None:
    protocol = ServerProtocol()
    start = protocol.receive('{"type": "start", "sample_rate": 44100}')
    assert start == Start(sample_rate=44100, encoding="s16le", chunk_ms=None, decoder=None)
