"""Quiet speech is heard as if it were not; what is loud enough stays as it is, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from loquent.engine.bundle import Bundle
from loquent.engine.calm import Loudness
from loquent.engine.errors import BundleError, ConfigError
from loquent.engine.events import Event, Final
from loquent.engine.features import FeatureSpec, fbank, kaldi_spec, torchaudio_spec, whisper_spec
from loquent.engine.level import SILENCE, Leveller, LevelRules, loudest
from loquent.engine.recognizer import Recognizer

Float32 = NDArray[np.float32]
Speak = Callable[..., Float32]
Run = Callable[..., list[Event]]

SPECS = pytest.mark.parametrize("spec", [whisper_spec(), kaldi_spec()], ids=["log10", "ln"])
STORY = [(0, 0.2), (1, 0.12), (2, 0.1), (0, 0.08), (3, 0.12), (0, 1.2), (3, 0.15), (4, 0.1)]


def speech(seconds: float = 1.0) -> Float32:
    """Noise that gets 60 dB softer towards high frequencies, as speech does."""
    count = round(16000 * seconds)
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(count))
    pcm = np.fft.irfft(spectrum * 10 ** np.linspace(0, -3, len(spectrum)), count)
    return (0.3 * pcm / np.abs(pcm).max()).astype(np.float32)


@SPECS
def test_a_raised_window_is_that_of_louder_audio(spec: FeatureSpec) -> None:
    pcm = speech()
    want = fbank(spec, pcm)
    leveller = Leveller(spec, LevelRules(quiet=loudest(spec, want), most=40.0))
    soft = fbank(leveller.features, pcm / np.float32(50))  # 34 dB
    peak = leveller.heard(SILENCE, Loudness(spec)(soft), 32)
    assert peak == pytest.approx(loudest(spec, want) - 20 * np.log10(50), abs=0.01)
    np.testing.assert_allclose(leveller.raised(soft[None], [peak])[0], want, atol=2e-4)
    # What has gone through the model's own floor is lost, however much it is raised.
    lost = leveller.raised(fbank(spec, pcm / np.float32(50))[None], [peak])[0] - want
    assert (np.abs(lost) / spec.scale).max() > 0.5


@SPECS
def test_what_is_loud_enough_is_not_touched(spec: FeatureSpec) -> None:
    pcm = speech()
    want = fbank(spec, pcm)
    leveller = Leveller(spec, LevelRules(quiet=loudest(spec, want) - 1.0))
    found = fbank(leveller.features, pcm)[None]
    peak = leveller.heard(SILENCE, Loudness(spec)(found[0]), 32)
    np.testing.assert_array_equal(leveller.raised(found, [peak])[0], want)


def test_windows_of_a_batch_are_raised_each_by_its_own_need() -> None:
    spec = whisper_spec()
    leveller = Leveller(spec, LevelRules(quiet=20.0, most=25.0))
    windows = fbank(leveller.features, speech())[None, :57].repeat(3, axis=0)
    peaks = [30.0, 12.0, SILENCE]
    raised = leveller.raised(windows, peaks)
    decibels = 10 * (raised - windows) / spec.scale
    for found, want in zip(decibels, [0.0, 8.0, 25.0], strict=True):
        assert np.median(found) == pytest.approx(want, abs=1e-3)
    for i, peak in enumerate(peaks):
        np.testing.assert_array_equal(
            raised[i : i + 1], leveller.raised(windows[i : i + 1], [peak])
        )


def test_the_loudest_is_forgotten_a_decibel_a_second() -> None:
    leveller = Leveller(whisper_spec(), LevelRules(quiet=20.0))
    soft = np.full(5, 1.0, np.float32)
    assert leveller.heard(30.0, soft, 100) == pytest.approx(29.0)
    assert leveller.heard(10.2, soft, 100) == pytest.approx(10.0)


@pytest.mark.parametrize("chunk_ms", [80, 320])
def test_quiet_tones_are_heard(
    write_bundle: Callable[..., Path],
    tones: Speak,
    run: Run,
    tmp_path: Path,
    tiny: Recognizer,
    chunk_ms: int,
) -> None:
    def text(recognizer: Recognizer, pcm: Float32) -> list[str]:
        stream = recognizer.stream(chunk_ms=chunk_ms, decoder="ctc")
        return [e.text for e in run(recognizer, stream, pcm, [1600]) if isinstance(e, Final)]

    folder = write_bundle(
        tmp_path / "level", change=lambda m: m.update(level={"quiet": 35.0, "most": 50.0})
    )
    raising = Recognizer.load(folder)
    loud = tones(STORY)
    soft = loud * np.float32(0.004)
    want = text(tiny, loud)
    assert len(want) == 2
    assert text(tiny, soft) != want
    assert text(raising, soft) == want
    assert text(raising, loud) == want


def test_a_restored_stream_raises_as_the_one_before_did(
    babble: Recognizer, tones: Speak, run: Run
) -> None:
    # A loud tone first: by how much what follows is raised depends on it.
    pcm = np.concatenate([tones([(1, 0.3), (0, 0.4)]), 0.05 * tones(STORY[1:5], noise=0.01)])
    whole = run(babble, babble.stream(decoder="ctc"), pcm, [1600])
    half = 9600
    stream = babble.stream(decoder="ctc")
    stream.accept(pcm[:half])
    while stream.ready:
        babble.step([stream])
    before = stream.events()
    assert (
        before + run(babble, babble.restore(babble.snapshot(stream)), pcm[half:], [1600]) == whole
    )


@pytest.mark.parametrize(
    ("level", "message"),
    [
        ({}, "got quiet nan dB"),
        ({"quiet": "loud"}, "expected a number"),
        ({"quiet": 30.0, "most": 0}, "above 0 and at most 60"),
        ({"quiet": 30.0, "most": 1e9}, "above 0 and at most 60"),
        ({"quiet": 10**400}, "too large"),
        ([1], "level = \\[1\\], expected an object"),
    ],
)
def test_a_manifest_that_says_nonsense_is_refused(
    write_bundle: Callable[..., Path], tmp_path: Path, level: object, message: str
) -> None:
    folder = write_bundle(tmp_path / "broken", change=lambda m: m.update(level=level))
    with pytest.raises(BundleError, match=message):
        Bundle.load(folder)


def test_features_without_a_plain_logarithm_cannot_be_raised() -> None:
    spec = torchaudio_spec(np.zeros(80, np.float32), np.ones(80, np.float32))
    with pytest.raises(ConfigError, match="piecewise"):
        Leveller(spec, LevelRules(quiet=30.0))


def test_features_without_a_floor_cannot_be_raised() -> None:
    with pytest.raises(ConfigError, match="floor 0"):
        Leveller(replace(whisper_spec(), floor=0.0), LevelRules(quiet=30.0))
