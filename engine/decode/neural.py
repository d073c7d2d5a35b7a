"""A recurrent word model beside the n-gram, asked when a chunk is searched and not word by word.

While frames are searched the n-gram scores each word at once, which costs a look into a table. A
network costs a product, so the words that the hypotheses have gained wait for the end of the chunk,
where all of them, of all streams together, are scored in one call, or as many as words follow each
other ("delayed fusion", arXiv 2501.09258).
Linear interpolation of the two models is what a word is then worth (Mikolov et al., Interspeech
2010).

Shapes: N words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


class WordModel(Protocol):
    """The network as a function of N rows."""

    @property
    def initial(self) -> Mapping[str, Array]:
        """The state before anything is said, a batch of one."""

    def step(self, word: Int64, state: Mapping[str, Array]) -> tuple[Float32, dict[str, Array]]:
        """Ids (N,) of the n-gram's words and states before them.

        Returns:
            Natural logarithms of the probabilities of the words (N,), and the states after them.
        """


class Said:
    """Words that are over: one more behind those before.

    Attributes:
        before: all but the last word; None once that is no longer needed.
        word: id of the last one.
        logp: its log-probability by the n-gram; None where only the n-gram's rules apply.
        state: the network's after it, a batch of one; None until it is computed.
        gain: what the network adds to the log-probability of all words together.
    """

    __slots__ = ("before", "gain", "logp", "state", "word")

    def __init__(self, before: Said | None, word: int, logp: float | None) -> None:
        self.before, self.word, self.logp = before, word, logp
        self.state: Mapping[str, Array] | None = None
        self.gain = 0.0


class Neural:
    """The network beside the n-gram. Shared by all streams.

    Args:
        model: the network.
        share: of it in the probability of a word; the n-gram has the rest.
        start: id of the word that stands for the beginning of a sentence.
    """

    def __init__(self, model: WordModel, *, share: float, start: int) -> None:
        self._model = model
        self.share = share
        self.start = Said(None, start, None)
        _, self.start.state = model.step(np.array([start], np.int64), model.initial)

    def compute(self, ends: Sequence[Said]) -> None:
        """Make sure that these are computed, with all before them."""
        levels: list[list[Said]] = []
        for end in ends:
            chain: list[Said] = []
            said: Said | None = end
            while said is not None and said.state is None:
                chain.append(said)
                said = said.before
            for depth, said in enumerate(reversed(chain)):
                if depth == len(levels):
                    levels.append([])
                levels[depth].append(said)
        for level in levels:
            self._compute(level)

    def gains(self, asked: Sequence[tuple[Said, int, float | None]]) -> list[float]:
        """What it would add for each of these words, the n-gram's log-probability given."""
        rows = [(said, word) for said, word, logp in asked if logp is not None]
        found = iter(self._step(rows)[0] if rows else ())
        return [0.0 if logp is None else self._gain(logp, next(found)) for _, _, logp in asked]

    def _compute(self, level: Sequence[Said]) -> None:
        # Many hypotheses differ only in how a word was cut into tokens.
        same: dict[tuple[int, int], list[Said]] = {}
        for said in dict.fromkeys(level):
            same.setdefault((id(said.before), said.word), []).append(said)
        heads = [group[0] for group in same.values()]
        scores, states = self._step([(s.before, s.word) for s in heads if s.before is not None])
        for group, score, state in zip(same.values(), scores, states, strict=True):
            for said in group:
                assert said.before is not None
                said.gain = said.before.gain
                if said.logp is not None:
                    said.gain += self._gain(said.logp, score)
                said.state = state
                said.before = None  # or a stream would keep all that was ever said in it

    def _step(self, rows: Sequence[tuple[Said, int]]) -> tuple[list[float], list[dict[str, Array]]]:
        states = [said.state for said, _ in rows]
        names = list(self._model.initial)
        merged = {n: np.concatenate([s[n] for s in states if s is not None]) for n in names}
        words = np.array([word for _, word in rows], np.int64)
        scores, after = self._model.step(words, merged)
        # Copies: a row would keep the whole batch in memory.
        split = [{n: after[n][i : i + 1].copy() for n in names} for i in range(len(rows))]
        return scores.tolist(), split

    def _gain(self, ngram: float, own: float) -> float:
        """Natural logarithm of what interpolation multiplies the n-gram's probability by."""
        if self.share >= 1:
            return own - ngram
        return math.log1p(self.share * math.expm1(min(own - ngram, 50.0)))
