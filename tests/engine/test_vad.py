"""Silero's detector in our hands: batched, without torch, and the same after hours as at first."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from loquent.engine.audio import load_audio
from loquent.engine.endpoint import Endpointer, EndpointRules
from loquent.engine.errors import ConfigError, MissingExtra
from loquent.engine.events import Event, Final, Finalized
from loquent.engine.recognizer import Recognizer
from loquent.engine.vad import SileroVad, Voice

Float32 = NDArray[np.float32]
Speak = Callable[..., Float32]
Run = Callable[..., list[Event]]

needs_silero = pytest.mark.skipif(
    importlib.util.find_spec("silero_vad") is None, reason="needs silero-vad"
)
FRAME = 640


@pytest.fixture(scope="module")
def vad() -> SileroVad:
    return SileroVad()


@pytest.fixture(scope="module")
def clip() -> Float32:
    import loquent.engine.recognizer as here

    sample = Path(here.__file__).parent / "samples" / "morning.flac"
    return load_audio(sample, sample_rate=16000)


def heard(vad: SileroVad, pcm: Float32, packet: int = 16000) -> list[bool]:
    voice = Voice(FRAME)
    flags: list[bool] = []
    for at in range(0, len(pcm), packet):
        voice.accept(pcm[at : at + packet])
        vad.run([voice])
    voice.finish()
    vad.run([voice])
    flags += [voice.speech(k) for k in range(len(pcm) // FRAME)]
    return flags


@needs_silero
def test_speech_and_silence(vad: SileroVad, clip: Float32) -> None:
    silence = np.zeros(16000, np.float32)
    flags = heard(vad, np.concatenate([silence, clip, silence]))
    assert not any(flags[:20])
    assert not any(flags[-15:])
    middle = flags[25 : 25 + len(clip) // FRAME]
    assert sum(middle) > 0.6 * len(middle)


@needs_silero
def test_packets_and_batches_change_nothing(vad: SileroVad, clip: Float32) -> None:
    pcm = clip[: 16000 * 3]
    expected = heard(vad, pcm)
    assert heard(vad, pcm, 777) == expected
    voices = [Voice(FRAME) for _ in range(3)]
    for lead, voice in enumerate(voices):
        voice.accept(np.zeros(lead * 512 * 5, np.float32))
        voice.accept(pcm)
        voice.finish()
    vad.run(voices)
    assert [voices[0].speech(k) for k in range(len(expected))] == expected
    # The other two are older, by blocks of silence: they hear the same speech later.
    assert [voices[2].speech(k + 8) for k in range(len(expected))][10:] == expected[10:]


@needs_silero
def test_what_was_heard_long_ago_is_forgotten(vad: SileroVad, clip: Float32) -> None:
    """The network's own state drifts for good in steady noise; ours ends up the same as it was."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 16000 * 120).astype(np.float32)
    voice = Voice(FRAME)
    voice.accept(noise)
    cells = []
    while voice.block() is not None:
        ahead = voice._waiting
        voice._waiting = ahead[: 64 + 512 * 50]
        vad.run([voice])
        voice._waiting = np.concatenate([voice._waiting, ahead[64 + 512 * 50 :]])
        cells.append(float(np.abs(voice.state).max()))
    plain = np.zeros((2, 1, 128), np.float32)
    context = np.zeros(64, np.float32)
    for at in range(0, len(noise) - 511, 512):
        block = np.concatenate([context, noise[at : at + 512]])
        _, plain = vad._session.run(
            None, {"input": block[None], "state": plain, "sr": np.array(16000, np.int64)}
        )
        context = block[-64:]
    # What the remedy is for: without it the cell keeps growing.
    assert np.abs(plain).max() > 1.5 * max(cells[-10:])
    assert max(cells[-10:]) < 1.25 * max(cells[5:15])
    assert len(voice._heard) <= 2048
    start = len(noise) // 512 * 512 // FRAME + 1
    voice.accept(clip)
    voice.finish()
    vad.run([voice])
    fresh = heard(vad, np.concatenate([noise[-16000:], clip]))[25:]
    late = [voice.speech(start + k) for k in range(len(fresh))]
    assert np.mean([a == b for a, b in zip(late, fresh, strict=True)]) > 0.95


@needs_silero
def test_a_stream_with_the_detector(tiny: Recognizer, tones: Speak, run: Run) -> None:
    # Tones are no speech to Silero: with or without it the decoder's silence ends the segment.
    pcm = tones([(0, 0.2), (3, 0.2), (0, 1.2), (5, 0.2)])
    plain = run(tiny, tiny.stream(), pcm, [1600])
    assert run(tiny, tiny.stream(vad="silero"), pcm, [700]) == plain
    stream = tiny.stream(vad="silero")
    stream.accept(pcm[:8000])
    stream.finalize()
    events = run(tiny, stream, pcm[8000:], [1600])
    assert [e.text for e in events if isinstance(e, Final)] == ["ki", "so"]
    assert sum(isinstance(e, Finalized) for e in events) == 1


@needs_silero
def test_speech_that_the_decoder_does_not_hear_is_no_silence(
    tiny: Recognizer, clip: Float32, run: Run, tones: Speak
) -> None:
    # To the tone model quiet speech is blank: only the detector knows that somebody talks.
    pcm = np.concatenate([tones([(3, 0.2)]), 0.1 * clip[8000 : 16000 * 3]])

    def ends(vad: str | None) -> float:
        stream = tiny.stream(vad=vad, endpoint=EndpointRules(trailing_silence=0.5))  # type: ignore[arg-type]
        for at in range(0, len(pcm), 1600):
            stream.accept(pcm[at : at + 1600])
            while stream.ready:
                tiny.step([stream])
            for event in stream.events():
                if isinstance(event, Final):
                    return stream.processed
        return stream.received

    assert ends("silero") > ends(None) + 0.5


def test_the_rules_ask_the_detector() -> None:
    from loquent.engine.decode import Frame

    class Ears:
        def speech(self, frame: int) -> bool:
            return frame < 10

    rules = EndpointRules(trailing_silence=0.2, leading_silence=1.0)
    ends = []
    for voice in (None, Ears()):
        pointer = Endpointer(rules, 0.04, voice)
        for number in range(60):
            if pointer.accept(Frame(number, (), number == 2)):
                ends.append(number)
                pointer.restart(None)
    # Five frames of silence behind speech, then every 25 without any.
    assert ends == [7, 32, 57, 14, 39]


def test_it_says_what_is_missing(tiny: Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="got vad 'webrtc', expected silero or none"):
        tiny.stream(vad="webrtc")  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "loquent\[vad\]"'):
        SileroVad()


@needs_silero
def test_torch_stays_out() -> None:
    code = (
        "import sys; from loquent.engine.vad import SileroVad; SileroVad(); "
        "sys.exit('torch' in sys.modules or 'silero_vad' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
