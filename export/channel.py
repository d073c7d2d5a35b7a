"""What a line or a microphone makes of speech: the clips of ``loquent evaluate --channel``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from loquent.engine.features import Float32
from loquent.models.waveform import code

_TILT = 6.0  # dB an octave
_MOST = 18.0  # dB, of a tilt


def _telephone(hz: NDArray[Any]) -> NDArray[Any]:
    octaves: NDArray[Any] = np.log2(300 / hz).clip(0) + np.log2(hz / 3400).clip(0)
    return -60.0 * octaves


def _bright(hz: NDArray[Any]) -> NDArray[Any]:
    return (_TILT * np.log2(hz / 1000)).clip(-_MOST, _MOST)


def _dull(hz: NDArray[Any]) -> NDArray[Any]:
    return -_bright(hz)


CHANNELS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "telephone": _telephone,
    "bright": _bright,
    "dull": _dull,
}


def through(name: str, pcm: Float32, sample_rate: int) -> Float32:
    """A clip through one of :data:`CHANNELS`, as long and on average as loud as before.

    ``telephone`` lets 300 to 3,400 Hz pass and sends them as 8 bits of mu-law 8,000 times a second
    (ITU-T G.711); ``bright`` and ``dull`` tilt the spectrum by 6 dB an octave.

    Args:
        name: which one.
        pcm: (N,) in [-1, 1].
        sample_rate: Hz.
    """
    if not len(pcm):
        return pcm
    hz = np.fft.rfftfreq(len(pcm), 1 / sample_rate).clip(1.0)
    spectrum = np.fft.rfft(pcm) * 10 ** (CHANNELS[name](hz) / 20)
    filtered = np.fft.irfft(spectrum, len(pcm))
    before, after = (np.sqrt(np.square(x, dtype=np.float64).mean()) for x in (pcm, filtered))
    out = cast(Float32, (filtered * (before / max(after, 1e-9))).astype(np.float32))
    return code(out, sample_rate, "mulaw", np.random.default_rng(0)) if name == "telephone" else out
