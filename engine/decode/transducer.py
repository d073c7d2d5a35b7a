"""A transducer's networks, and what the predictor made of the tokens before, computed once.

A predictor that sees the last two tokens only (a stateless one, arXiv 2003.07705) gives the same
for the same two, whatever the stream and the hypothesis. Shapes: J joiner size, V tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_MEMORY = 4096  # contexts; a kilobyte or two each


class RnntModel(Protocol):
    """Predictor and joiner as functions of B rows."""

    @property
    def initial(self) -> Mapping[str, Array]:
        """The predictor's state before the first token, a batch of one."""

    def step(self, token: Int64, state: Mapping[str, Array]) -> tuple[Float32, dict[str, Array]]:
        """Tokens (B,) and state -> predictions (B, J) and the next state."""

    def join(self, enc: Float32, pred: Float32) -> Float32:
        """Encoder frames (B, J) and predictions (B, J) -> logits (B, V)."""


class Context:
    """The prediction (J,) after some tokens, and the predictor's state, a batch of one.

    ``tokens`` (V,) are the log-probabilities of the tokens by the predictor alone, which is the
    transducer's own language model (arXiv 2011.01991); :meth:`Transducer.know` fills it in.
    """

    __slots__ = ("pred", "state", "tokens")

    def __init__(self, pred: Float32, state: Mapping[str, Array]) -> None:
        self.pred, self.state = pred, state
        self.tokens: Float32 | None = None


class Transducer:
    """Predictor and joiner with the contexts computed so far.

    Args:
        model: the two as functions.
        blank: id of the blank token, which stands for the start.
    """

    def __init__(self, model: RnntModel, *, blank: int) -> None:
        self._model = model
        self._blank = blank
        # A state of whole numbers is the last tokens; an LSTM's hardly comes twice.
        self._few = all(a.dtype.kind == "i" for a in model.initial.values())
        self._memo: dict[tuple[int, bytes], Context] = {}
        pred, state = model.step(np.array([blank], np.int64), model.initial)
        self.start = Context(pred[0], state)

    def join(self, enc: Float32, pred: Float32) -> Float32:
        """Logits (B, V) of encoder frames (B, J) and predictions (B, J)."""
        return self._model.join(enc, pred)

    def after(self, steps: Sequence[tuple[Context, int]]) -> list[Context]:
        """The context that follows each of these once a token is said."""
        if not self._few:
            return self._step(steps)
        keys = [(token, _key(context)) for context, token in steps]
        missing = {
            key: step for key, step in zip(keys, steps, strict=True) if key not in self._memo
        }
        new = dict(zip(missing, self._step(list(missing.values())), strict=True))
        found = [new.get(key) or self._memo[key] for key in keys]
        if len(self._memo) + len(new) > _MEMORY:
            self._memo.clear()
        self._memo.update(new)
        return found

    def know(self, contexts: Sequence[Context]) -> None:
        """See to it that they know what the predictor alone would say next."""
        missing = [context for context in contexts if context.tokens is None]
        if not missing:
            return
        pred = np.stack([context.pred for context in missing])
        logits = self._model.join(np.zeros_like(pred), pred)
        logits[:, self._blank] = -np.inf
        log_probs = log_softmax(logits)
        log_probs[:, self._blank] = 0.0
        for context, row in zip(missing, log_probs, strict=True):
            context.tokens = row

    def _step(self, steps: Sequence[tuple[Context, int]]) -> list[Context]:
        if not steps:
            return []
        names = list(self._model.initial)
        state = {n: np.concatenate([context.state[n] for context, _ in steps]) for n in names}
        pred, after = self._model.step(np.array([token for _, token in steps], np.int64), state)
        # Copies: a row would keep the whole batch in memory.
        return [
            Context(pred[i].copy(), {n: after[n][i : i + 1].copy() for n in names})
            for i in range(len(steps))
        ]


def log_softmax(logits: Float32) -> Float32:
    """Over the last of two axes."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Float32 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _key(context: Context) -> bytes:
    return b"".join(array.tobytes() for array in context.state.values())
