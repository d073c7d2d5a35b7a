"""The three presets of the engine's features, held against their originals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchaudio
from numpy.typing import NDArray
from torchaudio.compliance import kaldi
from torchaudio.pipelines.rnnt_pipeline import _piecewise_linear_log
from transformers import WhisperFeatureExtractor

from loquent.engine.features import fbank, kaldi_spec, torchaudio_spec, whisper_spec

Float32 = NDArray[np.float32]


@pytest.fixture(scope="module")
def pcm() -> Float32:
    """Noise that rises and falls, under a sweep; then silence, for the floor."""
    time = np.arange(48077) / 16000
    noise = np.random.default_rng(0).standard_normal(len(time))
    signal = 0.1 * (1.1 + np.sin(5 * time)) * noise + 0.3 * np.sin(900 * (1 + time) * time)
    return np.concatenate([signal, np.zeros(4000)]).astype(np.float32)


def test_kaldi(pcm: Float32) -> None:
    expected = kaldi.fbank(
        torch.from_numpy(pcm)[None],
        num_mel_bins=80,
        dither=0.0,
        snip_edges=True,
        high_freq=-400.0,
        window_type="povey",
    ).numpy()
    got = fbank(kaldi_spec(), pcm)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_kaldi_on_int16_values(pcm: Float32) -> None:
    expected = kaldi.fbank(
        32768 * torch.from_numpy(pcm)[None], num_mel_bins=40, dither=0.0, high_freq=-400.0
    ).numpy()
    got = fbank(kaldi_spec(n_mels=40, input_scale=32768.0), pcm)
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_torchaudio(pcm: Float32) -> None:
    # torchaudio.pipelines.rnnt_pipeline: gain to int16 samples, piecewise log, statistics.
    rng = np.random.default_rng(1)
    mean = rng.normal(12, 3, 80).astype(np.float32)
    invstddev = rng.uniform(0.2, 0.5, 80).astype(np.float32)
    faint = 6e-6 * rng.standard_normal(16000)
    pcm = np.concatenate([pcm, faint]).astype(np.float32)
    mel = torchaudio.transforms.MelSpectrogram(
        sample_rate=16000, n_fft=400, n_mels=80, hop_length=160
    )
    energy = mel(torch.from_numpy(pcm)).T * 10 ** (2 * 20 * np.log10(32767.0) / 20)
    log = _piecewise_linear_log(energy.clone()).numpy()  # it works in place
    between = (energy > np.e) & (energy < np.e**np.e)
    assert between.any()  # where it divides a logarithm once more
    got = fbank(torchaudio_spec(mean, invstddev), pcm)
    assert got.shape == log.shape
    np.testing.assert_allclose(got, (log - mean) * invstddev, atol=1e-3)


def test_whisper_mel_matrix() -> None:
    expected = WhisperFeatureExtractor(feature_size=80).mel_filters
    np.testing.assert_allclose(whisper_spec().mel, expected, atol=1e-7)


def test_whisper_but_for_its_clamp(pcm: Float32) -> None:
    """Whisper clamps to 8 below the loudest bin of the utterance, ours to a fixed floor."""
    loud = pcm[:48000]  # without the silence
    extractor = WhisperFeatureExtractor(feature_size=80)
    expected = extractor(loud, sampling_rate=16000).input_features[0].T
    got = fbank(whisper_spec(), loud)
    # The extractor pads to 30 s with zeros: at the end its frames see them as ours do.
    floor = max(expected.min(), got.min()) + 1e-4
    # It mirrors the signal where ours has silence in front: the first two frames differ.
    both = (np.maximum(got, floor)[2:300], np.maximum(expected, floor)[2:300])
    assert (both[0] > floor).mean() > 0.5
    np.testing.assert_allclose(*both, atol=1e-3)
