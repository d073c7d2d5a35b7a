"""Waveform augmentation: what each change does, and that it is a function of the generator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loquent.engine.audio import load_audio
from loquent.engine.features import fbank, kaldi_spec, whisper_spec
from loquent.models.checkpoint import read_tensors
from loquent.models.data import FeatureCache, read_manifest
from loquent.models.noise import MadeNoise
from loquent.models.student import Student, StudentConfig
from loquent.models.tokens import Tokenizer
from loquent.models.training import TrainConfig, Trainer
from loquent.models.waveform import (
    CODECS,
    MASKS,
    Codec,
    WaveAugment,
    WaveformSource,
    change,
    code,
    mulaw,
    reverberate,
    room,
    speed,
    warped,
)

Float32 = NDArray[np.float32]
NOTHING = WaveAugment(speeds=(1.0,), vtlp=0, room=0, noise=0, codec=0, gain=(0, 0))
EVERYTHING = WaveAugment(room=1, noise=1, codec=1)


def tone(hz: float, seconds: float = 0.5, rate: int = 16000) -> Float32:
    time = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * hz * time)).astype(np.float32)


def peak_hz(pcm: Float32, rate: int = 16000) -> float:
    spectrum = np.abs(np.fft.rfft(pcm * np.hanning(len(pcm))))
    return float(spectrum.argmax()) * rate / len(pcm)


@pytest.fixture(scope="module")
def source(corpus: Path) -> WaveformSource:
    return WaveformSource(read_manifest(corpus), whisper_spec(), EVERYTHING)


def test_the_same_generator_gives_the_same_features(source: WaveformSource) -> None:
    first, again = (source.features(3, np.random.default_rng((1, 17))) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = source.features(3, np.random.default_rng((1, 18)))
    assert first.shape != other.shape or not np.array_equal(first, other)
    assert np.isfinite(first).all()
    assert first.dtype == np.float32


def test_nothing_drawn_is_the_engines_features(corpus: Path) -> None:
    rows = read_manifest(corpus)
    plain = WaveformSource(rows, whisper_spec(), NOTHING)
    expected = fbank(whisper_spec(), load_audio(rows[5].audio))
    np.testing.assert_array_equal(plain.features(5, np.random.default_rng(0)), expected)
    np.testing.assert_array_equal(plain[5], expected)
    assert abs(plain.frames(5) - len(expected)) <= 2
    assert len(plain) == len(rows)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(0, 3000))
def test_samples_stay_in_range_and_number(seed: int, samples: int) -> None:
    rng = np.random.default_rng(seed)
    pcm = (0.2 * rng.standard_normal(samples)).astype(np.float32)
    same = WaveAugment(speeds=(1.0,), room=0.5, noise=0.5, codec=0.5)
    out = change(pcm, 16000, same, [MadeNoise("babble")], rng)
    assert len(out) == samples
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    assert np.abs(out).max(initial=0) <= 1


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.25])
def test_speed_moves_length_and_pitch(factor: float) -> None:
    out = speed(tone(1000), 16000, factor)
    assert len(out) == pytest.approx(8000 / factor, abs=2)
    assert peak_hz(out) == pytest.approx(1000 * factor, rel=0.01)


def test_a_room_is_heard_after_the_sound_not_before() -> None:
    pcm = np.zeros(16000, np.float32)
    pcm[4000:4400] = tone(500, 0.025)
    response = room(16000, np.random.default_rng(0))
    assert response[0] == 1
    wet = reverberate(pcm, response)
    assert np.abs(wet[:3990]).max() < 1e-4
    assert np.abs(wet[4500:6000]).max() > 100 * np.abs(pcm[4500:6000]).max()
    assert np.sqrt(np.mean(wet**2)) == pytest.approx(np.sqrt(np.mean(pcm**2)), rel=1e-3)
    # The tail decays: less is left in each tenth of a second.
    energy = [np.square(response[i : i + 1600]).sum() for i in range(1600, 3200, 1600)]
    assert energy[0] < np.square(response[:1600]).sum()


@pytest.mark.parametrize("codec", CODECS)
def test_codecs_keep_speech_and_time_but_not_everything(codec: Codec) -> None:
    low, high = tone(1000, 1.0), tone(6000, 1.0)
    out = code(low + high, 16000, codec, np.random.default_rng(0))
    assert len(out) == 16000
    assert peak_hz(out) == pytest.approx(1000, abs=5) or codec == "opus"
    # Not shifted in time: it agrees best with the original where it lies.
    lags = [int(np.dot(np.roll(out, -k)[500:-500], low[500:-500]) * 100) for k in (-4, 0, 4)]
    assert lags[1] == max(lags)
    if codec != "opus":
        assert np.abs(np.fft.rfft(out))[5000:].max() < 0.01 * np.abs(np.fft.rfft(out)).max()
    assert not np.allclose(out, low + high, atol=1e-3)


def test_mulaw_has_255_values_fine_near_zero() -> None:
    x = np.linspace(-1, 1, 100001).astype(np.float32)
    y = mulaw(x)
    assert len(np.unique(y)) <= 255
    assert np.abs(y - x).max() < 0.03
    quiet = np.abs(x) < 0.01
    assert np.abs(y - x)[quiet].max() < 0.0005


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_vtlp_moves_the_formants(factor: float) -> None:
    spec = kaldi_spec()
    plain, moved = (fbank(s, tone(2000)) for s in (spec, warped(spec, factor)))
    before, after = (x.mean(0).argmax() for x in (plain, moved))
    # A shorter vocal tract resonates higher.
    assert (after > before) == (factor > 1)
    assert after != before
    assert warped(spec, 1.0) is spec
    np.testing.assert_allclose(warped(spec, factor).mel[0], spec.mel[0])


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="got speeds"):
        WaveAugment(speeds=(3.0,))
    with pytest.raises(ValueError, match="got codecs"):
        WaveAugment(codecs=("mp3",))  # type: ignore[arg-type]


def test_training_on_waveforms_resumes_exactly(
    corpus: Path, tmp_path: Path, tiny_config: Callable[[int], StudentConfig]
) -> None:
    rows = read_manifest(corpus)
    tokenizer = Tokenizer.train([u.text for u in rows], 16)
    cache = FeatureCache(rows, whisper_spec(), tmp_path / "features", workers=1)

    def train(run: Path, steps: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        source = WaveformSource(rows, whisper_spec(), EVERYTHING)
        config = TrainConfig(
            steps=steps,
            decay=0,
            batch_seconds=8,
            warmup=2,
            rnnt_from=99,
            save_every=2,
            eval_every=99,
            bf16=False,
            augment=MASKS,
        )
        student = Student(tiny_config(tokenizer.size))
        Trainer(
            run, student, tokenizer, source, cache, [1.0] * len(rows), config, {"start": "nothing"}
        ).fit()
        return read_tensors(run / "last" / "raw.safetensors")

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "stopped", 2)
    resumed = train(tmp_path / "stopped", 4)
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
