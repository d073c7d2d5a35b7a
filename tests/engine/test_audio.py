"""Audio files of every kind, and everything that is called .wav and is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from loquent.engine.audio import AudioFile, load_audio
from loquent.engine.errors import AudioError

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}


def sine(rate: int, seconds: float = 1.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)).astype("f4")


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_tone(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tone.{suffix}"
    kind, subtype = FORMATS[suffix]
    soundfile.write(path, sine(48000), 48000, format=kind, subtype=subtype)
    file = AudioFile(path)
    assert (file.sample_rate, file.channels) == (48000, 1)
    assert file.duration == pytest.approx(1.0, abs=0.06)
    pcm = load_audio(path)
    assert pcm.dtype == np.float32
    assert len(pcm) == pytest.approx(16000, abs=900)
    spectrum = np.abs(np.fft.rfft(pcm[:15000]))
    assert spectrum.argmax() * 16000 / 15000 == pytest.approx(440, abs=2)


def test_channels_are_averaged(tmp_path: Path) -> None:
    path = tmp_path / "stereo.wav"
    left = sine(16000)
    soundfile.write(path, np.stack([left, np.zeros_like(left)], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(path), left / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [4000, 16000, 22050, 96000])
def test_any_rate_and_block_size(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "tone.wav"
    soundfile.write(path, sine(rate, 0.5), rate, subtype="FLOAT")
    blocks = list(AudioFile(path).blocks(seconds=0.03, sample_rate=16000))
    assert all(len(block) for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), load_audio(path))
    assert len(load_audio(path)) == 8000


def test_own_rate_by_default(tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    soundfile.write(path, sine(8000, 0.5), 8000, subtype="FLOAT")
    np.testing.assert_array_equal(np.concatenate(list(AudioFile(path).blocks())), sine(8000, 0.5))


def test_text_named_wav(tmp_path: Path) -> None:
    path = tmp_path / "notes.wav"
    path.write_text("these are my notes, not a recording\n" * 20)
    with pytest.raises(AudioError, match=r"notes\.wav: cannot be read as audio .*expected wav"):
        AudioFile(path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"none\.wav: No such file.*check the path"):
        AudioFile(tmp_path / "none.wav")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="got a folder, expected an audio file"):
        AudioFile(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.wav"
    path.touch()
    with pytest.raises(AudioError, match=r"empty\.wav: the file is empty \(0 bytes\)"):
        AudioFile(path)


def test_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "hollow.wav"
    soundfile.write(path, np.zeros(0), 16000)
    with pytest.raises(AudioError, match="got no samples, expected some audio"):
        load_audio(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "broken.wav"
    pcm = sine(16000)
    pcm[4000] = bad
    soundfile.write(path, pcm, 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"got NaN or infinity at 0\.250 s"):
        load_audio(path)


def test_damaged_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "half.flac"
    noise = np.random.default_rng(0).normal(0, 0.1, 48000)
    soundfile.write(path, noise, 16000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match="cannot be read as audio"):
        load_audio(path)


@pytest.mark.parametrize("rate", [1, 100, 2_000_000_000])
def test_a_header_with_a_rate_that_is_none(tmp_path: Path, rate: int) -> None:
    """A few bytes at 1 Hz would be days of audio."""
    path = tmp_path / "odd.wav"
    soundfile.write(path, np.zeros(1000, np.int16), 16000)
    data = bytearray(path.read_bytes())
    data[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(AudioError, match=f"{rate} Hz"):
        AudioFile(path)


def test_blocks_of_many_channels_are_short(tmp_path: Path) -> None:
    path = tmp_path / "wide.wav"
    soundfile.write(path, np.zeros((16000, 500), np.int16), 16000)
    blocks = list(AudioFile(path).blocks(seconds=30.0))
    assert max(map(len, blocks)) * 500 <= 1 << 22
    assert sum(map(len, blocks)) == 16000
