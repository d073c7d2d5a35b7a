"""``Stream.finalize``: the text so far as at the end of a stream, and no trace of it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loquent.engine.errors import StreamClosed
from loquent.engine.events import Ended, Event, Final, Finalized, Partial, Word
from loquent.engine.recognizer import Recognizer
from loquent.engine.resample import Resampler
from loquent.engine.stream import Stream

Float32 = NDArray[np.float32]
Speak = Callable[..., Float32]
Run = Callable[..., list[Event]]

CHUNKS = [40, 80, 160, 320, 640, 1280]
DECODERS = ["ctc", "ctc-beam", "joint", "rnnt", "rnnt-beam"]
STORY = [(0, 0.2), (1, 0.12), (2, 0.1), (0, 0.08), (3, 0.12), (0, 1.2), (3, 0.15), (4, 0.1)]
FRAME = 0.04

sounds = st.lists(
    st.tuples(st.integers(0, 8), st.sampled_from([0.04, 0.1, 0.15, 0.3])) | st.just((0, 1.0)),
    min_size=1,
    max_size=10,
)
slow = settings(max_examples=20, derandomize=True)


def play(
    recognizer: Recognizer,
    stream: Stream,
    pcm: Float32,
    at: Sequence[int],
    packets: Sequence[int] = (1600,),
    *,
    eager: bool = True,
) -> list[Event]:
    """All events of a stream that is finalized at these samples.

    ``eager``: step whenever something is ready; otherwise only when the stream wants no more.
    """
    events: list[Event] = []

    def step() -> None:
        while stream.ready and (eager or not stream.wants_audio):
            recognizer.step([stream])
        events.extend(stream.events())

    marks = sorted(at)
    position = turn = 0
    while position < len(pcm) or marks:
        size = min(packets[turn % len(packets)], len(pcm) - position)
        turn += 1
        if marks:
            size = min(size, marks[0] - position)
        stream.accept(pcm[position : position + size])
        position += size
        while marks and marks[0] == position:
            stream.finalize()
            marks.pop(0)
        step()
    stream.finish()
    while stream.ready:
        recognizer.step([stream])
    return events + stream.events()


def before(events: list[Event], count: int = 1) -> list[Event]:
    """Up to the ``count``-th Finalized, exclusive."""
    where = [i for i, event in enumerate(events) if isinstance(event, Finalized)]
    return events[: where[count - 1]]


def said(events: list[Event]) -> list[tuple[str, tuple[Word, ...]]]:
    return [(e.text, e.words) for e in events if isinstance(e, Final)]


def text(events: list[Event]) -> str:
    return " / ".join(e.text for e in events if isinstance(e, Final))


@slow
@given(
    story=sounds,
    chunk_ms=st.sampled_from(CHUNKS),
    decoder=st.sampled_from(DECODERS),
    right=st.sampled_from([0, 40, 80]),
    cut=st.floats(0, 1),
    packets=st.lists(st.integers(1, 9000), min_size=1, max_size=4),
    eager=st.booleans(),
)
def test_the_text_so_far_is_that_of_a_stream_that_ends_there(
    babble: Recognizer,
    tones: Speak,
    run: Run,
    story: list[tuple[int, float]],
    chunk_ms: int,
    decoder: str,
    right: int,
    cut: float,
    packets: list[int],
    eager: bool,
) -> None:
    def stream() -> Stream:
        return babble.stream(chunk_ms=chunk_ms, decoder=decoder, right_context_ms=right)

    pcm = tones(story, noise=0.01)
    at = round(cut * len(pcm))
    events = play(babble, stream(), pcm, [at], packets, eager=eager)
    ended = run(babble, stream(), pcm[:at], [1600])
    # Partials too: the branch is the end of the stream in everything but the reason.
    reasons = [e.reason for e in before(events) if isinstance(e, Final)]
    assert [r.replace("finalize", "end") for r in reasons] == [
        e.reason for e in ended if isinstance(e, Final)
    ]
    assert "end" not in reasons
    assert said(before(events)) == said(ended)
    assert [e for e in before(events) if isinstance(e, Partial)] == [
        e for e in ended if isinstance(e, Partial)
    ]
    assert [e for e in events if isinstance(e, Finalized)] == [Finalized(position=at / 16000)]
    assert events[-1] == Ended(duration=len(pcm) / 16000, segments=len(said(events)))


@slow
@given(
    story=sounds,
    chunk_ms=st.sampled_from(CHUNKS),
    decoder=st.sampled_from(DECODERS),
    cuts=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    packets=st.lists(st.integers(1, 9000), min_size=1, max_size=4),
    eager=st.booleans(),
)
def test_what_follows_is_what_the_stream_would_have_said(
    babble: Recognizer,
    tones: Speak,
    run: Run,
    story: list[tuple[int, float]],
    chunk_ms: int,
    decoder: str,
    cuts: list[float],
    packets: list[int],
    eager: bool,
) -> None:
    pcm = tones(story, noise=0.01)
    at = sorted(round(cut * len(pcm)) for cut in cuts)

    def stream() -> Stream:
        return babble.stream(chunk_ms=chunk_ms, decoder=decoder)

    events = play(babble, stream(), pcm, at, packets, eager=eager)
    assert [e.position for e in events if isinstance(e, Finalized)] == [n / 16000 for n in at]
    # Whatever the packets, and however late the recogniser comes.
    finals = [e for e in events if isinstance(e, Final)]
    again = play(babble, stream(), pcm, at)
    assert finals == [e for e in again if isinstance(e, Final)]
    # Words that begin behind the flush are those of a stream that was never finalized, at the same
    # times; a word that the cut goes through keeps what it has behind it.
    plain = [w for _, words in said(run(babble, stream(), pcm, [1600])) for w in words]
    after = [
        w
        for _, words in said(events[events.index(Finalized(position=at[-1] / 16000)) :])
        for w in words
    ]
    behind = at[-1] / 16000 + 5 * FRAME
    assert [w for w in after if w.start >= behind][1:] == [w for w in plain if w.start >= behind][
        1:
    ]
    assert all(w.start >= at[-1] / 16000 - FRAME for w in after)
    times = [w.start for _, words in said(events) for w in words]
    assert times == sorted(times)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("chunk_ms", CHUNKS)
def test_finalize_between_words_changes_no_word(
    tiny: Recognizer, tones: Speak, run: Run, chunk_ms: int, decoder: str
) -> None:
    pcm = tones([*STORY, (0, 0.4), (5, 0.2), (0, 0.3)])
    plain = run(tiny, tiny.stream(chunk_ms=chunk_ms, decoder=decoder), pcm, [1600])
    for seconds in (0.1, 0.75, 1.3, 2.25):
        events = play(
            tiny, tiny.stream(chunk_ms=chunk_ms, decoder=decoder), pcm, [round(seconds * 16000)]
        )
        assert text(events).replace(" / ", " ") == text(plain).replace(" / ", " ")
        assert [w.start for _, ws in said(events) for w in ws] == [
            w.start for _, ws in said(plain) for w in ws
        ]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_word_that_is_said_late_is_said_once(
    write_bundle: Callable[..., Path], tmp_path: Path, tones: Speak, decoder: str
) -> None:
    # The late model says the tone one frame after it, which is behind the cut.
    recognizer = Recognizer.load(write_bundle(tmp_path / "bundle", late=True))
    pcm = tones([(0, 0.2), (3, 0.12), (0, 0.4), (5, 0.12), (0, 0.4)])
    for chunk_ms in CHUNKS:
        for cut in range(round(0.3 * 16000), round(0.4 * 16000), 80):
            stream = recognizer.stream(chunk_ms=chunk_ms, decoder=decoder)
            assert text(play(recognizer, stream, pcm, [cut])).split() == ["ki", "/", "so"]


@pytest.mark.parametrize("sample_rate", [8000, 22050, 44100, 44099, 48000])
def test_what_the_resampler_holds_back_is_heard(
    tiny: Recognizer, tones: Speak, run: Run, sample_rate: int
) -> None:
    story = [(0, 0.3), (3, 0.1), (4, 0.1)]
    pcm = tones([*story, (0, 1.2), *story], sample_rate=sample_rate)
    at = round(0.5 * sample_rate)
    stream = tiny.stream(sample_rate=sample_rate, chunk_ms=160)
    events = play(tiny, stream, pcm, [at], [173])
    ended = run(tiny, tiny.stream(sample_rate=sample_rate, chunk_ms=160), pcm[:at], [900])
    assert said(before(events)) == said(ended)
    assert text(events) == "kiwi / kiwi"


@settings(max_examples=30)
@given(
    rate=st.sampled_from([8000, 11025, 22050, 44099, 44100, 47999, 48000]),
    packets=st.lists(st.integers(0, 5000), min_size=1, max_size=30),
)
def test_rest_is_what_finish_would_give(rate: int, packets: list[int]) -> None:
    rng = np.random.default_rng(len(packets))
    one, other = Resampler(rate, 16000), Resampler(rate, 16000)
    for size in packets * 3:
        samples = rng.normal(0, 0.1, size).astype(np.float32)
        np.testing.assert_array_equal(one.accept(samples), other.accept(samples))
        one.rest()  # changes nothing
    rest = one.rest()
    finish = other.finish()
    assert len(rest) == len(finish)
    np.testing.assert_allclose(rest, finish, atol=1e-6)


def test_with_no_audio_and_again_and_again(tiny: Recognizer, tones: Speak) -> None:
    stream = tiny.stream()
    stream.finalize()
    assert stream.ready
    tiny.step([stream])
    assert stream.events() == [Finalized(position=0.0)]
    assert not stream.ready
    stream.accept(tones([(0, 0.2), (3, 0.15)]))
    stream.finalize()
    stream.finalize()
    while stream.ready:
        tiny.step([stream])
    events = stream.events()
    assert text(events) == "ki"
    assert [e for e in events if isinstance(e, Finalized)] == [Finalized(position=0.35)] * 2
    assert stream.processed == 0.35
    stream.finalize()
    stream.finish()
    while stream.ready:
        tiny.step([stream])
    assert stream.events() == [Finalized(position=0.35), Ended(duration=0.35, segments=1)]


def test_after_finish_it_is_an_error(tiny: Recognizer) -> None:
    stream = tiny.stream()
    stream.finish()
    with pytest.raises(StreamClosed, match=r"got finalize\(\) after finish\(\)"):
        stream.finalize()


def test_many_that_wait_pause_the_audio(tiny: Recognizer) -> None:
    stream = tiny.stream()
    for _ in range(8):
        assert stream.wants_audio
        stream.finalize()
    assert not stream.wants_audio
    while stream.ready:
        tiny.step([stream])
    assert stream.events() == [Finalized(position=0.0)] * 8


def test_progress_never_goes_back(tiny: Recognizer, tones: Speak) -> None:
    stream = tiny.stream(chunk_ms=320)
    stream.accept(tones([(1, 0.2), (2, 0.8)]))
    stream.finalize()
    stream.accept(tones([(1, 0.2)]))
    seen = [stream.processed]
    while stream.ready:
        tiny.step([stream])
        seen.append(stream.processed)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_failed_step_of_the_flush_can_be_done_again(
    tiny: Recognizer, tones: Speak, monkeypatch: pytest.MonkeyPatch, decoder: str
) -> None:
    pcm = tones(STORY)
    expected = play(tiny, tiny.stream(decoder=decoder), pcm, [8000])
    stream = tiny.stream(decoder=decoder)
    stream.accept(pcm[:8000])
    stream.finalize()
    while stream.window() is not None and not stream._trunk:
        tiny.step([stream])
    with monkeypatch.context() as patch:
        good = stream.window()
        assert good is not None
        patch.setattr(stream, "window", lambda: good.astype(np.float64))
        with pytest.raises(Exception, match="Unexpected input data type"):
            tiny.step([stream])
    while stream.ready:
        tiny.step([stream])
    stream.accept(pcm[8000:])
    stream.finish()
    while stream.ready:
        tiny.step([stream])
    assert stream.events() == expected
