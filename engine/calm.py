"""Whether a stream is still in a pause at the end of a chunk, by its loudness.

A decoder hears a word up to some hundred milliseconds after it began, so that it says blank is no
proof that nobody has begun to speak. An encoder that starts anew just then loses the first word
(sherpa-onnx issues 1700, 781); so it waits until the end of a chunk is as quiet as the pause.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from loquent.engine.features import FeatureSpec

Float32 = NDArray[np.float32]

# Everything in powers of ten: a step of 1 is 10 dB.
_RISE = 1.0  # above the pause, and somebody speaks
_LEAK = 0.3  # a second by which the pause may grow louder
_LOUDEST_BINS = 8  # what sounds is loud in a few bins
_SMOOTH = 5  # frames
_TAIL = 20  # frames at the end that have to be quiet, beside the right context


class Loudness:
    """How loud windows are, those of a whole batch at once.

    Args:
        spec: of the features; their logarithm and scale give the loudness.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        decade = 1.0 if spec.log == "log10" else math.log(10.0)
        self._scale = (spec.scale * decade).astype(np.float32)

    def __call__(self, windows: Float32) -> Float32:
        """(..., T, F) features to (..., levels), a level a frame, smoothed."""
        loud = np.partition(windows / self._scale, -_LOUDEST_BINS, axis=-1)[..., -_LOUDEST_BINS:]
        levels = loud.mean(axis=-1)
        if levels.shape[-1] > _SMOOTH:
            levels = sliding_window_view(levels, _SMOOTH, axis=-1).mean(axis=-1)
        return cast(Float32, levels)


class Calm:
    """The loudness of one stream's pauses.

    Args:
        spec: of the features.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        self._seconds = spec.hop / spec.sample_rate
        self._floor = math.inf

    def accept(self, levels: Float32, segment: int, right: int) -> bool:
        """Whether the end of a window is as quiet as what was quietest of late.

        Args:
            levels: of the window.
            segment: frames to the next window.
            right: frames of context behind them.
        """
        leak = _LEAK * segment * self._seconds
        self._floor = min(self._floor + leak, float(levels.min()))
        return float(levels[-(_TAIL + right) :].max()) < self._floor + _RISE
