"""Noise to mix with speech: made here, or drawn from recordings.

Levels are root mean squares over the whole of speech and noise, so a recording with long pauses is
a little noisier than its figure says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loquent.engine.audio import load_audio
from loquent.engine.errors import AudioError
from loquent.models.data import DataError

Float32 = NDArray[np.float32]

# Exponents of 1/f**x in the power spectrum.
COLOURS = {"white": 0.0, "pink": 1.0, "brown": 2.0}
KINDS = (*COLOURS, "babble")
_AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3")
_TALKERS = 6


class Noise(Protocol):
    """Where noise comes from."""

    def draw(self, samples: int, rng: np.random.Generator) -> Float32:
        """(samples,) of noise of some level, decided by ``rng`` alone."""


class MadeNoise:
    """Coloured noise, or a babble that needs no recordings.

    Args:
        kind: ``white``, ``pink``, ``brown`` or ``babble``: six talkers of filtered noise with the
            long-term spectrum of speech (flat to 500 Hz, then -9 dB an octave, ANSI S3.5), each
            rising and falling with its own syllables, two to eight a second.
        sample_rate: Hz.

    Raises:
        DataError: another kind.
    """

    def __init__(self, kind: str, sample_rate: int = 16000) -> None:
        if kind not in KINDS:
            raise DataError(f"got noise {kind!r}, expected one of {', '.join(KINDS)}")
        self.kind, self.sample_rate = kind, sample_rate

    def draw(self, samples: int, rng: np.random.Generator) -> Float32:
        """See :class:`Noise`."""
        hz = np.fft.rfftfreq(max(2, samples), 1 / self.sample_rate)
        if self.kind != "babble":
            power = np.maximum(hz, 20.0) ** -COLOURS[self.kind]
            return _shaped(np.sqrt(power), samples, rng)
        shape = np.maximum(hz / 500, 1.0) ** -1.5 * (hz > 80)
        total = np.zeros(samples)
        time = np.arange(samples) / self.sample_rate
        for _ in range(_TALKERS):
            beats = rng.uniform(2, 8)
            phase = np.cumsum(1 + 0.5 * np.sin(2 * np.pi * 0.7 * time + rng.uniform(0, 7)))
            envelope = 1 + np.sin(2 * np.pi * beats * phase / self.sample_rate + rng.uniform(0, 7))
            # A voice of its own: its spectrum has a tilt and two resonances.
            formants = sum(
                np.exp(-(((hz - f) / (0.15 * f)) ** 2))
                for f in (rng.uniform(300, 900), rng.uniform(900, 2500))
            )
            total += envelope * _shaped(shape * (0.4 + formants), samples, rng)
        return _level(total)


class RecordedNoise:
    """Recordings from a folder or a manifest, drawn at random and repeated to the length needed.

    Raises:
        DataError: there are none, or one cannot be read.
    """

    def __init__(self, source: Path, sample_rate: int = 16000) -> None:
        self.sample_rate = sample_rate
        self.files = _recordings(source)
        if not self.files:
            raise DataError(
                f"{source}: got no recordings, expected a folder with some of "
                f"{', '.join(_AUDIO)} or a JSONL manifest with audio"
            )

    def draw(self, samples: int, rng: np.random.Generator) -> Float32:
        """See :class:`Noise`."""
        path = self.files[int(rng.integers(len(self.files)))]
        try:
            noise = _load(path, self.sample_rate)
        except AudioError as error:
            raise DataError(f"noise: {error}") from error
        start = int(rng.integers(len(noise)))
        return np.resize(np.roll(noise, -start), samples).astype(np.float32)


def open_noise(source: str, sample_rate: int = 16000) -> Noise:
    """A kind of :class:`MadeNoise`, or the path of recordings. Raises DataError."""
    if Path(source).exists():
        return RecordedNoise(Path(source), sample_rate)
    if source not in KINDS:
        raise DataError(
            f"got noise {source!r}, expected an existing folder or JSONL manifest of recordings, "
            f"or one of {', '.join(KINDS)}"
        )
    return MadeNoise(source, sample_rate)


def mix(speech: Float32, noise: Float32, snr_db: float) -> Float32:
    """``speech`` with ``noise`` ``snr_db`` below it; turned down as a whole where it would clip."""
    power = float(np.mean(np.square(speech), dtype=np.float64)) if len(speech) else 0.0
    other = float(np.mean(np.square(noise), dtype=np.float64)) if len(noise) else 0.0
    if not power or not other:
        return speech
    gain = np.sqrt(power / other) * 10 ** (-snr_db / 20)
    out = speech + np.float32(gain) * noise
    peak = float(np.abs(out).max())
    result: Float32 = (out / np.float32(peak) if peak > 1 else out).astype(np.float32, copy=False)
    return result


def _shaped(amplitude: NDArray[np.float64], samples: int, rng: np.random.Generator) -> Float32:
    """Gaussian noise of unit level with this amplitude spectrum."""
    white = np.fft.rfft(rng.standard_normal(max(2, samples)))
    return _level(np.fft.irfft(white * amplitude, max(2, samples))[:samples])


def _level(x: NDArray[np.float64]) -> Float32:
    rms = np.sqrt(np.mean(np.square(x))) if len(x) else 0.0
    return (x / rms if rms else x).astype(np.float32)


@lru_cache(maxsize=512)
def _load(path: Path, sample_rate: int) -> Float32:
    return load_audio(path, sample_rate=sample_rate)


def _recordings(source: Path) -> Sequence[Path]:
    if source.is_dir():
        return sorted(p for p in source.rglob("*") if p.suffix.lower() in _AUDIO)
    try:
        rows = [json.loads(line) for line in source.read_text("utf-8").split("\n") if line.strip()]
        return [source.parent / row["audio"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source}: {type(error).__name__} {error}; expected a folder of recordings, or a "
            "JSONL manifest with `audio` in every row"
        ) from error
