"""Training data: JSONL manifests, a feature cache on disk, batches and augmentation.

A manifest has one JSON object a line: ``audio`` (path, relative to the manifest), ``text``,
``duration`` (s), ``source``, and optionally ``licence`` and ``speaker``.

Features are computed once, by the engine's own :func:`~loquent.engine.features.fbank`, and kept as
float16 in one file that is mapped into memory (0.06 GB an hour). Augmentation works on features,
so a run costs no audio decoding at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from loquent.engine.audio import load_audio
from loquent.engine.features import Fbank, FeatureSpec, fbank
from loquent.models.text import normalise


class DataError(ValueError):
    """A manifest is wrong; the message says where and what to do."""


def refuse_overwriting(output: Path, inputs: Iterable[Path | None]) -> None:
    """Raise DataError if a command would write over what it reads."""
    for path in inputs:
        if path is not None and output.exists() and path.exists() and output.samefile(path):
            raise DataError(f"{output} is an input, which the output would destroy; rename one")


@dataclass(frozen=True)
class Utterance:
    """One row of a manifest.

    Attributes:
        audio: resolved path.
        text: normalised transcript.
        source: name of the corpus.
        duration: seconds.
        row: the manifest's row as it stands: the text before normalisation, the speaker.
    """

    audio: Path
    text: str
    source: str
    duration: float
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


def read_manifest(
    path: Path,
    *,
    exclude_licences: Sequence[str] = (),
    max_seconds: float = 30.0,
    labelled: bool = True,
) -> list[Utterance]:
    """Rows of a JSONL manifest whose licence contains none of ``exclude_licences``.

    Rows without text, with digits left (how they were read is unknown) or over ``max_seconds`` are
    left out. Noise needs no text: ``labelled=False`` takes every row.

    Raises:
        DataError: no such file, a line that is no JSON object, or a field that is missing.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such manifest; expected a JSONL file")
    try:
        # Not splitlines(): JSON strings may hold the rarer line separators of Unicode.
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a JSONL file ({error})") from error
    rows: list[Utterance] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line)
            text = normalise(row["text"] or "") if labelled else ""
            utterance = Utterance(
                audio=path.parent / row["audio"],
                text=text,
                source=row.get("source", path.stem),
                duration=float(row["duration"]),
                row=row,
            )
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}:{number}: {type(error).__name__} {error}; expected a JSON object with "
                "audio, text and duration"
            ) from error
        licence = str(row.get("licence", ""))
        unusable = not text or any(c.isdigit() for c in text) or utterance.duration > max_seconds
        if (labelled and unusable) or any(part in licence for part in exclude_licences):
            continue
        rows.append(utterance)
    return rows


def _features_of(job: tuple[Path, FeatureSpec]) -> NDArray[np.float16]:
    path, spec = job
    return fbank(spec, load_audio(path, sample_rate=spec.sample_rate)).astype(np.float16)


def _stamp(path: Path) -> str:
    """Changes when the file does."""
    try:
        found = path.stat()
    except OSError:
        return ""  # which reading it will say better
    return f"{found.st_size} {found.st_mtime_ns}"


class FeatureSource(Protocol):
    """Where training takes its features from: a cache, or waveforms that are changed each time."""

    utterances: list[Utterance]
    spec: FeatureSpec

    def __len__(self) -> int: ...

    def frames(self, i: int) -> int:
        """Frames of utterance ``i``, about: for making batches."""

    def features(self, i: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """(T, F) of utterance ``i``; what is random about it comes from ``rng``."""


class FeatureCache:
    """Features of a list of utterances, on disk, made on first use.

    Args:
        utterances: in the order that indices refer to.
        spec: the features.
        folder: where the cache lives; reused when utterances, their files and spec are the same.
        workers: processes that compute features.
    """

    def __init__(
        self, utterances: Sequence[Utterance], spec: FeatureSpec, folder: Path, workers: int = 2
    ) -> None:
        self.utterances = list(utterances)
        self.spec = spec
        key = hashlib.sha256(spec.digest().encode())
        for u in self.utterances:
            key.update(f"{u.audio.resolve()}\0{_stamp(u.audio)}\0".encode())
        stem = folder / key.hexdigest()[:16]
        index, data = stem.with_suffix(".npy"), stem.with_suffix(".f16")
        if not index.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._compute(index, data, workers)
        self._ends: NDArray[np.int64] = np.load(index, allow_pickle=False)
        self._data = np.memmap(data, np.float16, "r").reshape(-1, spec.n_mels)

    def _compute(self, index: Path, data: Path, workers: int) -> None:
        jobs = [(u.audio, self.spec) for u in self.utterances]
        frames: list[int] = []
        partial = data.with_suffix(".part")
        with (
            partial.open("wb") as out,
            ProcessPoolExecutor(workers) as pool,
            tqdm(total=round(sum(u.duration for u in self.utterances)), unit="s audio") as bar,
        ):
            bar.set_description("features")
            done = pool.map(_features_of, jobs, chunksize=32)
            for utterance, features in zip(self.utterances, done, strict=True):
                out.write(features.tobytes())
                frames.append(len(features))
                bar.update(round(utterance.duration))
        partial.replace(data)
        # Written last: its presence says that the data are complete.
        with index.open("wb") as out:
            np.save(out, np.cumsum(frames, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.utterances)

    def frames(self, i: int) -> int:
        """Frames of utterance ``i``."""
        return int(self._ends[i] - (self._ends[i - 1] if i else 0))

    def features(self, i: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """See :class:`FeatureSource`; always the same here."""
        return self[i].astype(np.float32)

    def __getitem__(self, i: int) -> NDArray[np.float16]:
        return self._data[self._ends[i] - self.frames(i) : self._ends[i]]


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Augmentation of features.

    Attributes:
        tempo: largest relative change of speed, by linear interpolation in time.
        lead: how often a pause is put in front (streams do not begin with a word), and how long it
            is at most, in seconds.
        warp: largest relative change of frequencies (vocal-tract length; Jaitly and Hinton, 2013).
        gain: largest change of level in dB, drawn uniformly (for ``log10`` features).
        freq_masks, freq_width: SpecAugment (arXiv 1904.08779) masks over mel bins.
        time_masks, time_width: the same over frames; at most a tenth of an utterance each.
        noise, snr: how often noise is added (to the powers, so only to ``log10`` features), and the
            range of its distance to the speech in dB.
        reverb: how often a decaying tail is added to each frame's powers, as a room does.
        tilt: largest tilt of the spectrum in dB an octave, drawn uniformly: microphones differ.
        band: how often all outside a band is damped, as telephones and cheap microphones do.
    """

    tempo: float = 0.12
    lead: tuple[float, float] = (0.5, 1.0)
    warp: float = 0.10
    gain: float = 8.0
    freq_masks: int = 2
    freq_width: int = 14
    time_masks: int = 2
    time_width: int = 20
    noise: float = 0.2
    snr: tuple[float, float] = (5.0, 30.0)
    reverb: float = 0.1
    tilt: float = 3.0
    band: float = 0.1


def augment(
    x_TF: Tensor,
    spec: FeatureSpec,
    settings: Augment,
    rng: np.random.Generator,
    noises: Sequence[NDArray[np.float16]] = (),
) -> Tensor:
    """A changed copy of one utterance's features: (T, F) -> (T', F).

    Args:
        x_TF: features of ``spec``.
        spec, settings: see there.
        rng: everything random comes from it.
        noises: features (T, F) of recorded noise to draw from beside the made one.
    """
    frames, bins = x_TF.shape
    tempo = 1 + rng.uniform(-settings.tempo, settings.tempo)
    warp = 1 + rng.uniform(-settings.warp, settings.warp)
    out_frames = max(1, round(frames / tempo))
    # Pixel centres of the output in [-1, 1] coordinates of the input.
    time = (torch.arange(out_frames) + 0.5) * (2.0 / out_frames) - 1
    freq = (torch.from_numpy(_warped_bins(spec, warp)) + 0.5) * (2.0 / bins) - 1
    grid = torch.stack(torch.meshgrid(time, freq, indexing="ij")[::-1], dim=-1)
    x = F.grid_sample(
        x_TF[None, None], grid[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0, 0]
    per_db = float(spec.scale[0]) / 10
    level = rng.uniform(-settings.gain, settings.gain) * per_db
    silence = float(Fbank(spec).pad_frame[0])
    x = (x + level).clamp_(min=silence)
    if spec.log == "log10":
        x = _room_and_noise(x, spec, settings, rng, noises)
    x = (x + torch.from_numpy(_channel(spec, settings, rng)) * per_db).clamp_(min=silence)
    mean = float(x.mean())
    for _ in range(settings.freq_masks):
        width = int(rng.integers(0, settings.freq_width + 1))
        start = int(rng.integers(0, bins - width + 1))
        x[:, start : start + width] = mean
    for _ in range(settings.time_masks):
        width = int(rng.integers(0, min(settings.time_width, out_frames // 10) + 1))
        start = int(rng.integers(0, out_frames - width + 1))
        x[start : start + width] = mean
    return x


_GATED = 0.25  # part of the pauses that are silent
_QUIET = 0.1  # part of an utterance's frames that are pauses, or nearly


def pause(x_TF: Tensor, spec: FeatureSpec, settings: Augment, rng: np.random.Generator) -> Tensor:
    """What may be put in front of an utterance: (P, F), P = 0 for none.

    As quiet as the quietest parts of the utterance, as the same microphone would hear a room
    before somebody speaks, or now and then silence altogether, as from a microphone with a gate.
    """
    often, longest = settings.lead
    frames = int(rng.uniform(0, longest) * spec.sample_rate / spec.hop)
    if rng.random() >= often or not frames:
        return x_TF[:0]
    if rng.random() < _GATED or spec.log != "log10":
        return torch.from_numpy(Fbank(spec).pad_frame).expand(frames, -1)
    floor = x_TF.quantile(_QUIET, dim=0)
    # Of the powers of a stationary sound, smoothed by a window and a filter.
    change = np.log10(rng.gamma(3.0, 1 / 3.0, size=(frames, x_TF.shape[1]))).astype(np.float32)
    return floor + torch.from_numpy(change) * torch.from_numpy(spec.scale)


def _warped_bins(spec: FeatureSpec, factor: float) -> NDArray[np.float32]:
    """Where each mel bin reads when frequencies are multiplied by ``factor``, in bins: (F,)."""
    hz = np.arange(len(spec.mel)) * (spec.sample_rate / spec.n_fft)
    centres = np.maximum.accumulate(hz @ spec.mel / spec.mel.sum(0))
    # np.interp stays at the last bin beyond it.
    bins: NDArray[np.float64] = np.interp(centres * factor, centres, np.arange(len(centres)))
    return bins.astype(np.float32)


_CUTS = ((80.0, 400.0), (2800.0, 6000.0))  # Hz; a telephone's are 300 and 3,400


def _channel(spec: FeatureSpec, settings: Augment, rng: np.random.Generator) -> NDArray[np.float32]:
    """What a drawn microphone or line adds to each mel bin, in dB: (F,)."""
    centres = spec.mel.argmax(0).clip(1) * (spec.sample_rate / spec.n_fft)
    tilt = rng.uniform(-settings.tilt, settings.tilt)
    response = (tilt * np.log2(centres / 1000.0)).clip(-15.0, 15.0)
    if rng.random() < settings.band:
        low, high = (rng.uniform(*cut) for cut in _CUTS)
        octaves = np.log2(low / centres).clip(0) + np.log2(centres / high).clip(0)
        response = response - (rng.uniform(24.0, 96.0) * octaves).clip(max=60.0)
    result: NDArray[np.float32] = response.astype(np.float32)
    return result


_TAIL = 40  # frames of a room's decay that are worth computing
_MADE = 0.3  # part of the noise that is made instead of drawn from recordings


def _room_and_noise(
    x_TF: Tensor,
    spec: FeatureSpec,
    settings: Augment,
    rng: np.random.Generator,
    noises: Sequence[NDArray[np.float16]],
) -> Tensor:
    room, noisy = rng.random() < settings.reverb, rng.random() < settings.noise
    if not room and not noisy:
        return x_TF
    mean, scale = torch.from_numpy(spec.mean), torch.from_numpy(spec.scale)
    power = torch.pow(10.0, x_TF / scale + mean)
    if room:
        # Sound decays by 60 dB in the reverberation time; the tail holds `direct` dB less than
        # the direct sound. Powers of uncorrelated sounds add.
        seconds, direct = rng.uniform(0.15, 0.8), rng.uniform(0.0, 12.0)
        decay = 10 ** (-6.0 * spec.hop / spec.sample_rate / seconds)
        tail = (1 - decay) * 10 ** (-direct / 10) * decay ** np.arange(_TAIL)
        kernel = torch.from_numpy(np.append(tail[::-1], 1.0).astype(np.float32))
        power = F.conv1d(F.pad(power.T[:, None], (_TAIL, 0)), kernel[None, None])[:, 0].T
    if noisy:
        if noises and rng.random() > _MADE:
            noise = torch.from_numpy(noises[int(rng.integers(len(noises)))].astype(np.float32))
            at = (torch.arange(len(power)) + int(rng.integers(len(noise)))) % len(noise)
            sound = torch.pow(10.0, noise / scale + mean)[at]
        else:
            # Stationary noise of a drawn colour: bin powers are gamma-distributed around it.
            colour = rng.uniform(-3.0, 0.5) * np.linspace(0, 1, len(scale)) + rng.normal(0, 0.2)
            made = rng.gamma(3.0, 1 / 3.0, size=tuple(power.shape)) * 10**colour
            sound = torch.from_numpy(made.astype(np.float32))
        loud = power.sum(1)
        # The level of speech is that of its louder half; pauses say nothing about it.
        speech = loud[loud >= loud.median()].mean()
        snr = rng.uniform(*settings.snr)
        power = power + sound * (speech / sound.sum(1).mean().clamp(min=1e-12) * 10 ** (-snr / 10))
    return (torch.log10(power.clamp(min=1e-10)) - mean) * scale


@dataclass(frozen=True)
class Batch:
    """A batch, padded with the features of silence.

    Attributes:
        x_BTF: (B, T + room, F) float32: ``room`` frames of silence stand behind the longest.
        lengths_B: valid feature frames.
        targets_BU: (B, U) int64, padded with the blank (0).
        targets_B: valid tokens.
        indices: of the utterances in the cache.
    """

    x_BTF: Tensor
    lengths_B: Tensor
    targets_BU: Tensor
    targets_B: Tensor
    indices: tuple[int, ...]


def collate(
    features: Sequence[Tensor],
    targets: Sequence[Sequence[int]],
    indices: Sequence[int],
    silence_F: Tensor,
    *,
    multiple: int,
    room: int,
) -> Batch:
    """Pad to the longest, rounded up to ``multiple`` frames, plus ``room`` frames of context."""
    lengths = [len(x) for x in features]
    longest = -(-max(lengths) // multiple) * multiple
    x = silence_F.expand(len(features), longest + room, -1).clone()
    for row, f in enumerate(features):
        x[row, : len(f)] = f
    width = max(1, *(len(t) for t in targets))
    y = torch.zeros(len(targets), width, dtype=torch.int64)
    for row, t in enumerate(targets):
        y[row, : len(t)] = torch.tensor(t, dtype=torch.int64)
    return Batch(
        x_BTF=x,
        lengths_B=torch.tensor(lengths),
        targets_BU=y,
        targets_B=torch.tensor([len(t) for t in targets]),
        indices=tuple(indices),
    )


def epoch_batches(
    frames: Sequence[int], weights: Sequence[float], batch_frames: int, seed: int
) -> list[list[int]]:
    """Indices of one epoch in batches of about ``batch_frames`` padded frames.

    A function of its arguments alone, so that a resumed run sees the same batches.

    Args:
        frames: length of each utterance.
        weights: probability that an utterance takes part in an epoch (a source's share); 1 or more
            means always, once.
    """
    rng = np.random.default_rng(seed)
    taken = np.flatnonzero(rng.random(len(frames)) < np.asarray(weights))
    # Sorted by length with some noise: little padding, yet different company in every epoch.
    noisy = np.asarray(frames)[taken] * rng.uniform(0.85, 1.15, len(taken))
    batches: list[list[int]] = []
    current: list[int] = []
    longest = 0
    for i in taken[np.argsort(noisy)]:
        length = max(longest, frames[i])
        if current and length * (len(current) + 1) > batch_frames:
            batches.append(current)
            current, length = [], frames[i]
        current.append(int(i))
        longest = length
    if current:
        batches.append(current)
    order = rng.permutation(len(batches))
    return [batches[i] for i in order]


T = TypeVar("T")


def prefetch(items: Iterator[T], depth: int = 4) -> Generator[T]:
    """Run ``items`` in a thread, ``depth`` ahead; its exceptions surface here.

    The thread ends with this generator, also when that is closed before its end.
    """
    done = object()
    waiting: queue.Queue[object] = queue.Queue(depth)
    closed = threading.Event()

    def work() -> None:
        last = done
        try:
            for item in items:
                waiting.put(item)
                if closed.is_set():
                    return
        except BaseException as error:
            last = error
        waiting.put(last)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not done:
            if isinstance(item, BaseException):
                raise item
            yield cast(T, item)
    finally:
        closed.set()
        while thread.is_alive():
            # Room in the queue, in case the thread waits for some.
            with contextlib.suppress(queue.Empty):
                waiting.get(timeout=0.01)
