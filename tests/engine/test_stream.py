"""Streams and the recogniser, end to end on a real (tiny) ONNX model: the interface.

Audio is tones: see ``conftest.py``. Events are compared whole, times and words included.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from loquent.engine.endpoint import EndpointRules
from loquent.engine.errors import AudioError, BufferFull, ConfigError, StreamClosed
from loquent.engine.events import Ended, Event, Final
from loquent.engine.predictor import OnnxPredictor
from loquent.engine.recognizer import Recognizer

Float32 = NDArray[np.float32]
Speak = Callable[..., Float32]
Run = Callable[..., list[Event]]

# Two words, a pause that ends the segment, the same token again, another word.
STORY = [(0, 0.2), (1, 0.12), (2, 0.1), (0, 0.08), (3, 0.12), (0, 1.2), (3, 0.15), (4, 0.1)]


def finals(events: list[Event]) -> list[Final]:
    return [event for event in events if isinstance(event, Final)]


def text(events: list[Event]) -> str:
    return " / ".join(final.text for final in finals(events))


# Endpoints


def test_long_utterances_are_cut_between_words(tiny: Recognizer, tones: Speak, run: Run) -> None:
    story = [(t, 0.12) for t in (1, 2, 0, 3, 4, 0) * 5]
    rules = EndpointRules(max_utterance=1.0)
    events = run(tiny, tiny.stream(chunk_ms=320, endpoint=rules), tones(story), [1600])
    assert text(events) == " / ".join(["bana kiwi"] * 5)
    assert [final.reason for final in finals(events)] == ["limit"] * 4 + ["end"]


def test_without_rules_there_is_one_segment(tiny: Recognizer, tones: Speak, run: Run) -> None:
    pcm = tones([(1, 0.1), (0, 3.0), (3, 0.1), (0, 3.0)])
    events = run(tiny, tiny.stream(endpoint=None), pcm, [1600])
    assert [(f.text, f.reason) for f in finals(events)] == [("ba ki", "end")]


def test_silence_for_a_minute_says_nothing(tiny: Recognizer, run: Run) -> None:
    events = run(tiny, tiny.stream(), np.zeros(60 * 16000, np.float32), [16000])
    assert events == [Ended(duration=60.0, segments=0)]


@pytest.mark.parametrize("on_a_branch", [False, True])
def test_rules_may_change_between_two_chunks(
    tiny: Recognizer, tones: Speak, run: Run, on_a_branch: bool
) -> None:
    """What was heard so far goes on as it was; the silence so far counts."""
    pcm = tones([(1, 0.1), (0, 0.6), (3, 0.1), (0, 0.6), (5, 0.1), (0, 0.6), (1, 0.1), (0, 0.6)])
    stream = tiny.stream(chunk_ms=80, endpoint=EndpointRules(trailing_silence=0.3))
    stream.accept(pcm[:16000])
    if on_a_branch:
        stream.finalize()
        while stream._trunk is None:
            tiny.step([stream])
    else:
        while stream.ready:
            tiny.step([stream])
    stream.set_endpoint(EndpointRules(trailing_silence=2.0))
    events = [*stream.events(), *run(tiny, stream, pcm[16000:], [1600])]
    if on_a_branch:
        assert text(events) == "ba / ki / so ba"
        assert [final.reason for final in finals(events)] == ["endpoint", "finalize", "end"]
    else:
        assert text(events) == "ba / ki so ba"
        assert [final.reason for final in finals(events)] == ["endpoint", "end"]


# The interface


def test_empty_audio(tiny: Recognizer) -> None:
    stream = tiny.stream()
    assert not stream.ready
    stream.accept(np.zeros(0, np.float32))
    stream.finish()
    assert stream.ready
    assert not stream.done
    tiny.step([stream])
    assert stream.events() == [Ended(duration=0.0, segments=0)]
    assert stream.done
    assert not stream.ready
    tiny.step([stream])
    assert stream.events() == []


def test_finish_twice_then_accept(tiny: Recognizer, tones: Speak) -> None:
    stream = tiny.stream()
    stream.accept(tones([(1, 0.5)]))
    stream.finish()
    stream.finish()
    with pytest.raises(StreamClosed, match=r"after finish\(\); make a new stream"):
        stream.accept(tones([(1, 0.5)]))
    while stream.ready:
        tiny.step([stream])
    assert text(stream.events()) == "ba"


@pytest.mark.parametrize(
    ("pcm", "message"),
    [
        (np.array([0.0, np.nan], np.float32), "not finite"),
        (np.array([np.inf], np.float32), "not finite"),
        (np.array([1e300]), "not finite"),
        (np.array([0.1, 12000.0], np.float32), "up to 12000, expected .*divide by 32768"),
        (np.zeros((2, 2), np.float32), r"shape \(2, 2\), expected a mono"),
        (np.zeros(4, np.int32), "type int32, expected float32 or int16"),
        ([0.0, 0.1], "list'>, expected a mono numpy array"),
    ],
)
def test_bad_pcm_is_refused_and_changes_nothing(
    tiny: Recognizer, tones: Speak, run: Run, pcm: object, message: str
) -> None:
    stream = tiny.stream()
    with pytest.raises(AudioError, match=message):
        stream.accept(pcm)  # type: ignore[arg-type]
    assert stream.received == 0
    assert text(run(tiny, stream, tones([(1, 0.2)]), [1600])) == "ba"


def test_int16_and_float_are_the_same(tiny: Recognizer, tones: Speak, run: Run) -> None:
    whole = np.round(tones(STORY) * 32768).astype(np.int16)
    as_int = run(tiny, tiny.stream(), whole, [1600])
    assert as_int == run(tiny, tiny.stream(), whole.astype(np.float32) / 32768, [1600])
    assert text(as_int) == "bana ki / kiwi"


@pytest.mark.parametrize("sample_rate", [8000, 16000, 44100, 48000])
def test_too_much_audio_consumes_nothing(
    tiny: Recognizer, tones: Speak, run: Run, sample_rate: int
) -> None:
    pcm = tones([(1, 0.2), (0, 0.1), (2, 0.2)], sample_rate=sample_rate)
    stream = tiny.stream(sample_rate=sample_rate)
    stream.accept(pcm[:1000])
    with pytest.raises(BufferFull, match=r"expected no more than .*call Recognizer\.step"):
        stream.accept(np.zeros(sample_rate * 60, np.float32))
    assert stream.received == 1000 / sample_rate
    expected = run(tiny, tiny.stream(sample_rate=sample_rate), pcm, [1000])
    assert run(tiny, stream, pcm[1000:], [1000]) == expected


@pytest.mark.parametrize("sample_rate", [8000, 16000, 44099, 48000])
def test_filling_to_the_brim_then_finishing(tiny: Recognizer, sample_rate: int) -> None:
    stream = tiny.stream(sample_rate=sample_rate)
    packet = np.zeros(sample_rate // 7, np.float32)
    asked = 0
    while stream.wants_audio:
        stream.accept(packet)
        asked += 1
    assert asked > 7 * 3  # several seconds before a reader is asked to pause ...
    for _ in range(asked):
        stream.accept(packet)  # ... and as much again for one that does not
    with pytest.raises(BufferFull):
        stream.accept(np.zeros(sample_rate * 6, np.float32))
    stream.finish()
    while stream.ready:
        tiny.step([stream])
    assert stream.events() == [Ended(duration=stream.received, segments=0)]


def test_progress(tiny: Recognizer) -> None:
    stream = tiny.stream(chunk_ms=320)
    # 320 ms of segment, 40 of right context, 10 of look-ahead, and half a window of 25 ms around
    # the centre of the last frame, 10 ms before its end.
    assert stream.latency_ms == 320 + 40 + 10 + 2.5
    stream.accept(np.zeros(5959, np.float32))
    assert not stream.ready
    stream.accept(np.zeros(1, np.float32))
    assert stream.ready
    assert (stream.received, stream.processed) == (5960 / 16000, 0.0)
    tiny.step([stream])
    assert stream.processed == 0.32
    stream.finish()
    while stream.ready:
        tiny.step([stream])
    assert stream.processed == stream.received == 5960 / 16000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_ms": 100}, "got chunk_ms 100, expected one of 40, 80, 160, 320, 640, 1280"),
        ({"right_context_ms": 30}, "got right_context_ms 30, expected one of 0, 40, 80"),
        ({"decoder": "beam"}, "got decoder 'beam', expected one of joint, rnnt-beam"),
        ({"sample_rate": 7999}, "got sample_rate 7999, expected 8000 to 48000"),
        ({"sample_rate": 96000}, "got sample_rate 96000, expected 8000 to 48000"),
    ],
)
def test_options_are_checked(tiny: Recognizer, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        tiny.stream(**options)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)


def test_threads_are_checked(tiny_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="got threads 0, expected 1 or more"):
        Recognizer.load(tiny_bundle, threads=0)


def test_transcribe(tiny: Recognizer, tones: Speak, run: Run) -> None:
    pcm = tones(STORY * 8)  # longer than the buffer
    expected = finals(run(tiny, tiny.stream(chunk_ms=160), pcm, [1600]))
    assert tiny.transcribe(pcm, chunk_ms=160) == expected
    assert len(expected) > 8
    with pytest.raises(AudioError, match="not finite"):
        tiny.transcribe(np.array([np.nan], np.float32))


@pytest.mark.parametrize("fail_at", [1, 2, 5, 9])
def test_a_step_that_fails_while_decoding_can_be_done_again(
    tiny_bundle: Path, tones: Speak, run: Run, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    pcm = tones(STORY)
    recognizer = Recognizer.load(tiny_bundle)
    plans = [("ctc", 320), ("rnnt", 320), ("rnnt", 320)]
    streams = [recognizer.stream(decoder=decoder, chunk_ms=ms) for decoder, ms in plans]
    expected = [
        run(recognizer, recognizer.stream(decoder=decoder, chunk_ms=ms), pcm, [1600])
        for decoder, ms in plans
    ]
    for stream in streams:
        stream.accept(pcm)
        stream.finish()
    recognizer.step(streams)
    calls = 0
    join = OnnxPredictor.join

    def failing(self: OnnxPredictor, enc: Float32, pred: Float32) -> Float32:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise MemoryError
        return join(self, enc, pred)

    with monkeypatch.context() as patch:
        patch.setattr(OnnxPredictor, "join", failing)
        with pytest.raises(MemoryError):
            recognizer.step(streams)
    while any(stream.ready for stream in streams):
        recognizer.step(streams)
    assert [stream.events() for stream in streams] == expected


def test_a_failed_step_can_be_done_again(
    tiny: Recognizer, tones: Speak, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pcm = tones(STORY)
    expected = run(tiny, tiny.stream(), pcm, [1600])
    stream = tiny.stream()
    stream.accept(pcm)
    stream.finish()
    tiny.step([stream])
    with monkeypatch.context() as patch:
        # Out of memory cannot be had on demand; the encoder gets a window it cannot take.
        good = stream.window()
        assert good is not None
        patch.setattr(stream, "window", lambda: good.astype(np.float64))
        with pytest.raises(Exception, match="Unexpected input data type"):
            tiny.step([stream])
    while stream.ready:
        tiny.step([stream])
    assert stream.events() == expected
