"""Greedy RNN-T, frame-synchronous and batched over streams of any age.

Shapes: B streams, J joiner size, V tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


class RnntModel(Protocol):
    """Predictor and joiner as functions."""

    @property
    def initial(self) -> Mapping[str, Array]:
        """The predictor's state before the first token, a batch of one."""

    def step(self, token: Int64, state: Mapping[str, Array]) -> tuple[Float32, dict[str, Array]]:
        """Tokens (B,) and state -> predictions (B, J) and the next state."""

    def join(self, enc: Float32, pred: Float32) -> Float32:
        """Encoder frames (B, J) and predictions (B, J) -> logits (B, V)."""


@dataclass(frozen=True, slots=True, eq=False)
class RnntState:
    """What one stream carries: the prediction (1, J) and the predictor's state, batches of one."""

    pred: Float32
    context: Mapping[str, Array]


class RnntGreedy:
    """Greedy search over a transducer. Holds no state of any stream.

    Args:
        model: predictor and joiner.
        blank: id of the blank token.
        max_symbols: most tokens that one frame may emit; it bounds the work for a frame.
    """

    def __init__(self, model: RnntModel, *, blank: int, max_symbols: int = 3) -> None:
        self.model = model
        self.blank = blank
        self.max_symbols = max_symbols
        pred, context = model.step(np.array([blank], np.int64), model.initial)
        self.start = RnntState(pred, context)

    def begin(self, states: Sequence[RnntState]) -> RnntBatch:
        """Decode some frames of several streams together."""
        return RnntBatch(self, states)


class RnntBatch:
    """The streams of one ``begin``; row i belongs to the i-th of them."""

    def __init__(self, greedy: RnntGreedy, states: Sequence[RnntState]) -> None:
        self._greedy = greedy
        # Own copies, as rows get overwritten; the arrays are small next to the encoder's.
        self._pred = np.concatenate([state.pred for state in states])
        self._context = {
            name: np.concatenate([state.context[name] for state in states])
            for name in states[0].context
        }

    def frame(self, enc: Float32, rows: Sequence[int]) -> list[list[tuple[int, float]]]:
        """Decode one encoder frame of some of the streams.

        Args:
            enc: (N, J) one frame for each of ``rows``.
            rows: which N streams.

        Returns:
            For each of ``rows`` the tokens that the frame emits, with their log-probabilities.
        """
        greedy = self._greedy
        found: list[list[tuple[int, float]]] = [[] for _ in rows]
        where = np.asarray(rows)
        active = np.arange(len(rows))
        for _ in range(greedy.max_symbols):
            logits = greedy.model.join(enc[active], self._pred[where[active]])
            best = logits.argmax(axis=1)
            emits = best != greedy.blank
            active, tokens, logits = active[emits], best[emits], logits[emits]
            if not len(active):
                break
            for i, token, score in zip(active, tokens, _log_prob(logits, tokens), strict=True):
                found[i].append((int(token), float(score)))
            streams = where[active]
            context = {name: array[streams] for name, array in self._context.items()}
            self._pred[streams], after = greedy.model.step(tokens.astype(np.int64), context)
            for name, array in after.items():
                self._context[name][streams] = array
        return found

    def reset(self, row: int) -> None:
        """Start this stream's predictor anew: what follows owes nothing to what was said before."""
        start = self._greedy.start
        self._pred[row] = start.pred[0]
        for name, array in start.context.items():
            self._context[name][row] = array[0]

    def states(self) -> list[RnntState]:
        """What the streams carry on."""
        return [
            RnntState(
                self._pred[i : i + 1].copy(),
                {name: array[i : i + 1].copy() for name, array in self._context.items()},
            )
            for i in range(len(self._pred))
        ]


def _log_prob(logits: Float32, tokens: NDArray[np.intp]) -> Float32:
    top = logits.max(axis=1)
    total = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
    picked: Float32 = logits[np.arange(len(tokens)), tokens] - total
    return picked
