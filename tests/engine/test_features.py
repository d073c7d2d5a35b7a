"""Features: streaming equals batch bit for bit, and the spec says what it is.

No torch here; ``tests/models/test_features.py`` holds the three presets against their originals.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loquent.engine.features import (
    Fbank,
    FeatureSpec,
    fbank,
    kaldi_spec,
    torchaudio_spec,
    whisper_spec,
)

Float32 = NDArray[np.float32]

_RNG = np.random.default_rng(0)
SPECS = {
    "whisper": whisper_spec(),
    "kaldi": kaldi_spec(),
    "torchaudio": torchaudio_spec(
        _RNG.normal(10, 2, 80).astype(np.float32), _RNG.uniform(0.2, 0.4, 80).astype(np.float32)
    ),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def noise(samples: int, seed: int = 0) -> Float32:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


@every_spec
@settings(max_examples=60)
@given(
    packets=st.lists(st.integers(0, 700) | st.integers(0, 5), max_size=25), seed=st.integers(0, 9)
)
def test_streaming_is_batch_bit_for_bit(spec: FeatureSpec, packets: list[int], seed: int) -> None:
    pcm = noise(sum(packets), seed)
    stream = Fbank(spec)
    parts, start = [], 0
    for size in packets:
        parts.append(stream.accept(pcm[start : start + size]))
        start += size
        assert sum(map(len, parts)) == stream.frames_after(start)
    parts.append(stream.finish())
    np.testing.assert_array_equal(np.concatenate(parts), fbank(spec, pcm))


@every_spec
def test_streaming_is_batch_for_long_audio_in_long_packets(spec: FeatureSpec) -> None:
    # More frames than one internal block holds.
    pcm = noise(45 * 16000 + 123)
    stream = Fbank(spec)
    parts = [stream.accept(pcm[: 43 * 16000]), stream.accept(pcm[43 * 16000 :]), stream.finish()]
    np.testing.assert_array_equal(np.concatenate(parts), fbank(spec, pcm))


@every_spec
def test_more_samples_never_change_a_frame(spec: FeatureSpec) -> None:
    pcm = noise(16000)
    stream = Fbank(spec)
    early = stream.accept(pcm[:7000])
    assert len(early) > 30
    np.testing.assert_array_equal(early, fbank(spec, pcm)[: len(early)])


@every_spec
@pytest.mark.parametrize("frames", [1, 2, 3, 50])
def test_samples_for_is_the_least_number_of_samples(spec: FeatureSpec, frames: int) -> None:
    stream = Fbank(spec)
    samples = stream.samples_for(frames)
    assert stream.frames_after(samples) >= frames
    assert stream.frames_after(samples - 1) < frames
    assert len(stream.accept(noise(samples))) == stream.frames_after(samples)


@every_spec
def test_no_audio_has_no_frames(spec: FeatureSpec) -> None:
    stream = Fbank(spec)
    assert stream.samples_for(0) == 0
    assert stream.accept(noise(0)).shape == (0, 80)
    assert stream.finish().shape == (0, 80)


@pytest.mark.parametrize("samples", [1, 100, 200, 201, 399, 400, 401])
def test_frame_count_of_short_audio(samples: int) -> None:
    assert len(fbank(SPECS["whisper"], noise(samples))) == 1 + samples // 160
    assert len(fbank(SPECS["torchaudio"], noise(samples))) == 1 + samples // 160
    assert len(fbank(SPECS["kaldi"], noise(samples))) == (1 if samples >= 400 else 0)


@every_spec
def test_pad_frame_is_the_features_of_silence(spec: FeatureSpec) -> None:
    silent = fbank(spec, np.zeros(1600, np.float32))
    np.testing.assert_array_equal(silent, np.tile(Fbank(spec).pad_frame, (len(silent), 1)))


@every_spec
def test_silence_and_full_scale_are_finite(spec: FeatureSpec) -> None:
    square = np.sign(np.sin(np.arange(4000))).astype(np.float32)
    assert np.isfinite(fbank(spec, square)).all()
    assert np.isfinite(Fbank(spec).pad_frame).all()


def test_finish_ends_a_stream() -> None:
    stream = Fbank(SPECS["whisper"])
    stream.accept(noise(1000))
    assert len(stream.finish()) > 0
    assert len(stream.finish()) == 0
    with pytest.raises(ValueError, match=r"accept\(\) after finish\(\)"):
        stream.accept(noise(10))


def test_stereo_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(10, 2\), expected \(N,\)"):
        Fbank(SPECS["whisper"]).accept(np.zeros((10, 2), np.float32))


# The spec as data


@every_spec
def test_spec_survives_json_and_arrays(spec: FeatureSpec) -> None:
    scalars = json.loads(json.dumps(spec.to_dict()))
    again = FeatureSpec.from_parts(scalars, spec.arrays())
    assert again.digest() == spec.digest()
    pcm = noise(3000)
    np.testing.assert_array_equal(fbank(again, pcm), fbank(spec, pcm))


CHANGES: dict[str, Any] = {
    "sample_rate": 8000,
    "frame_length": None,  # with its window, below
    "hop": 80,
    "n_fft": None,
    "padding": "snip",
    "preemphasis": 0.5,
    "remove_dc": True,
    "input_scale": 2.0,
    "mel_gain": 2.0,
    "log": "ln",
    "floor": 1e-5,
    "window": np.full(400, 0.5, np.float32),
    "mel": np.full((201, 80), 0.5, np.float32),
    "mean": np.ones(80, np.float32),
    "scale": np.full(80, 2.0, np.float32),
}


def test_every_field_has_a_change() -> None:
    assert set(CHANGES) == {field.name for field in dataclasses.fields(FeatureSpec)}


@pytest.mark.parametrize("name", CHANGES)
def test_digest_depends_on_every_field(name: str) -> None:
    changes = {name: CHANGES[name]}
    if name == "frame_length":
        changes = {"frame_length": 320, "window": np.ones(320, np.float32)}
    if name == "n_fft":
        changes = {"n_fft": 512, "mel": np.ones((257, 80), np.float32)}
    spec = SPECS["whisper"]
    assert dataclasses.replace(spec, **changes).digest() != spec.digest()


@pytest.mark.parametrize("name", ["window", "mel", "mean", "scale"])
def test_digest_sees_one_bit_of_an_array(name: str) -> None:
    spec = SPECS["whisper"]
    array = getattr(spec, name).copy()
    array.flat[-1] = np.nextafter(array.flat[-1], np.float32(9), dtype=np.float32)
    assert dataclasses.replace(spec, **{name: array}).digest() != spec.digest()


def test_from_parts_names_the_fields() -> None:
    spec = SPECS["whisper"]
    scalars, arrays = spec.to_dict(), spec.arrays()
    with pytest.raises(ValueError, match=r"got fields .*'hop'.* expected"):
        FeatureSpec.from_parts({**scalars, "colour": 1}, arrays)
    with pytest.raises(ValueError, match=r"expected .*'hop'"):
        FeatureSpec.from_parts({n: v for n, v in scalars.items() if n != "hop"}, arrays)
    with pytest.raises(ValueError, match=r"arrays \['mean'\] are missing"):
        FeatureSpec.from_parts(scalars, {n: v for n, v in arrays.items() if n != "mean"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": np.ones(399, np.float32)}, r"window is float32 \(399,\), expected .*\(400,\)"),
        ({"mel": np.ones((200, 80), np.float32)}, r"mel is .*\(200, 80\), expected .*\(201, 80\)"),
        ({"mean": np.ones(80)}, "mean is float64"),
        ({"hop": 0}, "must be positive"),
        ({"sample_rate": -1}, "must be positive"),
        ({"padding": "mirror"}, "padding is 'mirror'"),
        ({"log": "log2"}, "log is 'log2'"),
        ({"frame_length": 500, "window": np.ones(500, np.float32)}, "500 exceeds n_fft 400"),
        ({"padding": "reflect", "hop": 200}, "hop under half a frame, got hop 200"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_spec_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPECS["whisper"], **change)
