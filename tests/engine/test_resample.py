"""The resampler: the same output for every packet size, of the right length and the right pitch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loquent.engine.resample import Resampler


def resample(pcm: NDArray[np.float32], rate_in: int, packets: list[int]) -> NDArray[np.float32]:
    """The output for a signal in packets of these sizes, over and over."""
    resampler = Resampler(rate_in, 16000)
    parts: list[NDArray[np.float32]] = []
    position = turn = 0
    while position < len(pcm):
        size = packets[turn % len(packets)]
        parts.append(resampler.accept(pcm[position : position + size]))
        position += size
        turn += 1
    return np.concatenate([*parts, resampler.finish()])


@settings(max_examples=40)
@given(
    rate=st.sampled_from([8000, 8001, 11025, 22050, 24000, 32000, 44100, 44099, 47999, 48000])
    | st.integers(8000, 48000),
    length=st.integers(0, 12000),
    packets=st.lists(st.integers(1, 5000), min_size=1, max_size=6),
)
def test_packets_do_not_change_a_bit(rate: int, length: int, packets: list[int]) -> None:
    pcm = np.random.default_rng(length).normal(0, 0.1, length).astype(np.float32)
    whole = resample(pcm, rate, [max(1, length)])
    cut = resample(pcm, rate, packets)
    np.testing.assert_array_equal(cut, whole)
    assert abs(len(whole) - length * 16000 / rate) <= 1


@settings(max_examples=40)
@given(
    rate=st.integers(8000, 48000),
    length=st.integers(1, 20000),
    packets=st.lists(st.integers(1, 5000), min_size=1, max_size=4),
)
def test_bound_holds(rate: int, length: int, packets: list[int]) -> None:
    # BufferFull must be known before anything is consumed, so the bound may never be too low.
    resampler = Resampler(rate, 16000)
    produced = position = turn = 0
    while position < length:
        size = min(packets[turn % len(packets)], length - position)
        most = resampler.most(size)
        now = len(resampler.accept(np.zeros(size, np.float32)))
        assert now <= most
        produced += now
        position += size
        turn += 1
    left = resampler.most(0)
    assert len(resampler.finish()) <= left


def test_identity_at_the_models_rate() -> None:
    pcm = np.random.default_rng(0).normal(0, 0.1, 1000).astype(np.float32)
    output = resample(pcm, 16000, [7])
    np.testing.assert_array_equal(output, pcm)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_pitch_level_and_position_stay(rate: int) -> None:
    t = np.arange(rate) / rate
    output = resample(np.sin(2 * np.pi * 1000 * t).astype(np.float32), rate, [160])
    expected = np.sin(2 * np.pi * 1000 * np.arange(len(output)) / 16000)
    middle = slice(1000, -1000)  # away from the edges, where the filter sees silence
    np.testing.assert_allclose(output[middle], expected[middle], atol=1e-3)


def test_nothing_above_nyquist_folds_back() -> None:
    t = np.arange(48000) / 48000
    output = resample(np.sin(2 * np.pi * 12000 * t).astype(np.float32), 48000, [480])
    assert np.abs(output[1000:-1000]).max() < 1e-3
