"""When a segment ends while people go on talking: Kaldi's three rules.

Silence is what the decoder hears as blank, so the rules need no second model and no clock; with a
voice activity detector it is that only where the detector hears no speech either.

What is left of the past behind an endpoint was measured with ``loquent measure endpoints`` (see
``export/README.md``): nothing. The transducer's predictor, the language model and the encoder start
anew, the encoder again for every second of a pause, so that speech is never far from where it would
be in a recording of its own; CTC's last symbol is blank by then. The encoder does so between two
chunks, and only where no speech has begun since.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Protocol

from loquent.engine.decode import Frame
from loquent.engine.errors import ConfigError
from loquent.engine.events import Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointRules:
    """Times in seconds.

    Attributes:
        leading_silence: rule 1, so much silence with no speech before it; nothing was said, so this
            makes no event, but the past is forgotten again.
        trailing_silence: rule 2, so much silence after speech ends the segment.
        max_utterance: rule 3, a longer segment is cut before the word that is growing.
        reset_decoder: at rules 1 and 2 the predictor of greedy RNN-T starts anew. Beam searches
            always settle and begin a new sentence there.
        reset_encoder: at rules 1 and 2 the encoder starts anew.

    Raises:
        ConfigError: a time is not positive.
    """

    leading_silence: float = 1.0
    trailing_silence: float = 0.8
    max_utterance: float = 20.0
    reset_decoder: bool = True
    reset_encoder: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool) and not value > 0:
                raise ConfigError(f"got {field.name} {value!r}, expected seconds above 0")


def endpoint_rules(
    *,
    endpoint_silence: float | None = None,
    max_utterance: float | None = None,
    leading_silence: float | None = None,
) -> EndpointRules | None:
    """Rules as a session asks for them: None leaves a time as it is, silence 0 means no rules.

    Raises:
        ConfigError: a time is negative, or 0 where that has no meaning.
    """
    if endpoint_silence == 0:
        return None
    usual = EndpointRules()
    return EndpointRules(
        trailing_silence=usual.trailing_silence if endpoint_silence is None else endpoint_silence,
        max_utterance=usual.max_utterance if max_utterance is None else max_utterance,
        leading_silence=usual.leading_silence if leading_silence is None else leading_silence,
    )


class Hearing(Protocol):
    """A voice activity detector's view of a stream."""

    def speech(self, frame: int) -> bool:
        """Whether somebody speaks in an encoder frame, counted from the start of the stream."""


class Endpointer:
    """Applies the rules to the frames of one stream.

    Args:
        rules: None never ends a segment.
        frame_seconds: from one encoder frame to the next.
        voice: a second opinion on what is silence.
    """

    def __init__(
        self, rules: EndpointRules | None, frame_seconds: float, voice: Hearing | None = None
    ) -> None:
        self.rules = rules
        self.voice = voice
        self._leading = _frames(rules.leading_silence, frame_seconds) if rules else math.inf
        self._silence = _frames(rules.trailing_silence, frame_seconds) if rules else math.inf
        self._longest = _frames(rules.max_utterance, frame_seconds) if rules else math.inf
        self._first: int | None = None
        self._last = -1  # frame of the latest speech, or of the latest endpoint

    @property
    def resets(self) -> bool:
        """Whether a greedy decoder forgets at an endpoint."""
        return self.rules is None or self.rules.reset_decoder

    @property
    def speaking(self) -> bool:
        """Whether the segment has speech."""
        return self._first is not None

    def ruled(self, rules: EndpointRules | None, frame_seconds: float) -> Endpointer:
        """Where this one stands, with other rules."""
        other = Endpointer(rules, frame_seconds, self.voice)
        other._first, other._last = self._first, self._last
        return other

    def accept(self, frame: Frame) -> Reason | None:
        """``endpoint`` or ``limit`` if a segment should end with this frame.

        ``limit`` comes again with every frame until ``restart``, as a word may have to end first.
        """
        if frame.speech or (self.voice is not None and self.voice.speech(frame.number)):
            self._last = frame.number
            if self._first is None:
                self._first = frame.number
        silence = frame.number - self._last
        if silence >= (self._leading if self._first is None else self._silence):
            self._last = frame.number
            return "endpoint"
        if self._first is None:
            return None
        return "limit" if frame.number + 1 - self._first >= self._longest else None

    def restart(self, first: int | None) -> None:
        """A new segment begins; ``first`` is the frame where it does if it has one already."""
        self._first = first

    def renew(self, frame: int) -> None:
        """From here on as a new stream's: silence counts from behind ``frame``."""
        self._first, self._last = None, frame

    def begin(self, first: int) -> None:
        """The segment so far was said; if it had speech, that of the new one counts from here."""
        if self._first is not None:
            self._first = first


def _frames(seconds: float, frame_seconds: float) -> float:
    # The small number keeps 0.8 s at 20 frames of 40 ms whatever the rounding of the quotient.
    return max(1, math.ceil(seconds / frame_seconds - 1e-6)) if math.isfinite(seconds) else math.inf
