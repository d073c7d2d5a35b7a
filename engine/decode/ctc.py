"""Greedy CTC: the best token of every frame, repeats merged, blanks removed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from loquent.engine.decode import Frame, Token

Float32 = NDArray[np.float32]


@dataclass(slots=True)
class CtcGreedy:
    """The decoder of one stream.

    ``last``, the best token of the frame before, is kept over chunks and over endpoints. A token
    that goes on over either is not said twice, and one that is said again after a blank is not lost
    (the class of sherpa-onnx issue 1629).
    """

    blank: int
    last: int = -1

    def fork(self) -> CtcGreedy:
        """A decoder in the same state, which goes its own way."""
        return replace(self)

    def accept(self, log_probs: Float32, first: int) -> list[Frame]:
        """Decode the frames that follow.

        Args:
            log_probs: (K, V) natural logarithms.
            first: index of the first of these K frames in the stream.
        """
        frames = []
        best = log_probs.argmax(axis=1).tolist()
        scores = log_probs.max(axis=1).tolist()
        for index, (token, score) in enumerate(zip(best, scores, strict=True), first):
            new = token not in (self.blank, self.last)
            tokens = (Token(token, index, score),) if new else ()
            frames.append(Frame(index, tokens, token != self.blank))
            self.last = token
        return frames
