"""Speech that is quieter than any the model has learnt from is raised to where the model knows it.

A microphone at a low gain, or somebody at the other end of the table, gives speech 30 dB below
that of recordings. Its features are then not only lower: what is soft in it lies below the floor
of the features and is gone. So a stream computes its features with a lower floor, and a window is
raised, by no more than it needs, before the model's own floor is put in. A window that is loud
enough, or that comes soon after one that was, is not touched, not in a single bit.

How loud speech is, is known from the loudest that was heard of late, the window itself included,
so that the first word of a stream is raised, too, and the same whatever packets the audio came in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from loquent.engine.calm import Loudness
from loquent.engine.errors import ConfigError
from loquent.engine.features import FeatureSpec

Float32 = NDArray[np.float32]

# dB by which a window is raised at most, unless a bundle says otherwise.
MOST = 25.0
# dB a second by which the loudest that was heard is forgotten.
_LEAK = 1.0
SILENCE = -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelRules:
    """What a bundle says of the level of its speech, in dB as `loudest` measures it.

    Attributes:
        quiet: of speech that the model knows, the quietest: what is below it is raised to it.
        most: by which a window is raised.
    """

    quiet: float
    most: float = MOST

    def __post_init__(self) -> None:
        if not (math.isfinite(self.quiet) and 0 < self.most <= 60):
            raise ConfigError(
                f"got quiet {self.quiet:g} dB and most {self.most:g} dB, expected numbers, and "
                "above 0 and at most 60 dB to raise by"
            )


class Leveller:
    """Raises windows. One for all streams of a bundle; what a stream has heard is a number.

    Args:
        spec: of the model's features.
        rules: of the bundle.

    Attributes:
        features: for the streams, with a floor so low that a raised window still has all above
            the model's.

    Raises:
        ConfigError: the features are no plain logarithm, or have no floor.
    """

    def __init__(self, spec: FeatureSpec, rules: LevelRules) -> None:
        if spec.log not in ("ln", "log10"):
            raise ConfigError(
                f"got features with the logarithm {spec.log!r}, expected ln or log10 to raise "
                "quiet speech by"
            )
        if not spec.floor > 0:  # NaN too
            raise ConfigError(f"got features with the floor {spec.floor}, expected more than 0")
        self._rules = rules
        self.features = replace(spec, floor=spec.floor * 10 ** (-rules.most / 10))
        self._seconds = spec.hop / spec.sample_rate
        log = np.log if spec.log == "ln" else np.log10
        floor = (log(np.float32(spec.floor)) - spec.mean) * spec.scale
        self._floor = floor.astype(np.float32)
        self._decibel = (spec.scale * (log(10.0) / 10)).astype(np.float32)

    def heard(self, peak: float, levels: Float32, segment: int) -> float:
        """The loudest of late, dB, a window later.

        Args:
            peak: before it; `SILENCE` for a new stream.
            levels: of the window, as `Loudness` gives them.
            segment: frames to the window before it.
        """
        return max(peak - _LEAK * segment * self._seconds, 10 * float(levels.max()))

    def raised(self, windows: Float32, peaks: Sequence[float]) -> Float32:
        """(B, T, F) of what streams have heard to what the model is to hear.

        Args:
            windows: their features.
            peaks: of each, with this window.
        """
        rules = self._rules
        gains = [min(max(rules.quiet - peak, 0.0), rules.most) for peak in peaks]
        if any(gains):
            windows = windows + np.array(gains, np.float32)[:, None, None] * self._decibel
        return cast(Float32, np.maximum(windows, self._floor))


def loudest(spec: FeatureSpec, features: Float32) -> float:
    """How loud the loudest of a recording is, dB: (T, F) features, T at least 1."""
    return 10 * float(Loudness(spec)(features).max())
