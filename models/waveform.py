"""Augmentation of waveforms on the way to features: an alternative to the feature cache.

:class:`WaveformSource` has what training asks of a ``FeatureCache``, but decodes the recording and
changes its samples each time: rooms, noise, phones and codecs do things to sound that no change of
features imitates. It costs decoding and features anew, about a hundred times real time on one core.
What it does to an utterance is a function of the generator that training hands it, which is one of
(seed, step), so a resumed run hears exactly what it would have heard.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from loquent.engine.audio import load_audio
from loquent.engine.features import FeatureSpec, fbank
from loquent.models.data import Augment, Utterance
from loquent.models.noise import MadeNoise, Noise, mix

Float32 = NDArray[np.float32]
Codec = Literal["narrow", "mulaw", "opus"]
CODECS: tuple[Codec, ...] = ("narrow", "mulaw", "opus")
# What is left to do to the features of changed waveforms: SpecAugment, and a tilt.
MASKS = Augment(tempo=0.0, warp=0.0, gain=0.0, noise=0.0, reverb=0.0, band=0.0)


@dataclass(frozen=True, kw_only=True)
class WaveAugment:
    """What may happen to a recording, in this order.

    Attributes:
        speeds: factors of speed and pitch (resampling), one drawn.
        vtlp: largest relative change of the vocal-tract length (Jaitly and Hinton, 2013): the mel
            filters are moved along the frequency axis.
        room: how often a room is simulated.
        noise: how often noise is added.
        snr: its distance to the speech in dB, drawn uniformly from this range.
        codec: how often one of ``codecs`` is simulated: ``narrow`` (8 kHz), ``mulaw`` (8 kHz and
            8 bits, G.711), ``opus`` (6 to 16 kbit/s).
        gain: range of the level's change in dB; what then exceeds full scale clips.
    """

    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
    vtlp: float = 0.1
    room: float = 0.3
    noise: float = 0.5
    snr: tuple[float, float] = (0.0, 25.0)
    codec: float = 0.2
    codecs: tuple[Codec, ...] = CODECS
    gain: tuple[float, float] = (-12.0, 6.0)

    def __post_init__(self) -> None:
        if not self.speeds or any(not 0.5 <= s <= 2 for s in self.speeds):
            raise ValueError(f"got speeds {self.speeds}, expected factors from 0.5 to 2")
        if unknown := set(self.codecs) - set(CODECS):
            raise ValueError(f"got codecs {sorted(unknown)}, expected some of {CODECS}")


class WaveformSource:
    """Features of recordings that change each time they are asked for.

    Args:
        utterances: in the order that indices refer to.
        spec: the features.
        settings: see there.
        noises: where noise comes from, one drawn each time; synthetic babble and pink noise if
            there are none.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        spec: FeatureSpec,
        settings: WaveAugment,
        noises: Sequence[Noise] = (),
    ) -> None:
        self.utterances = list(utterances)
        self.spec = spec
        self.settings = settings
        rate = spec.sample_rate
        self._noises = noises or (MadeNoise("babble", rate), MadeNoise("pink", rate))

    def __len__(self) -> int:
        return len(self.utterances)

    def frames(self, i: int) -> int:
        """Frames of utterance ``i`` at its own speed, by its manifest: for making batches."""
        samples = round(self.utterances[i].duration * self.spec.sample_rate)
        return max(1, samples // self.spec.hop)

    def __getitem__(self, i: int) -> Float32:
        """(T, F) features as recorded."""
        return fbank(self.spec, self._load(i))

    def features(self, i: int, rng: np.random.Generator) -> Float32:
        """(T, F) features of utterance ``i`` as ``rng`` would have it."""
        s = self.settings
        pcm = change(self._load(i), self.spec.sample_rate, s, self._noises, rng)
        warp = 1 + rng.uniform(-s.vtlp, s.vtlp)
        return fbank(warped(self.spec, warp), pcm)

    def _load(self, i: int) -> Float32:
        return load_audio(self.utterances[i].audio, sample_rate=self.spec.sample_rate)


def change(
    pcm: Float32,
    sample_rate: int,
    settings: WaveAugment,
    noises: Sequence[Noise],
    rng: np.random.Generator,
) -> Float32:
    """A changed copy of (N,) samples; all but a change of speed keep their number."""
    s = settings
    pcm = speed(pcm, sample_rate, float(rng.choice(s.speeds)))
    if rng.random() < s.room:
        pcm = reverberate(pcm, room(sample_rate, rng))
    if rng.random() < s.noise and noises:
        noise = noises[int(rng.integers(len(noises)))].draw(len(pcm), rng)
        pcm = mix(pcm, noise, float(rng.uniform(*s.snr)))
    if rng.random() < s.codec and s.codecs:
        pcm = code(pcm, sample_rate, s.codecs[int(rng.integers(len(s.codecs)))], rng)
    gain = np.float32(10 ** (rng.uniform(*s.gain) / 20))
    out: Float32 = np.clip(pcm * gain, -1.0, 1.0)
    return out


def speed(pcm: Float32, sample_rate: int, factor: float) -> Float32:
    """Faster by ``factor``, and higher by as much."""
    if factor == 1.0 or not len(pcm):
        return pcm
    out: Float32 = soxr.resample(pcm, sample_rate * factor, sample_rate, quality="MQ")
    return out.astype(np.float32, copy=False)


def room(sample_rate: int, rng: np.random.Generator) -> Float32:
    """The impulse response of a room: direct sound, some early echoes, a tail that decays.

    The tail is Polack's: Gaussian noise that falls by 60 dB in the reverberation time, drawn from
    0.15 to 0.8 s. The direct sound stands first, so speech is not delayed.
    """
    seconds = rng.uniform(0.15, 0.8)
    distance = rng.uniform(-3.0, 12.0)  # of direct sound to all the rest, dB
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / seconds)
    # A real tail starts when echoes get dense, and walls take the high notes first.
    tail[time < rng.uniform(0.005, 0.02)] = 0
    smooth = rng.uniform(0.0, 0.6)
    for i in range(1, len(tail)):
        tail[i] = (1 - smooth) * tail[i] + smooth * tail[i - 1]
    for _ in range(int(rng.integers(3, 9))):
        at = int(rng.uniform(0.002, 0.04) * sample_rate)
        tail[min(at, len(tail) - 1)] += rng.choice((-1, 1)) * np.abs(tail).max() * rng.uniform(1, 4)
    tail[0] = 0
    energy = np.sqrt(np.square(tail).sum())
    response = tail / max(energy, 1e-9) * 10 ** (-distance / 20)
    response[0] = 1.0
    return cast(Float32, response.astype(np.float32))


def reverberate(pcm: Float32, response: Float32) -> Float32:
    """``pcm`` in a room, cut to its length, at its level."""
    if not len(pcm):
        return pcm
    size = len(pcm) + len(response) - 1
    spectrum = np.fft.rfft(pcm, size) * np.fft.rfft(response, size)
    wet = np.fft.irfft(spectrum, size)[: len(pcm)]
    before, after = (np.sqrt(np.mean(np.square(x, dtype=np.float64))) for x in (pcm, wet))
    return cast(Float32, (wet * (before / max(after, 1e-9))).astype(np.float32))


def code(pcm: Float32, sample_rate: int, codec: Codec, rng: np.random.Generator) -> Float32:
    """``pcm`` after a telephone or an Internet call; as long as before."""
    if len(pcm) < sample_rate // 50:
        return pcm
    if codec == "opus":
        file = io.BytesIO()
        # libsndfile maps 0..1 to its range of bit rates, low end last.
        level = float(rng.uniform(0.955, 1.0))
        options = {"format": "OGG", "subtype": "OPUS", "compression_level": level}
        soundfile.write(file, np.clip(pcm, -1, 1), sample_rate, **options)
        file.seek(0)
        out, rate = soundfile.read(file, dtype="float32")
        if rate != sample_rate:
            out = soxr.resample(out, rate, sample_rate)
    else:
        low = soxr.resample(pcm, sample_rate, 8000, quality="MQ")
        if codec == "mulaw":
            low = mulaw(low)
        out = soxr.resample(low, 8000, sample_rate, quality="MQ")
    out = out[: len(pcm)]
    return np.pad(out, (0, len(pcm) - len(out))).astype(np.float32, copy=False)


def mulaw(pcm: Float32) -> Float32:
    """There and back through 8 bits of mu-law (ITU-T G.711, continuous form)."""
    mu = 255.0
    x = np.clip(pcm, -1, 1)
    y = np.sign(x) * np.log1p(mu * np.abs(x)) / np.log1p(mu)
    y = np.round(y * 127) / 127
    back = np.sign(y) * np.expm1(np.abs(y) * np.log1p(mu)) / mu
    return cast(Float32, back.astype(np.float32))


def warped(spec: FeatureSpec, factor: float) -> FeatureSpec:
    """``spec`` with its filters moved by ``factor`` along the frequency axis.

    Above 80 % of the band the map is bent so that its end stays where it is.
    """
    if factor == 1.0:
        return spec
    bins = len(spec.mel)
    hz = np.linspace(0.0, 1.0, bins)
    knee = 0.8 * min(1.0, 1.0 / factor)
    above = 1 - (1 - hz) * (1 - knee * factor) / (1 - knee)
    source = np.where(hz <= knee, hz * factor, above) * (bins - 1)
    below = np.clip(source.astype(int), 0, bins - 2)
    part = (source - below)[:, None]
    mel = (1 - part) * spec.mel[below] + part * spec.mel[below + 1]
    return dataclasses.replace(spec, mel=mel.astype(np.float32))
