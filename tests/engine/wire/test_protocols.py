"""What every protocol promises, and the odd corners of each, without sockets."""

from __future__ import annotations

import base64
import io
import json
import wave
from collections.abc import Callable, Iterator
from http import HTTPStatus
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loquent.engine.events import Ended, Final, Partial, Word
from loquent.engine.lane import Marked
from loquent.engine.protocol import END, FINALIZE, Progress, SetEndpoint, WireError
from loquent.engine.recognizer import Recognizer
from loquent.engine.wire.deepgram import DeepgramSession
from loquent.engine.wire.dispatch import PROTOCOLS
from loquent.engine.wire.native import NativeSession
from loquent.engine.wire.openai import OpenAiSession
from loquent.engine.wire.session import Context, Handshake, Mark, Refused
from loquent.engine.wire.sherpa import SherpaSession
from loquent.engine.wire.vosk import VoskSession

S16 = Callable[..., bytes]
Texts = Callable[..., list[str]]
LISTEN = "/v1/listen?encoding=linear16&sample_rate=16000"
NO_TURNS = json.dumps(
    {"type": "session.update", "session": {"audio": {"input": {"turn_detection": None}}}}
)
FINISH = '{"type": "CloseStream"}'
COMMIT = '{"type": "input_audio_buffer.commit"}'
DELTA = "conversation.item.input_audio_transcription.delta"
COMPLETED = "conversation.item.input_audio_transcription.completed"


def append(data: bytes) -> str:
    audio = base64.b64encode(data).decode()
    return json.dumps({"type": "input_audio_buffer.append", "audio": audio})


def packets(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """The data cut at these places; nothing is left out, packets may be empty."""
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return (data[a:b] for a, b in pairwise(bounds))


def of_type(messages: list[Any], kind: str) -> list[Any]:
    return [message for message in messages if message["type"] == kind]


# Any split of the audio into messages gives the same finals.


def vosk(talk: Any, parts: list[bytes]) -> object:
    talking = talk(VoskSession, "/vosk")
    talking.say('{"config": {"sample_rate": 16000}}', *parts, '{"eof": 1}')
    assert len(talking.sent) == len(parts) + 1  # exactly one answer for each
    results = [message for message in talking.sent if "text" in message]
    return [word for result in results for word in result.get("result", [])]


def sherpa(talk: Any, parts: list[bytes]) -> object:
    talking = talk(SherpaSession, "/sherpa")
    talking.say(*parts, "Done")
    assert talking.sent.pop() == "Done!"
    return [(m["segment"], m["text"], m["timestamps"]) for m in talking.sent if m["is_final"]]


def deepgram(talk: Any, parts: list[bytes]) -> object:
    talking = talk(DeepgramSession, LISTEN + "&interim_results=true&utterance_end_ms=1000")
    talking.say(*(part for part in parts if part), FINISH)
    metadata = talking.sent[-1]
    assert metadata["type"] == "Metadata"
    finals = [m for m in of_type(talking.sent, "Results") if m["is_final"]]
    end = 0.0
    for final in finals:  # one behind the other, without a gap
        assert final["start"] == pytest.approx(end, abs=2e-3)
        end = final["start"] + final["duration"]
    assert end == pytest.approx(metadata["duration"], abs=2e-3)
    return [finals, metadata["sha256"]]


def openai(talk: Any, parts: list[bytes], *first: str) -> object:
    talking = talk(OpenAiSession, "/v1/realtime")
    talking.say(*first, *map(append, parts), COMMIT)
    said: dict[str, str] = {}
    for message in of_type(talking.sent, DELTA):
        said[message["item_id"]] = said.get(message["item_id"], "") + message["delta"]
    completed = of_type(talking.sent, COMPLETED)
    for message in completed:  # deltas only ever add, and end as the transcript
        assert said.get(message["item_id"], "") == message["transcript"]
    return [message["transcript"] for message in completed]


def openai_commits(talk: Any, parts: list[bytes]) -> object:
    return openai(talk, parts, NO_TURNS)


SPLITS: dict[str, Any] = {
    "vosk": vosk,
    "sherpa": sherpa,
    "deepgram": deepgram,
    "openai": openai,
    "openai_commits": openai_commits,
}


@pytest.mark.parametrize("name", SPLITS)
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 3 * 24000 * 4), max_size=12))
def test_any_split_gives_the_same_finals(
    talk: Any, s16: S16, texts: Texts, name: str, cuts: list[int]
) -> None:
    rate = 24000 if name.startswith("openai") else 16000
    data = s16(rate)
    if name == "sherpa":
        data = (np.frombuffer(data, "<i2") / 32768).astype("<f4").tobytes()
    heard = SPLITS[name](talk, list(packets(data, cuts)))
    assert heard == SPLITS[name](talk, [data])
    text = json.dumps(heard)
    for word in " ".join(texts(rate)).split():
        assert word in text


def test_transcripts_are_those_of_the_recogniser(talk: Any, s16: S16, texts: Texts) -> None:
    data = s16(16000)
    floats = (np.frombuffer(data, "<i2") / 32768).astype("<f4").tobytes()
    expected = texts(16000)
    assert " ".join(w["word"] for w in vosk(talk, [data])) == " ".join(expected)  # type: ignore[attr-defined]
    assert [text for _, text, _ in sherpa(talk, [floats])] == expected  # type: ignore[attr-defined]
    finals = deepgram(talk, [data])[0]  # type: ignore[index]
    assert [f["channel"]["alternatives"][0]["transcript"] for f in finals] == expected
    assert openai(talk, [s16(24000)]) == texts(24000)
    assert openai_commits(talk, [s16(24000)]) == [" ".join(texts(24000))]


# Nothing that a client says may end in anything but a message or a close code.

SENT = st.sampled_from(
    [
        *('{"type": "start", "sample_rate": 16000}', FINALIZE, END, "Done", '{"eof": 1}'),
        *('{"reset": 1}', '{"config": {"sample_rate": "16000"}}', '{"config": {"words": [1]}}'),
        *('{"config": 3}', '{"config": {"sample_rate": 1e300}}', '{"type": "KeepAlive"}', FINISH),
        *('{"type": "Finalize"}', '{"type": ["Finalize"]}', '{"type": "Configure"}', NO_TURNS),
        *(COMMIT, '{"type": "input_audio_buffer.clear"}', append(bytes(9601)), append(b"")),
        '{"type": "input_audio_buffer.append", "audio": "%"}',
        '{"type": "input_audio_buffer.append", "audio": 5}',
        '{"type": "session.update", "session": {"audio": {"input": {"format": {"type": []}}}}}',
        '{"type": "session.update", "session": {"turn_detection": {"type": {}}}}',
        '{"type": "session.update", "session": [], "event_id": {}}',
        *("", "null", "{}", "\0", "[" * 5000, b"", b"\0", bytes(6400), b"\xff" * 4001),
    ]
) | st.text(max_size=20)


@pytest.mark.parametrize("path", PROTOCOLS)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(SENT | st.binary(max_size=100), max_size=8))
def test_any_messages_are_answered_or_refused(
    talk: Any, path: str, messages: list[str | bytes]
) -> None:
    target = LISTEN if path == "/v1/listen" else path
    talking = talk(PROTOCOLS[path], target)
    talking.say(*messages)
    if talking.close is None:
        talking.do(talking.session.end(None))
    assert talking.close is not None
    assert talking.close.code in (1000, 1002, 1003, 1008)
    # Nobody is told of a failure of ours, as there is none.
    assert "the server failed" not in json.dumps([*talking.sent, talking.close.reason])


@pytest.mark.parametrize("path", [path for path in PROTOCOLS if path != "/v1/stream"])
@pytest.mark.parametrize("audio", [True, False])
def test_a_client_that_falls_silent(talk: Any, s16: S16, path: str, audio: bool) -> None:
    """What was heard is told, then the reason, then the close code."""
    target = LISTEN if path == "/v1/listen" else path
    talking = talk(PROTOCOLS[path], target)
    data = s16(24000 if path == "/v1/realtime" else 16000)
    if path == "/vosk":
        talking.say('{"config": {"sample_rate": 16000}}')
    if path == "/sherpa":
        data = (np.frombuffer(data, "<i2") / 32768).astype("<f4").tobytes()
    if audio:
        talking.say(append(data) if path == "/v1/realtime" else data)
    talking.do(talking.session.end(WireError("idle", "got nothing")))
    assert talking.close is not None
    assert talking.close.code == (1011 if path == "/v1/listen" else 1008)
    assert "got nothing" in talking.close.reason
    assert ("solo" in json.dumps(talking.sent)) == audio


@pytest.mark.parametrize(
    ("kind", "done"),
    [(VoskSession, '{"eof": 1}'), (SherpaSession, "Done"), (DeepgramSession, FINISH)],
)
def test_what_comes_behind_the_end_is_ignored(kind: Any, done: str) -> None:
    """The result of what came before is still to be sent."""
    session = kind(Handshake.parse(LISTEN, {}), Context(session="s", bundle="b"))
    session.connected()
    session.receive(bytes(800))
    session.receive(done)
    for late in (bytes(800), b"\0", done, "hello", '{"reset": 1}'):
        assert list(session.receive(late)) == []
    *said, close = session.event(Ended(duration=1.0, segments=0), Progress(received=1, processed=1))
    assert said
    assert close.code == 1000


# Vosk.


def test_vosk_messages_before_any_audio(talk: Any) -> None:
    talking = talk(VoskSession, "/vosk")
    assert talking.say('{"reset" : 1}') == [{"text": ""}]
    assert talking.say('{"eof" : 1}') == [{"text": ""}]
    assert talking.close.code == 1000


def test_vosk_listens_at_8_khz_unless_told(talk: Any, s16: S16, texts: Texts) -> None:
    talking = talk(VoskSession, "/")
    [answer] = talking.say(s16(8000))
    [last] = talking.say('{"eof" : 1}')
    assert [answer["text"], last["text"]] == texts(8000)


def test_vosk_reset_flushes_and_goes_on(talk: Any, s16: S16) -> None:
    talking = talk(VoskSession, "/")
    data = s16(8000)
    assert "partial" in talking.say(data[:14400])[0]
    assert talking.say('{"reset": 1}')[0]["text"] == "bana bana"
    assert talking.close is None
    assert talking.say(data[14400:])[0]["text"]
    assert talking.say('{"eof": 1}')[0]["text"] == "solo"


@pytest.mark.parametrize(
    ("message", "code", "said"),
    [
        ("hello", 1003, "eof"),
        ('{"config": {"sample_rate": "loud"}}', 1008, "sample_rate"),
        ('{"config": {"sample_rate": 48000.5}}', 1008, "sample_rate"),
        ('{"config": {"sample_rate": true}}', 1008, "sample_rate"),
        ('{"config": []}', 1008, "object"),
        ("{}", 1002, "config"),
    ],
)
def test_vosk_mistakes_close(talk: Any, message: str, code: int, said: str) -> None:
    talking = talk(VoskSession, "/vosk")
    assert talking.say(message) == []
    assert talking.close.code == code
    assert said in talking.close.reason


def test_vosk_rate_cannot_change_after_audio(talk: Any) -> None:
    talking = talk(VoskSession, "/vosk")
    talking.say(bytes(800), '{"config": {"words": false, "sample_rate": 8000.0}}')
    assert talking.close is None
    talking.say('{"config": {"sample_rate": 16000}}')
    assert talking.close.code == 1008


# sherpa-onnx.


def test_sherpa_repeats_its_last_segment_at_the_end(talk: Any, tones: Any) -> None:
    """Clients show their last message as the result, whatever silence came after the speech."""
    talking = talk(SherpaSession, "/sherpa")
    pcm = tones([(1, 0.4), (0, 2.0)])
    messages = talking.say(pcm.astype("<f4").tobytes(), "Done")
    final, last, done = messages[-3:]
    assert final["is_final"]
    assert not final["is_eof"]
    assert last == {**final, "is_eof": True}
    assert done == "Done!"


def test_sherpa_sends_its_page_nothing_that_is_no_json(talk: Any) -> None:
    talking = talk(SherpaSession, "/sherpa", {"origin": "http://127.0.0.1:6006"})
    [last] = talking.say("Done")
    assert (last["text"], last["is_eof"], talking.close.code) == ("", True, 1000)


# Deepgram.


def listen(talk: Any, query: str, **headers: str) -> Any:
    return talk(DeepgramSession, f"/v1/listen?{query}", headers)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("encoding=opus", "linear16"),
        ("encoding=linear16&sample_rate=loud", "sample_rate"),
        ("encoding=linear16&sample_rate=4000", "8000 to 48000"),
        ("encoding=linear16&sample_rate=%C2%B2", "sample_rate"),
        ("encoding=linear16&channels=0", "channels"),
        ("interim_results=yes", "true or false"),
        ("utterance_end_ms=1000", "interim_results=true"),
        ("endpointing=soon", "endpointing"),
        ("language=fr", "this server has en"),
    ],
)
def test_deepgram_refuses_what_it_cannot_do(talk: Any, query: str, said: str) -> None:
    with pytest.raises(Refused, match=said) as caught:
        listen(talk, query)
    assert caught.value.status == HTTPStatus.BAD_REQUEST
    assert caught.value.headers["dg-error"].isascii()
    assert caught.value.headers["dg-request-id"] == "ab12"


def test_deepgram_reports_what_it_ignores(talk: Any) -> None:
    talking = listen(
        talk, "encoding=linear16&language=en-US&diarize=true&dictation=true&model=nova-3"
    )
    [_, metadata] = talking.say(FINISH)
    assert [w["parameter"] for w in metadata["warnings"]] == ["diarize", "dictation"]


def test_deepgram_keyterms_are_hotwords(talk: Any) -> None:
    context = Context(session="s", bundle="b")
    handshake = Handshake.parse(f"{LISTEN}&keyterm=New%20York&keywords=Ada:2", {})
    session = DeepgramSession(handshake, context)
    [opening] = session.connected()
    phrases = [word.phrase for word in opening.start.hotwords]  # type: ignore[union-attr]
    assert phrases == ["New York", "Ada"]
    success, change = session.receive('{"type": "Configure", "keyterms": ["Bob"]}')
    assert json.loads(success.text)["type"] == "ConfigureSuccess"  # type: ignore[union-attr]
    assert [word.phrase for word in change.hotwords] == ["Bob"]  # type: ignore[union-attr]
    for keyterms in ([3], [""], "Bob", None, ["x"] * 6000):
        message = json.dumps({"type": "Configure", "keyterms": keyterms})
        [failure] = session.receive(message)
        assert json.loads(failure.text)["type"] == "ConfigureFailure"  # type: ignore[union-attr]


@pytest.mark.parametrize("offered", ["token, key", "bearer, key, x-deepgram-session-id, 7"])
def test_deepgram_takes_the_subprotocol_that_carries_a_key(talk: Any, offered: str) -> None:
    talking = listen(talk, "", **{"sec-websocket-protocol": offered})
    assert talking.session.subprotocol == offered.split(",")[0]
    assert talking.session.headers == {"dg-request-id": "ab12"}


@pytest.mark.parametrize("size", [1, 50, 100_000])
def test_deepgram_reads_a_wav_file(talk: Any, s16: S16, texts: Texts, size: int) -> None:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(s16(16000)[: 2 * 16000])
    data = buffer.getvalue()
    talking = listen(talk, "")
    first = data[:200]
    talking.say(*(first[at : at + size] for at in range(0, len(first), size)), data[200:], FINISH)
    [result] = of_type(talking.sent, "Results")
    assert result["channel"]["alternatives"][0]["transcript"] == "bana bana"


def test_deepgram_says_what_it_cannot_read(talk: Any) -> None:
    talking = listen(talk, "")
    talking.say(b"OggS" + bytes(100))
    assert talking.close.code == 1008
    assert talking.close.reason.startswith("DATA-0000")
    assert "encoding=linear16" in talking.close.reason


def test_deepgram_finalize_and_close_before_a_wav_file(talk: Any) -> None:
    talking = listen(talk, "")
    [flushed] = talking.say('{"type": "Finalize"}')
    assert (flushed["from_finalize"], flushed["duration"]) == (True, 0.0)
    [metadata] = talking.say(b"")  # the old way to close
    assert metadata["duration"] == 0
    assert talking.close.code == 1000


def test_deepgram_speech_final_comes_after_the_silence_that_was_asked_for(
    talk: Any, s16: S16
) -> None:
    def finals(query: str) -> list[Any]:
        talking = listen(talk, f"encoding=linear16&{query}")
        talking.say(s16(16000), FINISH)
        return [m["speech_final"] for m in of_type(talking.sent, "Results")]

    assert finals("endpointing=800") == [True, True]
    assert finals("endpointing=false") == [True]  # only the end ends it
    assert len(finals("endpointing=200")) > 2


UTTERANCES = [(0, 0.2), (1, 0.1), (0, 5.0), (3, 0.1), (4, 0.1), (0, 1.6), (5, 0.1), (0, 2.0)]


@pytest.mark.parametrize("packet", [0.02, 0.1, 0.5, 60.0])
@pytest.mark.parametrize(
    ("endpointing", "expected"),
    [
        ("false", "... ba. END ... kiwi. END ... so. END !"),
        ("3000", "... ba. END ! ... kiwi. END ... so. END !"),
        ("300", "... ba! END ... kiwi! END ... so! END ."),
    ],
)
def test_deepgram_utterances_end_with_or_without_an_endpoint(
    talk: Any, tones: Any, endpointing: str, expected: str, packet: float
) -> None:
    """Words are final (.), then the utterance ends, then more is heard, however fast it comes.

    With an exclamation mark it is speech_final: after the silence that was asked for.
    """
    data = np.round(tones(UTTERANCES) * 32767).astype("<i2").tobytes()
    options = f"interim_results=true&utterance_end_ms=1000&endpointing={endpointing}"
    talking = listen(talk, f"encoding=linear16&{options}")
    talking.say(*packets(data, [round(i * packet * 32000) for i in range(1, 600)]), FINISH)
    said: list[str] = []
    word_end = 0.0
    for message in talking.sent[:-1]:
        if message["type"] == "UtteranceEnd":
            assert message["last_word_end"] == word_end
            said.append("END")
            continue
        [alternative] = message["channel"]["alternatives"]
        if not message["is_final"]:
            said += ["..."] if said[-1:] != ["..."] else []
            continue
        said.append(alternative["transcript"] + ("!" if message["speech_final"] else "."))
        word_end = alternative["words"][-1]["end"] if alternative["words"] else word_end
    assert " ".join(said) == expected


def test_deepgram_interim_words_that_are_taken_back_end_no_utterance() -> None:
    target = f"{LISTEN}&interim_results=true&utterance_end_ms=1000"
    session = DeepgramSession(Handshake.parse(target, {}), Context(session="s", bundle="b"))

    def kinds(event: Any, now: float) -> list[str]:
        actions = session.event(event, Progress(received=now, processed=now))
        messages = [json.loads(action.text) for action in actions]  # type: ignore[union-attr]
        return [f"{m.get('last_word_end', '')}" if m["type"] != "Results" else "" for m in messages]

    words = (Word(text="ba", start=0.5, end=1.0),)
    about: dict[str, Any] = {"start": 0.5, "end": 1.0, "words": words}
    session.event(
        Final(segment=0, text="ba", reason="endpoint", **about), Progress(received=1, processed=1)
    )
    about = {"segment": 1, "start": 1.6, "committed": ""}
    wrong = (Word(text="na", start=1.6, end=1.7),)
    assert kinds(Partial(end=1.7, tentative="na", words=wrong, **about), 1.9) == [""]
    assert kinds(Marked(), 2.1) == []
    assert kinds(Partial(end=1.6, tentative="", words=(), **about), 2.2) == [""]
    assert kinds(Marked(), 2.3) == ["1.0"]
    assert kinds(Marked(), 2.4) == []


def test_deepgram_words_of_all_alternatives_lie_in_their_result(talk: Any, s16: S16) -> None:
    talking = listen(talk, "encoding=linear16&interim_results=true&smart_format=true")
    talking.say(s16(16000)[:90_000], '{"type": "Finalize"}', s16(16000)[90_000:], FINISH)
    results = of_type(talking.sent, "Results")
    assert sum(result["from_finalize"] for result in results) == 1
    for result in results:
        [alternative] = result["channel"]["alternatives"]
        assert [w["punctuated_word"] for w in alternative["words"]] == alternative[
            "transcript"
        ].split()
        for word in alternative["words"]:
            assert result["start"] <= word["start"] <= word["end"] + 1e-3
            assert word["end"] <= result["start"] + result["duration"] + 2e-3
            assert 0 < word["confidence"] <= 1


# OpenAI.


def update(**fields: Any) -> str:
    return json.dumps({"type": "session.update", "event_id": "e1", "session": fields})


@pytest.mark.parametrize(
    ("session", "param"),
    [
        ({"audio": {"input": {"format": {"type": "audio/opus"}}}}, "format"),
        ({"audio": {"input": {"format": {"type": "audio/pcm", "rate": 1}}}}, "rate"),
        ({"audio": {"input": {"transcription": {"language": "fr"}}}}, "language"),
        ({"audio": {"input": {"transcription": {"delay": "none"}}}}, "delay"),
        ({"audio": {"input": {"turn_detection": {"type": "push"}}}}, "turn_detection"),
        (
            {"audio": {"input": {"turn_detection": {"silence_duration_ms": "1"}}}},
            "silence_duration_ms",
        ),
        ({"turn_detection": {"type": "semantic_vad", "eagerness": 1}}, "eagerness"),
        ({"audio": 3}, "audio"),
        ({"input_audio_format": "mp3"}, "format"),
    ],
)
def test_openai_settings_that_cannot_be_met(talk: Any, session: Any, param: str) -> None:
    talking = talk(OpenAiSession, "/v1/realtime")
    [error] = talking.say(update(**session))
    assert error["type"] == "error"
    about = error["error"]
    assert (about["type"], about["param"], about["event_id"]) == (
        "invalid_request_error",
        param,
        "e1",
    )
    [updated] = talking.say(update())  # it goes on as it was
    assert updated["session"]["audio"] == talking.sent[0]["session"]["audio"]


def test_openai_reports_what_it_ignores(talk: Any) -> None:
    talking = talk(OpenAiSession, "/v1/realtime")
    [updated] = talking.say(update(voice="alloy", audio={"output": {}, "input": {"gain": 1}}))
    assert updated["session"]["unsupported"] == ["audio.input.gain", "voice"]


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("audio/pcmu", "ULAW"), ("g711_ulaw", "ULAW"), ("audio/pcma", "ALAW"), ("g711_alaw", "ALAW")],
)
def test_openai_telephone_audio(
    talk: Any, tiny: Recognizer, s16: S16, kind: str, subtype: str
) -> None:
    buffer = io.BytesIO()
    pcm = np.frombuffer(s16(8000), "<i2")
    soundfile.write(buffer, pcm, 8000, format="RAW", subtype=subtype)
    raw = {"format": "RAW", "subtype": subtype, "channels": 1, "samplerate": 8000}
    heard = soundfile.read(io.BytesIO(buffer.getvalue()), dtype="int16", **raw)[0]
    expected = [final.text for final in tiny.transcribe(heard, 8000, chunk_ms=160)]
    talking = talk(OpenAiSession, "/v1/realtime")
    talking.say(
        update(input_audio_format=kind)
        if kind.startswith("g711")
        else update(audio={"input": {"format": {"type": kind}}}),
        append(buffer.getvalue()),
        COMMIT,
    )
    assert [m["transcript"] for m in of_type(talking.sent, COMPLETED)] == expected


def test_openai_commits_and_clears(talk: Any, s16: S16) -> None:
    """Every commit gets its own item, in order; what was cleared is never heard of."""
    data = s16(24000)
    second = 48000
    talking = talk(OpenAiSession, "/v1/realtime")
    talking.say(NO_TURNS, append(data[:second]), COMMIT, append(data[second : 2 * second]))
    talking.say('{"type": "input_audio_buffer.clear"}', append(data[3 * second :]), COMMIT)
    committed = of_type(talking.sent, "input_audio_buffer.committed")
    completed = of_type(talking.sent, COMPLETED)
    assert [m["item_id"] for m in committed] == [m["item_id"] for m in completed]
    assert [m["previous_item_id"] for m in committed] == [None, committed[0]["item_id"]]
    assert completed[0]["transcript"].startswith("bana bana")
    assert completed[1]["transcript"] == "solo"
    assert sum(m["usage"]["seconds"] for m in completed) == pytest.approx(1.9, abs=0.01)
    assert len(of_type(talking.sent, "input_audio_buffer.cleared")) == 1


def test_openai_event_ids_are_never_the_same(talk: Any, s16: S16) -> None:
    talking = talk(OpenAiSession, "/v1/realtime")
    talking.say(append(s16(24000)), COMMIT, "x", COMMIT)
    ids = [message["event_id"] for message in talking.sent]
    assert len(set(ids)) == len(ids) > 8


def test_openai_tells_of_items_that_failed(talk: Any) -> None:
    talking = talk(OpenAiSession, "/v1/realtime")
    talking.session.receive(append(bytes(48000)))
    talking.session.receive(COMMIT)
    failed, error = talking.do(talking.session.error(RuntimeError("secret")))
    assert failed["type"] == "conversation.item.input_audio_transcription.failed"
    assert error["error"]["type"] == "server_error"
    assert talking.close.code == 1011
    assert "secret" not in json.dumps(talking.sent)


def detect(**fields: Any) -> str:
    return update(audio={"input": {"turn_detection": fields or None}})


def test_openai_turn_detection_may_change_between_appends(talk: Any, tones: Any) -> None:
    """From push-to-talk to hands-free and back: what an answer says is in force from there on."""

    def say(*story: tuple[int, float]) -> list[str]:
        pcm = np.round(tones(story, sample_rate=24000) * 32767).astype("<i2").tobytes()
        said = talking.say(*map(append, packets(pcm, list(range(0, len(pcm), 9600)))))
        return [m["transcript"] for m in of_type(said, COMPLETED)]

    talking = talk(OpenAiSession, "/v1/realtime")
    talking.say(detect())
    assert say((0, 0.2), (1, 0.1), (0, 1.2)) == []
    [updated] = talking.say(detect(type="server_vad", silence_duration_ms=2000))
    about = updated["session"]["audio"]["input"]["turn_detection"]
    assert (about["type"], about["silence_duration_ms"]) == ("server_vad", 2000)
    assert say((3, 0.1), (4, 0.1), (0, 1.2), (5, 0.1), (0, 1.2)) == []
    assert say((0, 1.5)) == ["ba kiwi so"]
    talking.say(detect(type="server_vad", silence_duration_ms=300))
    assert say((1, 0.1), (0, 0.8), (3, 0.1), (0, 0.8)) == ["ba", "ki"]
    assert len(of_type(talking.sent, "input_audio_buffer.speech_started")) == 3
    talking.say(detect())
    assert say((5, 0.1), (0, 3.0)) == []
    assert [m["transcript"] for m in of_type(talking.say(COMMIT), COMPLETED)] == ["so"]


def test_openai_turns_are_those_of_the_settings_before_the_audio() -> None:
    """However late they are recognised."""
    session = OpenAiSession(Handshake(path="/v1/realtime"), Context(session="s", bundle="b"))
    now = Progress(received=9.0, processed=9.0)

    def final(segment: int) -> list[str]:
        words = (Word(text="ba", start=segment + 0.0, end=segment + 0.5),)
        about: dict[str, Any] = {"segment": segment, "start": segment + 0.0, "end": segment + 0.5}
        actions = session.event(Final(text="ba", words=words, reason="endpoint", **about), now)
        messages = [json.loads(action.text) for action in actions]  # type: ignore[union-attr]
        return [m["transcript"] for m in of_type(messages, COMPLETED)]

    session.receive(detect())
    session.receive(append(bytes(48000)))
    _, mark, change = session.receive(detect(type="semantic_vad", eagerness="low"))
    assert mark == Mark()
    assert isinstance(change, SetEndpoint)
    assert change.endpoint is not None
    assert change.endpoint.trailing_silence == 1.6
    assert len(session.receive(detect(type="semantic_vad", eagerness="low"))) == 1  # no change
    assert final(0) == []  # of the audio before
    assert session.event(Marked(), now) == ()
    assert final(1) == ["ba ba"]
    session.receive(detect())
    assert final(2) == ["ba"]
    assert session.event(Marked(), now) == ()
    assert final(3) == []


@pytest.mark.parametrize(
    "changed", [{"transcription": {"delay": "minimal"}}, {"format": {"type": "audio/pcmu"}}]
)
def test_openai_settings_that_come_too_late_change_nothing(talk: Any, changed: Any) -> None:
    talking = talk(OpenAiSession, "/v1/realtime")
    talking.say(append(bytes(4800)))
    turns = {"type": "server_vad", "silence_duration_ms": 2000}
    [error] = talking.say(update(audio={"input": {**changed, "turn_detection": turns}}))
    [param] = {"delay", "format"} & {*changed, *changed.get("transcription", {})}
    assert error["error"]["param"] == param
    assert "connect again" in error["error"]["message"]
    [updated] = talking.say(update())
    assert updated["session"] == talking.sent[0]["session"]


@pytest.mark.parametrize(("delay", "chunk"), [("minimal", 80), ("xhigh", 1280), (None, None)])
def test_openai_delay_is_the_chunk_size(delay: str | None, chunk: float | None) -> None:
    context = Context(session="s", bundle="b", languages=["en"], chunks_ms=[80.0, 1280.0])
    session = OpenAiSession(Handshake(path="/v1/realtime"), context)
    session.receive(update(audio={"input": {"transcription": {"delay": delay}}}))
    opening = session.receive(append(bytes(2)))[0]
    assert opening.start.chunk_ms == chunk  # type: ignore[union-attr]
    assert opening.start.sample_rate == 24000  # type: ignore[union-attr]


# Native.


def test_native_is_the_protocol_behind_the_seam(talk: Any, s16: S16, texts: Texts) -> None:
    talking = talk(NativeSession, "/v1/stream")
    talking.say('{"type": "start", "sample_rate": 16000}', s16(16000), END)
    assert talking.sent[0]["type"] == "ready"
    assert [m["text"] for m in of_type(talking.sent, "final")] == texts(16000)
    assert (talking.sent[-1]["type"], talking.close.code) == ("ended", 1000)
