"""Manifests, the feature cache, batches, augmentation and prefetching."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from loquent.engine.audio import load_audio
from loquent.engine.errors import AudioError
from loquent.engine.features import Fbank, fbank, whisper_spec
from loquent.models.data import (
    Augment,
    DataError,
    FeatureCache,
    Utterance,
    augment,
    collate,
    epoch_batches,
    pause,
    prefetch,
    read_manifest,
)

SPEC = whisper_spec()
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a manifest of these lines: strings as they are, dicts as JSON."""

    def manifest(*lines: str | dict[str, object]) -> Path:
        path = tmp_path / "set.jsonl"
        text = [
            line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)
            for line in lines
        ]
        path.write_text("\n".join(text) + "\n", encoding="utf-8")
        return path

    return manifest


def row(**changes: object) -> dict[str, object]:
    return {"audio": "a.wav", "text": "Hello, you", "duration": 1.5, **changes}


# Manifests


def test_manifest(write: Write) -> None:
    path = write(row(source="radio", licence="CC0", speaker="x"), "", row(audio="/abs/b.wav"))
    first, second = read_manifest(path)
    assert first == Utterance(path.parent / "a.wav", "hello you", "radio", 1.5)
    assert second == Utterance(Path("/abs/b.wav"), "hello you", "set", 1.5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "JSONDecodeError"),
        ("[1, 2]", "TypeError"),
        ("17", "TypeError"),
        (row() | {"text": 5}, "TypeError"),
        (json.dumps({"audio": "a.wav", "duration": 1}), "KeyError 'text'"),
        (json.dumps({"text": "a", "duration": 1}), "KeyError 'audio'"),
        (json.dumps({"audio": "a.wav", "text": "a"}), "KeyError 'duration'"),
        (row(duration="long"), "ValueError.*'long'"),
        (row(audio=None), "TypeError"),
    ],
    ids=["json", "list", "number", "text-5", "text", "audio", "duration", "long", "null"],
)
def test_a_bad_line_is_named(write: Write, line: str | dict[str, object], message: str) -> None:
    path = write(row(), row(), line, row())
    expected = rf"set\.jsonl:3: {message}.*expected a JSON object with audio, text and duration"
    with pytest.raises(DataError, match=expected):
        read_manifest(path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: no such manifest; expected a JSONL file"):
        read_manifest(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="no such manifest"):
        read_manifest(tmp_path)
    binary = tmp_path / "audio.wav"
    binary.write_bytes(b"RIFF\xff\xfe\xfd")
    with pytest.raises(DataError, match=r"audio\.wav: cannot be read as a JSONL file"):
        read_manifest(binary)


def test_rare_line_separators_do_not_split_a_row(write: Write) -> None:
    (utterance,) = read_manifest(write(row(text="one\u2028two\x85three")))
    assert utterance.text == "one two three"


def test_unusable_rows_are_left_out(write: Write) -> None:
    path = write(
        row(text="...", audio="1"),
        row(text=None, audio="2"),
        row(text="in 1984", audio="3"),
        row(duration=30.5, audio="4"),
        row(audio="5"),
    )
    assert [u.audio.name for u in read_manifest(path)] == ["5"]
    assert [u.audio.name for u in read_manifest(path, max_seconds=31)] == ["4", "5"]


def test_licences_are_excluded(write: Write) -> None:
    path = write(
        row(audio="1", licence="CC-BY-NC-4.0"),
        row(audio="2", licence="CC-BY-4.0"),
        row(audio="3", licence="research only"),
        row(audio="4"),
    )
    assert [u.audio.name for u in read_manifest(path)] == ["1", "2", "3", "4"]
    assert [u.audio.name for u in read_manifest(path, exclude_licences=["NC"])] == ["2", "3", "4"]
    kept = read_manifest(path, exclude_licences=["NC", "research"])
    assert [u.audio.name for u in kept] == ["2", "4"]


# The feature cache


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Utterance]:
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    utterances = []
    for i, samples in enumerate((3000, 12345, 100)):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(samples), 16000)
        utterances.append(Utterance(folder / f"{i}.wav", "text", "noise", samples / 16000))
    return utterances


def test_cache_holds_the_engines_features(clips: list[Utterance], tmp_path: Path) -> None:
    cache = FeatureCache(clips, SPEC, tmp_path, workers=1)
    assert len(cache) == 3
    for i, utterance in enumerate(clips):
        expected = fbank(SPEC, load_audio(utterance.audio))
        assert cache.frames(i) == len(expected)
        np.testing.assert_array_equal(cache[i], expected.astype(np.float16))


def test_cache_is_reused(clips: list[Utterance], tmp_path: Path) -> None:
    first = FeatureCache(clips, SPEC, tmp_path, workers=1)
    made = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    second = FeatureCache(clips, SPEC, tmp_path, workers=1)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == made
    np.testing.assert_array_equal(first[1], second[1])


def test_cache_is_made_anew_for_other_features_or_clips(
    clips: list[Utterance], tmp_path: Path
) -> None:
    first = FeatureCache(clips, SPEC, tmp_path, workers=1)
    louder = dataclasses.replace(SPEC, input_scale=2.0)
    other = FeatureCache(clips, louder, tmp_path, workers=1)
    expected = fbank(louder, load_audio(clips[1].audio))
    np.testing.assert_array_equal(other[1], expected.astype(np.float16))
    fewer = FeatureCache(clips[1:], SPEC, tmp_path, workers=1)
    np.testing.assert_array_equal(fewer[0], first[1])
    # The same name with another recording in it.
    recorded = load_audio(clips[1].audio)
    soundfile.write(clips[1].audio, recorded[: len(recorded) // 2], SPEC.sample_rate)
    shorter = FeatureCache(clips, SPEC, tmp_path, workers=1)
    np.testing.assert_array_equal(shorter[0], first[0])
    assert shorter.frames(1) < first.frames(1)


def test_a_cache_that_was_not_finished_is_made_anew(clips: list[Utterance], tmp_path: Path) -> None:
    first = np.array(FeatureCache(clips, SPEC, tmp_path, workers=1)[1])
    (index,) = tmp_path.glob("*.npy")
    (data,) = tmp_path.glob("*.f16")
    index.unlink()
    data.write_bytes(b"\0" * 10)
    np.testing.assert_array_equal(FeatureCache(clips, SPEC, tmp_path, workers=1)[1], first)


def test_a_broken_clip_leaves_no_cache(clips: list[Utterance], tmp_path: Path) -> None:
    broken = [*clips, Utterance(tmp_path / "gone.wav", "text", "noise", 1.0)]
    with pytest.raises(AudioError, match=r"gone\.wav: No such file"):
        FeatureCache(broken, SPEC, tmp_path / "cache", workers=1)
    assert not list((tmp_path / "cache").glob("*.npy"))


# Augmentation

OFF = Augment(
    tempo=0,
    lead=(0.0, 0.0),
    warp=0,
    gain=0,
    freq_masks=0,
    time_masks=0,
    noise=0,
    reverb=0,
    tilt=0,
    band=0,
)


@settings(max_examples=60)
@given(frames=st.integers(1, 300), seed=st.integers(0, 1000))
def test_augmented_features_are_like_features(frames: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(0, 1, (frames, 80)).astype(np.float32))
    before = x.clone()
    y = augment(x, SPEC, Augment(), rng)
    assert y.shape[1] == 80
    assert frames / 1.12 - 1 <= len(y) <= frames / 0.88 + 1
    assert torch.isfinite(y).all()
    assert y.min() >= Fbank(SPEC).pad_frame[0]
    assert torch.equal(x, before)


def test_noise_needs_no_label(write: Write) -> None:
    row = {"audio": "dog.opus", "duration": 5.0}
    [noise] = read_manifest(write(row), labelled=False)
    assert (noise.audio.name, noise.text) == ("dog.opus", "")
    with pytest.raises(DataError, match="text"):
        read_manifest(write(row))


def test_no_augmentation_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(1, 0.1, (50, 80)).astype(np.float32))
    torch.testing.assert_close(augment(x, SPEC, OFF, rng), x, atol=1e-4, rtol=0)


def test_gain_is_in_decibels() -> None:
    """Features of louder audio are what the augmentation makes of those of the original."""
    rng = np.random.default_rng(0)
    pcm = (0.02 * rng.standard_normal(16000)).astype(np.float32)
    x = torch.from_numpy(fbank(SPEC, pcm))
    only_gain = dataclasses.replace(OFF, gain=6.0)
    y = augment(x, SPEC, only_gain, np.random.default_rng(1))
    # tempo and warp are drawn first.
    drawn = np.random.default_rng(1)
    drawn.uniform(0, 0), drawn.uniform(0, 0)
    decibels = drawn.uniform(-6, 6)
    assert abs(decibels) > 1
    louder = fbank(SPEC, (pcm * 10 ** (decibels / 20)).astype(np.float32))
    torch.testing.assert_close(y, torch.from_numpy(louder), atol=1e-3, rtol=0)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_a_warp_moves_frequencies_by_one_factor(seed: int) -> None:
    """All harmonics move alike, where a stretched mel axis moves the high ones farther."""
    warp = dataclasses.replace(OFF, warp=0.15)
    drawn = np.random.default_rng(seed)
    drawn.uniform()
    factor = 1 + drawn.uniform(-0.15, 0.15)
    time = np.arange(16000) / SPEC.sample_rate

    def tones(change: float) -> NDArray[np.float32]:
        hz = np.array([400.0, 1100.0, 2700.0, 5200.0]) * change
        sound = 0.05 * np.sin(2 * np.pi * np.outer(hz, time)).sum(0)
        return fbank(SPEC, sound.astype(np.float32))[20:80]

    ours = augment(torch.from_numpy(tones(1.0)), SPEC, warp, np.random.default_rng(seed))
    theirs = tones(1 / factor).mean(0)
    peaks = [np.flatnonzero(_peak(x)) for x in (ours.numpy().mean(0), theirs)]
    assert len(peaks[0]) == len(peaks[1]) == 4
    assert np.abs(peaks[0] - peaks[1]).max() <= 1


def _peak(x_F: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where a spectrum of few tones has one: far above what lies five bins beside it."""
    wide = np.pad(x_F, 5, constant_values=x_F.min())
    around = np.stack([wide[k : k + len(x_F)] for k in range(11)])
    result: NDArray[np.bool_] = (x_F == around.max(0)) & (x_F > x_F.max() - 0.5)
    return result


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000))
def test_a_pause_is_as_quiet_as_the_quietest_parts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pcm = 0.001 * rng.standard_normal(32000)
    pcm[4000:24000] += 0.1 * rng.standard_normal(20000)
    x = torch.from_numpy(fbank(SPEC, pcm.astype(np.float32)))
    lead = pause(x, SPEC, dataclasses.replace(OFF, lead=(1.0, 0.5)), rng)
    assert len(lead) < 50
    if len(lead) > 10:
        background = float(x[:20].mean())
        silence = float(Fbank(SPEC).pad_frame[0])
        level = float(lead.mean())
        # Three decibels, or nothing at all.
        assert abs(level - background) < 0.3 * SPEC.scale[0] or level == pytest.approx(silence)


def test_pauses_come_as_often_as_asked_for() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (50, 80)).astype(np.float32))
    some = dataclasses.replace(OFF, lead=(0.5, 1.0))
    lengths = [len(pause(x, SPEC, some, np.random.default_rng(seed))) for seed in range(400)]
    assert 0.42 < np.mean([n > 0 for n in lengths]) < 0.56
    assert max(lengths) in range(90, 100)
    assert len(pause(x, SPEC, OFF, np.random.default_rng(0))) == 0


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "made"])
def test_noise_is_added_at_the_drawn_distance(recorded: bool) -> None:
    rng = np.random.default_rng(0)
    loud = fbank(SPEC, (0.1 * rng.standard_normal(32000)).astype(np.float32))
    noise = fbank(SPEC, (0.03 * rng.standard_normal(24000)).astype(np.float32)).astype(np.float16)
    at_10_db = dataclasses.replace(OFF, noise=1.0, snr=(10.0, 10.0))
    noises = [noise] if recorded else []

    def total(x: Tensor) -> float:
        log = x / torch.from_numpy(SPEC.scale) + torch.from_numpy(SPEC.mean)
        return float(torch.pow(10.0, log).sum(1).mean())

    x = torch.from_numpy(loud)
    added = [
        total(augment(x, SPEC, at_10_db, np.random.default_rng(seed), noises)) - total(x)
        for seed in range(8)
    ]
    # The level of the speech is measured on its louder half, hence the tolerance.
    measured = [10 * math.log10(total(x) / a) for a in added]
    assert measured == pytest.approx([10.0] * 8, abs=1.0)


def test_a_room_leaves_what_came_before_a_sound_as_it_was() -> None:
    pcm = np.zeros(32000, np.float32)
    pcm[8000:10000] = 0.1 * np.random.default_rng(0).standard_normal(2000)
    x = torch.from_numpy(fbank(SPEC, pcm))
    y = augment(x, SPEC, dataclasses.replace(OFF, reverb=1.0), np.random.default_rng(3))
    # A room doubles the power of steady sound, here that of silence, by 3 dB at most.
    torch.testing.assert_close(y[:45], x[:45], atol=0.3 * SPEC.scale[0], rtol=0)
    tail = (y - x)[65:85].mean(1)
    assert tail[0] > 0.2
    assert bool((tail.diff() < 1e-4).all())


def _through(
    pcm: NDArray[np.float32], gain_of: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> Tensor:
    """Features of audio gone through a filter with that gain in dB at each Hz."""
    hz = np.fft.rfftfreq(len(pcm), 1 / SPEC.sample_rate).clip(1)
    filtered = np.fft.irfft(np.fft.rfft(pcm) * 10 ** (gain_of(hz) / 20), len(pcm))
    return torch.from_numpy(fbank(SPEC, filtered.astype(np.float32)))


@pytest.mark.parametrize("what", ["tilt", "band"])
def test_a_channel_changes_features_as_a_filter_changes_audio(what: str) -> None:
    seed = 7
    pcm = (0.05 * np.random.default_rng(0).standard_normal(32000)).astype(np.float32)
    x = torch.from_numpy(fbank(SPEC, pcm))
    channel = dataclasses.replace(OFF, **({"tilt": 6.0} if what == "tilt" else {"band": 1.0}))
    y = augment(x, SPEC, channel, np.random.default_rng(seed))
    # What is drawn before: tempo, warp, gain, whether there is a room, and noise.
    drawn = np.random.default_rng(seed)
    drawn.uniform(), drawn.uniform(), drawn.uniform(), drawn.random(), drawn.random()
    tilt, _ = drawn.uniform(-channel.tilt, channel.tilt), drawn.random()
    low, high = drawn.uniform(80, 400), drawn.uniform(2800, 6000)
    slope = drawn.uniform(24, 96) if what == "band" else 0.0

    def gain(hz: NDArray[np.float64]) -> NDArray[np.float64]:
        outside = np.log2(low / hz).clip(0) + np.log2(hz / high).clip(0)
        return (tilt * np.log2(hz / 1000)).clip(-15, 15) - (slope * outside).clip(max=60)

    def decibels(difference: Tensor) -> Tensor:
        mean: Tensor = (difference / SPEC.scale[0] * 10).mean(0)
        return mean[10:]  # the lowest bins are as wide as a slope is long

    assert decibels(y - x).abs().max() > 8
    error = decibels(y - _through(pcm, gain)).abs()
    assert error.mean() < 0.5
    assert error.max() < 3


def test_augmentation_is_a_function_of_its_generator() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (120, 80)).astype(np.float32))
    same = [augment(x, SPEC, Augment(), np.random.default_rng(7)) for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(
        augment(x, SPEC, Augment(tempo=0), np.random.default_rng(7)),
        augment(x, SPEC, Augment(tempo=0), np.random.default_rng(8)),
    )


# Batches


lengths = st.lists(st.integers(1, 400), min_size=1, max_size=60)


@given(frames=lengths, limit=st.integers(50, 2000), seed=st.integers(0, 99))
def test_an_epoch_is_complete_bounded_and_reproducible(
    frames: list[int], limit: int, seed: int
) -> None:
    batches = epoch_batches(frames, [1.0] * len(frames), limit, seed)
    assert sorted(i for batch in batches for i in batch) == list(range(len(frames)))
    for batch in batches:
        assert len(batch) == 1 or max(frames[i] for i in batch) * len(batch) <= limit
    assert epoch_batches(frames, [1.0] * len(frames), limit, seed) == batches


def test_little_of_a_batch_is_padding() -> None:
    rng = np.random.default_rng(0)
    frames = [int(n) for n in rng.integers(100, 2000, 1000)]
    batches = epoch_batches(frames, [1.0] * 1000, 12000, seed=1)
    padded = sum(max(frames[i] for i in batch) * len(batch) for batch in batches)
    assert sum(frames) / padded > 0.8


def test_epochs_differ() -> None:
    frames = [100] * 40
    assert epoch_batches(frames, [1.0] * 40, 500, 1) != epoch_batches(frames, [1.0] * 40, 500, 2)


def test_shares_are_probabilities() -> None:
    weights = [0.0] * 100 + [0.25] * 1000 + [1.0] * 100 + [3.0] * 100
    taken = [i for b in epoch_batches([10] * 1300, weights, 100, 0) for i in b]
    assert len(taken) == len(set(taken))
    assert not [i for i in taken if i < 100]
    assert 200 < len([i for i in taken if 100 <= i < 1100]) < 300
    assert [i for i in sorted(taken) if i >= 1100] == list(range(1100, 1300))


def test_collate_pads_with_silence() -> None:
    silence = torch.from_numpy(Fbank(SPEC).pad_frame)
    features = [torch.ones(n, 80) for n in (5, 9)]
    batch = collate(features, [[4, 5, 6], []], [7, 3], silence, multiple=4, room=3)
    assert batch.x_BTF.shape == (2, 12 + 3, 80)
    assert batch.lengths_B.tolist() == [5, 9]
    assert torch.equal(batch.x_BTF[0, :5], features[0])
    assert (batch.x_BTF[0, 5:] == silence).all()
    assert (batch.x_BTF[1, 9:] == silence).all()
    assert batch.targets_BU.tolist() == [[4, 5, 6], [0, 0, 0]]
    assert batch.targets_B.tolist() == [3, 0]
    assert batch.indices == (7, 3)


# Prefetching


def test_prefetch_keeps_the_order() -> None:
    assert list(prefetch(iter(range(100)), depth=3)) == list(range(100))
    assert list(prefetch(iter([]))) == []


def test_prefetch_surfaces_exceptions() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise DataError("the disk is gone")

    got = prefetch(items())
    assert next(got) == 1
    with pytest.raises(DataError, match="the disk is gone"):
        next(got)


def test_prefetch_works_ahead_but_not_without_limit() -> None:
    made = 0
    enough = threading.Event()

    def items() -> Iterator[int]:
        nonlocal made
        while True:
            made += 1
            if made == 4:
                enough.set()
            yield made

    before = threading.active_count()
    got = prefetch(items(), depth=3)
    assert next(got) == 1
    assert enough.wait(10)
    assert made <= 6
    got.close()
    assert threading.active_count() == before
