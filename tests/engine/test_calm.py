"""A pause is over when it gets loud, before any decoder says so."""

from __future__ import annotations

import numpy as np
import pytest

from loquent.engine.calm import Calm, Loudness
from loquent.engine.features import FeatureSpec, fbank, kaldi_spec, whisper_spec

SEGMENT, RIGHT = 32, 5


def verdicts(spec: FeatureSpec, loudness: list[tuple[float, float]]) -> list[bool]:
    """Of every chunk of noise that has these (seconds, amplitudes) one after another."""
    rng = np.random.default_rng(0)
    pcm = np.concatenate(
        [level * rng.standard_normal(round(16000 * seconds)) for seconds, level in loudness]
    )
    frames = fbank(spec, pcm.astype(np.float32))
    calm, loudness = Calm(spec), Loudness(spec)
    return [
        calm.accept(loudness(frames[at : at + SEGMENT + RIGHT]), SEGMENT, RIGHT)
        for at in range(0, len(frames) - SEGMENT - RIGHT, SEGMENT)
    ]


@pytest.mark.parametrize("spec", [whisper_spec(), kaldi_spec()], ids=["log10", "ln"])
@pytest.mark.parametrize("noise", [0.0, 0.001, 0.02], ids=["digital silence", "quiet", "noisy"])
def test_steady_sound_is_calm_and_what_rises_from_it_is_not(
    spec: FeatureSpec, noise: float
) -> None:
    # 1.28 s are four chunks; the fifth ends with 90 ms of something louder.
    steady = 1.28 + 0.23
    heard = verdicts(spec, [(steady, noise), (0.4, 0.2), (1.0, noise)])
    assert heard[:4] == [True] * 4
    assert not heard[4]
    assert heard[-1]


def test_a_pause_may_grow_louder() -> None:
    heard = verdicts(whisper_spec(), [(2.0, 0.001), (8.0, 0.02)])
    assert not heard[6]
    assert heard[-1]


def test_windows_are_as_loud_in_a_batch_as_alone() -> None:
    loudness = Loudness(whisper_spec())
    windows = np.random.default_rng(0).standard_normal((5, 37, 80)).astype(np.float32)
    together = loudness(windows)
    for window, levels in zip(windows, together, strict=True):
        np.testing.assert_array_equal(loudness(window), levels)
