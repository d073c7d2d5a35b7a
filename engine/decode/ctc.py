"""Greedy CTC: the best token of every frame, repeats merged, blanks removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from loquent.engine.decode import Frame, Token
from loquent.engine.decode.decoder import Job, Settings
from loquent.engine.decode.leaning import Leaning
from loquent.engine.hotwords import HotwordGraph

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
    leaning: Leaning | None = None

    @property
    def pending(self) -> tuple[Token, ...]:
        """Nothing: what is said stays."""
        return ()

    def biased(self, hotwords: HotwordGraph | None) -> CtcState:
        """With other hotwords from here on."""
        return replace(self, leaning=Leaning.towards(hotwords))

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
        leaning = Leaning.towards(settings.hotwords)
        return CtcState(settings.blank_penalty or 0.0, leaning=leaning)

    def decode(self, jobs: Sequence[Job]) -> list[tuple[list[Frame], CtcState]]:
        """See :class:`~loquent.engine.decode.decoder.Decoder`."""
        return [self._stream(job) for job in jobs]

    def _stream(self, job: Job) -> tuple[list[Frame], CtcState]:
        state: CtcState = job.search
        log_probs, first = job.frames["ctc"], job.first
        if state.blank_penalty:
            log_probs = log_probs.copy()
            log_probs[:, self._blank] -= state.blank_penalty
        if state.leaning:
            return self._lean(state, state.leaning, log_probs, job)
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

    def _lean(
        self, state: CtcState, leaning: Leaning, log_probs: Float32, job: Job
    ) -> tuple[list[Frame], CtcState]:
        """The same towards hotwords: what the last token was decides what the next one gets."""
        frames = []
        last = state.last
        for number, row in enumerate(log_probs, job.first):
            leant = row + leaning.bias
            if last not in (-1, self._blank):
                leant[last] = row[last]  # held, not said again
            token = int(leant.argmax())
            new = token not in (self._blank, last)
            tokens = (Token(token, number, float(row[token])),) if new else ()
            if new:
                leaning = leaning.after(token)
            frame = Frame(number, tokens, token != self._blank)
            frames.append(frame)
            if job.endpointer.accept(frame) == "endpoint":
                job.endpointer.restart(None)
                leaning = leaning.restart()
            last = token
        return frames, replace(state, last=last, leaning=leaning)
