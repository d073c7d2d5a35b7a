"""Log-mel filterbank features: one implementation for training and for streaming.

Everything that distinguishes one feature type from another (window, mel matrix, log, mean and
scale) is data in a :class:`FeatureSpec` which travels in the model bundle. Kaldi-style (``knf``),
torchaudio-style and Whisper-style features are three presets of the same code.

Streaming equals batch bit for bit: every frame is computed by the same sequence of operations on
the same number of samples, whatever the packet sizes. That is why the mel projection is a stacked
``matmul`` (one BLAS call of a fixed shape per frame) and not one large product, whose summation
order would depend on the number of rows.

Shapes: N samples, T frames, F mel bins, K = n_fft // 2 + 1 frequency bins.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Padding = Literal["snip", "zeros", "reflect"]
Log = Literal["ln", "log10", "piecewise"]

_SCALARS = (
    "sample_rate",
    "frame_length",
    "hop",
    "n_fft",
    "padding",
    "preemphasis",
    "remove_dc",
    "input_scale",
    "mel_gain",
    "log",
    "floor",
)
_ARRAYS = ("window", "mel", "mean", "scale")
# Bounds the memory of one call on long audio (4096 frames of 512 floats are 8 MB).
_BLOCK_FRAMES = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureSpec:
    """What turns samples into features. All lengths are in samples.

    Attributes:
        sample_rate: Hz.
        frame_length: samples under one window.
        hop: samples from one frame to the next.
        n_fft: FFT length, at least ``frame_length`` (zero-padded at the end).
        padding: ``snip``: frame t covers ``[t*hop, t*hop + frame_length)`` and the tail that fills
            no frame is dropped (Kaldi's ``snip_edges``). ``zeros`` and ``reflect``: frame t is
            centred on sample ``t*hop``, the signal being extended by ``frame_length // 2`` on both
            sides (``torch.stft(center=True)``); N samples give ``1 + N // hop`` frames.
        preemphasis: coefficient applied inside each frame, 0 to switch off.
        remove_dc: subtract the mean of each frame first.
        input_scale: factor on samples in [-1, 1] (32768 for models trained on int16 values).
        mel_gain: factor on mel energies before the logarithm.
        log: ``ln``, ``log10`` or ``piecewise`` (torchaudio's RNN-T pipelines,
            ``torchaudio/pipelines/rnnt_pipeline.py``): ln x above e**e, but (ln x)/e from e to
            e**e and x/e below, as their code, which divides in place what is at most e, does it
            to values whose logarithm it has just taken. Their model was trained with that.
        floor: smallest mel energy fed to ``ln`` or ``log10``.
        window: (frame_length,) float32.
        mel: (K, F) float32.
        mean, scale: (F,) float32; features are ``(log - mean) * scale``.
    """

    sample_rate: int
    frame_length: int
    hop: int
    n_fft: int
    padding: Padding
    preemphasis: float
    remove_dc: bool
    input_scale: float
    mel_gain: float
    log: Log
    floor: float
    window: Float32
    mel: Float32
    mean: Float32
    scale: Float32

    def __post_init__(self) -> None:
        expected = {
            "window": (self.frame_length,),
            "mel": (self.n_fft // 2 + 1, self.n_mels),
            "mean": (self.n_mels,),
            "scale": (self.n_mels,),
        }
        for name, shape in expected.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != np.float32:
                raise ValueError(
                    f"feature spec: {name} is {array.dtype} {array.shape}, expected float32 {shape}"
                )
        if self.frame_length > self.n_fft:
            raise ValueError(
                f"feature spec: frame_length {self.frame_length} exceeds n_fft {self.n_fft}"
            )
        if self.hop <= 0 or self.sample_rate <= 0 or self.frame_length <= 0:
            raise ValueError("feature spec: sample_rate, frame_length and hop must be positive")
        if self.padding == "reflect" and self.frame_length - self.hop <= self.frame_length // 2:
            raise ValueError(
                "feature spec: padding 'reflect' needs a hop under half a frame, got "
                f"hop {self.hop} with frame_length {self.frame_length}"
            )
        if self.padding not in ("snip", "zeros", "reflect"):
            raise ValueError(f"feature spec: padding is {self.padding!r}")
        if self.log not in ("ln", "log10", "piecewise"):
            raise ValueError(f"feature spec: log is {self.log!r}")

    @property
    def n_mels(self) -> int:
        """Number of features per frame, F."""
        return int(self.mel.shape[1])

    @property
    def pad(self) -> int:
        """Samples of padding before the first real one."""
        return 0 if self.padding == "snip" else self.frame_length // 2

    def to_dict(self) -> dict[str, Any]:
        """The scalars, ready for JSON."""
        return {name: getattr(self, name) for name in _SCALARS}

    def arrays(self) -> dict[str, Float32]:
        """The arrays, ready for ``np.savez``."""
        return {name: getattr(self, name) for name in _ARRAYS}

    @classmethod
    def from_parts(
        cls, scalars: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> FeatureSpec:
        """Inverse of :meth:`to_dict` and :meth:`arrays`.

        Raises:
            ValueError: a field is missing, unknown, or of the wrong shape.
        """
        names = set(scalars)
        if names != set(_SCALARS):
            raise ValueError(
                f"feature spec: got fields {sorted(names)}, expected {sorted(_SCALARS)}"
            )
        missing = set(_ARRAYS) - set(arrays)
        if missing:
            raise ValueError(f"feature spec: arrays {sorted(missing)} are missing")
        fields: dict[str, Any] = {**scalars, **{name: np.asarray(arrays[name]) for name in _ARRAYS}}
        return cls(**fields)

    def digest(self) -> str:
        """SHA-256 of everything that affects the features, as hex."""
        h = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode())
        for name in _ARRAYS:
            h.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return h.hexdigest()


class Fbank:
    """Streaming features of one signal: ``accept`` packets of any size, then ``finish`` once."""

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec = spec
        self._finished = False
        self._received = 0
        # Samples from the start of the next frame on; holds the left padding once it is known.
        self._tail: Float32 = np.zeros(spec.pad if spec.padding == "zeros" else 0, np.float32)
        self._needs_reflection = spec.padding == "reflect"

    @property
    def pad_frame(self) -> Float32:
        """(F,) features of digital silence, for padding a last window."""
        silence = np.zeros((1, self.spec.frame_length), np.float32)
        return cast(Float32, _frames_to_features(self.spec, silence)[0])

    def frames_after(self, samples: int) -> int:
        """Frames that are out once ``samples`` samples were accepted (before ``finish``)."""
        spec = self.spec
        if spec.padding == "reflect" and samples <= spec.pad:
            return 0
        return max(0, (samples + spec.pad - spec.frame_length) // spec.hop + 1)

    def samples_for(self, frames: int) -> int:
        """Samples that must have been accepted for ``frames`` frames to be out."""
        spec = self.spec
        if frames <= 0:
            return 0
        needed = (frames - 1) * spec.hop + spec.frame_length - spec.pad
        return max(needed, spec.pad + 1) if spec.padding == "reflect" else max(needed, 0)

    def accept(self, samples: Float32) -> Float32:
        """Features that ``samples`` complete.

        Args:
            samples: (N,) float32 in [-1, 1], any N.

        Returns:
            (T, F) float32; T may be 0.

        Raises:
            ValueError: called after :meth:`finish`, or ``samples`` is not one-dimensional.
        """
        if self._finished:
            raise ValueError("features: accept() after finish(); make a new Fbank")
        if samples.ndim != 1:
            raise ValueError(f"features: got samples of shape {samples.shape}, expected (N,)")
        self._received += len(samples)
        self._tail = np.concatenate([self._tail, samples.astype(np.float32, copy=False)])
        pad = self.spec.pad
        if self._needs_reflection:
            if len(self._tail) <= pad:
                return self._empty()
            self._tail = np.concatenate([self._tail[pad:0:-1], self._tail])
            self._needs_reflection = False
        return self._drain()

    def finish(self) -> Float32:
        """The frames that the right edge completes: (T, F). Later calls return (0, F)."""
        if self._finished:
            return self._empty()
        self._finished = True
        spec = self.spec
        if spec.padding == "snip" or self._received == 0:
            return self._empty()
        pad = spec.pad
        if spec.padding == "reflect":
            if self._needs_reflection:
                # Too short to mirror (torch.stft refuses): silence on both sides.
                self._tail = np.concatenate([np.zeros(pad, np.float32), self._tail])
            if self._received > pad:
                right = self._tail[-2 : -pad - 2 : -1]
            else:
                right = np.zeros(pad, np.float32)
        else:
            right = np.zeros(pad, np.float32)
        self._tail = np.concatenate([self._tail, right])
        return self._drain()

    def _empty(self) -> Float32:
        return np.zeros((0, self.spec.n_mels), np.float32)

    def _drain(self) -> Float32:
        spec = self.spec
        count = (len(self._tail) - spec.frame_length) // spec.hop + 1
        if count <= 0:
            return self._empty()
        windows = np.lib.stride_tricks.sliding_window_view(self._tail, spec.frame_length)
        out = np.empty((count, spec.n_mels), np.float32)
        for start in range(0, count, _BLOCK_FRAMES):
            stop = min(start + _BLOCK_FRAMES, count)
            block = windows[start * spec.hop : (stop - 1) * spec.hop + 1 : spec.hop]
            out[start:stop] = _frames_to_features(spec, block)
        self._tail = self._tail[count * spec.hop :].copy()
        return out


def _frames_to_features(spec: FeatureSpec, frames: Float32) -> Float32:
    """(T, frame_length) samples -> (T, F) features; each row is computed on its own."""
    x = np.array(frames, dtype=np.float32, order="C")
    if spec.input_scale != 1.0:
        x *= np.float32(spec.input_scale)
    if spec.remove_dc:
        x -= x.mean(axis=1, keepdims=True, dtype=np.float32)
    if spec.preemphasis:
        c = np.float32(spec.preemphasis)
        first = x[:, :1] * (np.float32(1) - c)
        x = np.concatenate([first, x[:, 1:] - c * x[:, :-1]], axis=1)
    x *= spec.window
    spectrum = np.fft.rfft(x, spec.n_fft, axis=1)
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    energy = np.matmul(power.astype(np.float32, copy=False)[:, None, :], spec.mel)[:, 0]
    if spec.mel_gain != 1.0:
        energy = energy * np.float32(spec.mel_gain)
    if spec.log == "piecewise":
        e = np.float32(math.e)
        log = np.where(energy > e, np.log(np.maximum(energy, e)), energy)
        log = np.where(log > e, log, log / e)
    else:
        energy = np.maximum(energy, np.float32(spec.floor))
        log = np.log(energy) if spec.log == "ln" else np.log10(energy)
    return cast(Float32, ((log - spec.mean) * spec.scale).astype(np.float32, copy=False))


def fbank(spec: FeatureSpec, samples: Float32) -> Float32:
    """Features of a whole signal: (N,) float32 in [-1, 1] -> (T, F) float32."""
    stream = Fbank(spec)
    return np.concatenate([stream.accept(samples), stream.finish()])


def _triangles(edges: NDArray[np.float64], bins: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K, F) triangular filters between consecutive ``edges`` (F + 2,), evaluated at ``bins``."""
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - left) / (centre - left)
    falling = (right - bins[:, None]) / (right - centre)
    return np.maximum(0.0, np.minimum(rising, falling))


def _slaney_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = mel * 200.0 / 3
    return np.where(mel >= 15, 1000.0 * np.exp((mel - 15) * math.log(6.4) / 27.0), linear)


def _hann(length: int) -> Float32:
    """Periodic Hann window, as ``torch.hann_window``."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


def whisper_spec() -> FeatureSpec:
    """Whisper's log-mel: 80 Slaney mels of 25 ms every 10 ms, log10, then (x + 4) / 4.

    Whisper clamps to 8 below the maximum of the utterance, which a stream cannot know. The floor
    here is fixed at 10**-6.5. Source: ``whisper/audio.py``, arXiv 2212.04356.
    """
    top = 15 + 27 * math.log(8.0) / math.log(6.4)
    edges = _slaney_to_hz(np.linspace(0.0, top, 82))
    mel = _triangles(edges, np.linspace(0, 8000, 201)) * (2.0 / (edges[2:] - edges[:-2]))
    return FeatureSpec(
        sample_rate=16000,
        frame_length=400,
        hop=160,
        n_fft=400,
        padding="zeros",
        preemphasis=0.0,
        remove_dc=False,
        input_scale=1.0,
        mel_gain=1.0,
        log="log10",
        floor=10**-6.5,
        window=_hann(400),
        mel=mel.astype(np.float32),
        mean=np.full(80, -4.0, np.float32),
        scale=np.full(80, 0.25, np.float32),
    )


def kaldi_spec(*, n_mels: int = 80, input_scale: float = 1.0) -> FeatureSpec:
    """Kaldi's fbank as icefall and sherpa-onnx use it: povey window, 20 Hz to Nyquist - 400 Hz.

    No dither. Source: ``kaldi/src/feat/mel-computations.cc`` and ``feature-window.cc``.
    """

    def to_mel(hz: NDArray[np.float64] | float) -> Any:
        return 1127.0 * np.log(1.0 + np.asarray(hz) / 700.0)

    edges = np.linspace(to_mel(20.0), to_mel(7600.0), n_mels + 2)
    bins = np.arange(257) * 16000.0 / 512
    mel = _triangles(edges, to_mel(bins))
    mel[-1] = 0.0  # Kaldi leaves the Nyquist bin out.
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    return FeatureSpec(
        sample_rate=16000,
        frame_length=400,
        hop=160,
        n_fft=512,
        padding="snip",
        preemphasis=0.97,
        remove_dc=True,
        input_scale=input_scale,
        mel_gain=1.0,
        log="ln",
        floor=float(np.finfo(np.float32).eps),
        window=(hann**0.85).astype(np.float32),
        mel=mel.astype(np.float32),
        mean=np.zeros(n_mels, np.float32),
        scale=np.ones(n_mels, np.float32),
    )


def torchaudio_spec(mean: Float32, invstddev: Float32) -> FeatureSpec:
    """Features of torchaudio's Emformer RNN-T pipelines, with their global statistics (80,).

    Source: ``torchaudio/pipelines/rnnt_pipeline.py`` (``EMFORMER_RNNT_BASE_LIBRISPEECH``). Its
    *streaming* extractor centres and mirrors every segment on its own; this spec is the offline
    one, which is what its model was trained with.
    """

    def to_mel(hz: float) -> float:
        return 2595.0 * math.log10(1.0 + hz / 700.0)

    mels = np.linspace(to_mel(0.0), to_mel(8000.0), 82)
    edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    gain = 32767.0**2
    return FeatureSpec(
        sample_rate=16000,
        frame_length=400,
        hop=160,
        n_fft=400,
        padding="reflect",
        preemphasis=0.0,
        remove_dc=False,
        input_scale=1.0,
        mel_gain=gain,
        log="piecewise",
        floor=0.0,
        window=_hann(400),
        mel=_triangles(edges, np.linspace(0, 8000, 201)).astype(np.float32),
        mean=np.asarray(mean, np.float32),
        scale=np.asarray(invstddev, np.float32),
    )
