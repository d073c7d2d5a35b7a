"""Greedy CTC: the best token of every frame, repeats merged, blanks removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from loquent.engine.decode import Frame, Token
from loquent.engine.decode.decoder import Job, Settings

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class CtcState:
    """What one stream carries.

    ``last``, the best token of the frame before, is kept over chunks and over endpoints. A token
    that goes on over either is not said twice, and one that is said again after a blank is not lost
    (the class of sherpa-onnx issue 1629).
    """

    blank_penalty: float
    last: int = -1

    @property
    def pending(self) -> tuple[Token, ...]:
        """Nothing: what is said stays."""
        return ()

    def flush(self) -> tuple[Token, ...]:
        """Nothing."""
        return ()


class CtcGreedy:
    """Reads ``ctc``, (K, V) natural logarithms.

    Args:
        blank: id of the blank token.
    """

    def __init__(self, *, blank: int) -> None:
        self._blank = blank

    def start(self, settings: Settings) -> CtcState:
        """The search of a new stream."""
        return CtcState(settings.blank_penalty or 0.0)

    def decode(self, jobs: Sequence[Job]) -> list[tuple[list[Frame], CtcState]]:
        """See :class:`~loquent.engine.decode.decoder.Decoder`."""
        return [self._stream(job.search, job.frames["ctc"], job.first) for job in jobs]

    def _stream(
        self, state: CtcState, log_probs: Float32, first: int
    ) -> tuple[list[Frame], CtcState]:
        if state.blank_penalty:
            log_probs = log_probs.copy()
            log_probs[:, self._blank] -= state.blank_penalty
        frames = []
        last = state.last
        best = log_probs.argmax(axis=1).tolist()
        scores = log_probs.max(axis=1).tolist()
        for index, (token, score) in enumerate(zip(best, scores, strict=True), first):
            new = token not in (self._blank, last)
            tokens = (Token(token, index, score),) if new else ()
            frames.append(Frame(index, tokens, token != self._blank))
            last = token
        return frames, replace(state, last=last)
