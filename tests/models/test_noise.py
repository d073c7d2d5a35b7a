"""Noise: its level, its colour, and that the same draw gives the same samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from loquent.models.data import DataError
from loquent.models.noise import KINDS, MadeNoise, RecordedNoise, mix, open_noise


@pytest.mark.parametrize("kind", KINDS)
def test_made_noise_is_a_function_of_the_generator(kind: str) -> None:
    noise = MadeNoise(kind)
    first, again = (noise.draw(8000, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.float32
    assert first.shape == (8000,)
    assert np.sqrt(np.mean(first**2)) == pytest.approx(1, abs=1e-3)
    assert not np.array_equal(first, noise.draw(8000, np.random.default_rng(4)))
    assert noise.draw(1, np.random.default_rng(0)).shape == (1,)


@pytest.mark.parametrize(("kind", "slope"), [("white", 0), ("pink", -1), ("brown", -2)])
def test_colours(kind: str, slope: float) -> None:
    power = np.abs(np.fft.rfft(MadeNoise(kind).draw(160000, np.random.default_rng(0)))) ** 2
    hz = np.fft.rfftfreq(160000, 1 / 16000)
    bands = [power[(hz >= f) & (hz < 2 * f)].mean() for f in (100, 200, 400, 800, 1600, 3200)]
    fitted = np.polyfit(np.log2([100, 200, 400, 800, 1600, 3200]), np.log2(bands), 1)[0]
    assert fitted == pytest.approx(slope, abs=0.1)


def test_babble_has_the_spectrum_and_the_beats_of_speech() -> None:
    x = MadeNoise("babble").draw(320000, np.random.default_rng(0)).astype(np.float64)
    power = np.abs(np.fft.rfft(x)) ** 2
    hz = np.fft.rfftfreq(len(x), 1 / 16000)
    assert power[hz < 1500].sum() > 10 * power[hz > 3000].sum()
    envelope = np.sqrt(np.mean(x.reshape(-1, 320) ** 2, axis=1))
    assert envelope.std() > 0.15 * envelope.mean()


@given(st.floats(-10, 40), st.floats(0.001, 0.2), st.floats(1e-3, 10))
def test_mix_keeps_the_distance(snr: float, level: float, other: float) -> None:
    rng = np.random.default_rng(0)
    speech = (level * rng.standard_normal(4000)).astype(np.float32)
    noise = (other * rng.standard_normal(4000)).astype(np.float32)
    out = mix(speech, noise, snr)
    # What is left when the speech is taken out, however the whole was scaled.
    scale = float(out @ speech / (speech @ speech))
    rest = out - np.float32(scale) * speech
    assert np.abs(out).max() <= 1.0 + 1e-6
    measured = 10 * np.log10(np.mean((scale * speech) ** 2) / np.mean(rest**2))
    assert measured == pytest.approx(snr, abs=1.5)


def test_silence_stays_as_it_is() -> None:
    silence = np.zeros(100, np.float32)
    np.testing.assert_array_equal(mix(silence, np.ones(100, np.float32), 5), silence)
    np.testing.assert_array_equal(mix(np.ones(3, np.float32), silence[:3], 5), np.ones(3))


def test_recordings_from_a_folder_or_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    soundfile.write(tmp_path / "deep" / "a.wav", np.full(800, 0.25), 16000)
    (tmp_path / "readme.txt").write_text("no audio")
    manifest = tmp_path / "noise.jsonl"
    manifest.write_text(json.dumps({"audio": "deep/a.wav"}) + "\n")
    for source in (tmp_path, manifest):
        noise = open_noise(str(source))
        assert isinstance(noise, RecordedNoise)
        drawn = noise.draw(2000, np.random.default_rng(0))
        np.testing.assert_allclose(drawn, np.full(2000, 0.25), atol=1e-4)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got noise 'hum', expected an existing folder"):
        open_noise("hum")
    with pytest.raises(DataError, match="got noise 'hum', expected one of white"):
        MadeNoise("hum")
    with pytest.raises(DataError, match="got no recordings"):
        open_noise(str(tmp_path))
    broken = tmp_path / "n.jsonl"
    broken.write_text("[]\n")
    with pytest.raises(DataError, match="TypeError"):
        open_noise(str(broken))
    (tmp_path / "b.wav").write_text("no audio")
    with pytest.raises(DataError, match=r"noise: .*b\.wav"):
        open_noise(str(tmp_path)).draw(10, np.random.default_rng(0))
