"""Greedy RNN-T, frame-synchronous and batched over streams of any age.

Shapes: B streams, J joiner size, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from loquent.engine.decode import Frame, Token
from loquent.engine.decode.decoder import Job, Settings
from loquent.engine.decode.leaning import Leaning
from loquent.engine.decode.transducer import Context, Transducer, log_softmax
from loquent.engine.hotwords import HotwordGraph

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class RnntState:
    """What one stream carries."""

    blank_penalty: float
    context: Context
    leaning: Leaning | None = None

    @property
    def pending(self) -> tuple[Token, ...]:
        """Nothing: what is said stays."""
        return ()

    def biased(self, hotwords: HotwordGraph | None) -> RnntState:
        """With other hotwords from here on."""
        return replace(self, leaning=Leaning.towards(hotwords))

    def flush(self) -> tuple[Token, ...]:
        """Nothing."""
        return ()


class RnntGreedy:
    """Reads ``joiner``, (K, J). After a silence that ends a segment the predictor starts anew.

    Args:
        model: predictor and joiner.
        blank: id of the blank token.
        max_symbols: most tokens that one frame may emit; it bounds the work for a frame.
    """

    def __init__(self, model: Transducer, *, blank: int, max_symbols: int = 3) -> None:
        self._model = model
        self._blank = blank
        self._max_symbols = max_symbols

    def start(self, settings: Settings) -> RnntState:
        """The search of a new stream."""
        leaning = Leaning.towards(settings.hotwords)
        return RnntState(settings.blank_penalty or 0.0, self._model.start, leaning)

    def decode(self, jobs: Sequence[Job]) -> list[tuple[list[Frame], RnntState]]:
        """See :class:`~loquent.engine.decode.decoder.Decoder`."""
        contexts = [job.search.context for job in jobs]
        leanings = [job.search.leaning for job in jobs]
        penalties = np.array([job.search.blank_penalty for job in jobs], np.float32)
        encoded = [job.frames["joiner"] for job in jobs]
        decoded: list[list[Frame]] = [[] for _ in jobs]
        for k in range(max(map(len, encoded))):
            rows = [i for i, frames in enumerate(encoded) if k < len(frames)]
            enc = np.stack([encoded[i][k] for i in rows])
            found = self._frame(enc, rows, contexts, leanings, penalties)
            for i, tokens in zip(rows, found, strict=True):
                number = jobs[i].first + k
                said = tuple(Token(token, number, score) for token, score in tokens)
                frame = Frame(number, said, bool(said))
                decoded[i].append(frame)
                if jobs[i].endpointer.accept(frame) == "endpoint":
                    jobs[i].endpointer.restart(None)
                    if jobs[i].endpointer.resets:
                        contexts[i] = self._model.start
                    if leaning := leanings[i]:
                        leanings[i] = leaning.restart()
        return [
            (frames, replace(job.search, context=context, leaning=leaning))
            for frames, job, context, leaning in zip(decoded, jobs, contexts, leanings, strict=True)
        ]

    def _frame(
        self,
        enc: Float32,
        rows: Sequence[int],
        contexts: list[Context],
        leanings: list[Leaning | None],
        penalties: Float32,
    ) -> list[list[tuple[int, float]]]:
        """Tokens and log-probabilities that one frame (N, J) of N streams says."""
        found: list[list[tuple[int, float]]] = [[] for _ in rows]
        active = list(range(len(rows)))
        for _ in range(self._max_symbols):
            pred = np.stack([contexts[rows[i]].pred for i in active])
            logits = self._model.join(enc if len(active) == len(enc) else enc[active], pred)
            logits[:, self._blank] -= penalties[[rows[i] for i in active]]
            best = self._lean(logits, [leanings[rows[i]] for i in active]).argmax(axis=1)
            emits = np.flatnonzero(best != self._blank)
            if not len(emits):
                break
            tokens = best[emits].tolist()
            scores = log_softmax(logits[emits])[np.arange(len(emits)), best[emits]].tolist()
            active = [active[i] for i in emits.tolist()]
            for i, token, score in zip(active, tokens, scores, strict=True):
                found[i].append((token, score))
                if leaning := leanings[rows[i]]:
                    leanings[rows[i]] = leaning.after(token)
            after = self._model.after(
                [(contexts[rows[i]], token) for i, token in zip(active, tokens, strict=True)]
            )
            for i, context in zip(active, after, strict=True):
                contexts[rows[i]] = context
        return found

    @staticmethod
    def _lean(logits: Float32, leanings: Sequence[Leaning | None]) -> Float32:
        """Logits (N, V) with what the streams lean towards; the scores of tokens stay without."""
        if not any(leanings):
            return logits
        logits = logits.copy()
        for row, leaning in zip(logits, leanings, strict=True):
            if leaning:
                row += leaning.bias
        return logits
