"""When a segment ends while people go on talking.

Silence is what the decoder hears as blank, so the rule needs no second model and no clock. At an
endpoint the encoder's state and CTC's last symbol stay (a reset encoder misses the first word, see
sherpa-onnx issues 1700 and 781), and the transducer's predictor starts anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loquent.engine.decode import Frame
from loquent.engine.errors import ConfigError
from loquent.engine.events import Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointRules:
    """Times in seconds.

    Attributes:
        trailing_silence: so much silence after speech ends the segment.
        max_utterance: a segment longer than this is cut before the word that is growing.

    Raises:
        ConfigError: a time is not positive.
    """

    trailing_silence: float = 0.8
    max_utterance: float = 20.0

    def __post_init__(self) -> None:
        for name in ("trailing_silence", "max_utterance"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"got {name} {value!r}, expected seconds above 0")


class Endpointer:
    """Applies the rules to the frames of one stream.

    Args:
        rules: None never ends a segment.
        frame_seconds: from one encoder frame to the next.
    """

    def __init__(self, rules: EndpointRules | None, frame_seconds: float) -> None:
        self._silence = _frames(rules.trailing_silence, frame_seconds) if rules else math.inf
        self._longest = _frames(rules.max_utterance, frame_seconds) if rules else math.inf
        self._first: int | None = None
        self._last = 0

    def accept(self, frame: Frame) -> Reason | None:
        """``endpoint`` or ``limit`` if a segment should end with this frame.

        ``limit`` comes again with every frame until ``restart``, as a word may have to end first.
        """
        if frame.speech:
            self._last = frame.number
            if self._first is None:
                self._first = frame.number
        if self._first is None:
            return None
        if frame.number - self._last >= self._silence:
            return "endpoint"
        return "limit" if frame.number + 1 - self._first >= self._longest else None

    def restart(self, first: int | None) -> None:
        """A new segment begins; ``first`` is the frame where it does if it has one already."""
        self._first = first

    def begin(self, first: int) -> None:
        """The segment so far was said; if it had speech, that of the new one counts from here."""
        if self._first is not None:
            self._first = first


def _frames(seconds: float, frame_seconds: float) -> float:
    # The small number keeps 0.8 s at 20 frames of 40 ms whatever the rounding of the quotient.
    return max(1, math.ceil(seconds / frame_seconds - 1e-6)) if math.isfinite(seconds) else math.inf
