"""Scores of transcripts: counts that add up, how sure they are, and the greedy CTC path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loquent.models.text import edit_distance, normalise


@dataclass(frozen=True)
class Score:
    """Edit counts; add the scores of utterances to get those of a set."""

    word_errors: int = 0
    words: int = 0
    char_errors: int = 0
    chars: int = 0
    utterances: int = 0

    @classmethod
    def of(cls, reference: str, hypothesis: str) -> Score:
        """Score one hypothesis; both sides are normalised first."""
        reference, hypothesis = normalise(reference), normalise(hypothesis)
        words = reference.split()
        return cls(
            word_errors=edit_distance(words, hypothesis.split()),
            words=len(words),
            char_errors=edit_distance(reference, hypothesis),
            chars=len(reference),
            utterances=1,
        )

    def __add__(self, other: Score) -> Score:
        return Score(
            self.word_errors + other.word_errors,
            self.words + other.words,
            self.char_errors + other.char_errors,
            self.chars + other.chars,
            self.utterances + other.utterances,
        )

    @property
    def wer(self) -> float:
        """Word error rate as a fraction."""
        return self.word_errors / max(1, self.words)

    @property
    def cer(self) -> float:
        """Character error rate as a fraction."""
        return self.char_errors / max(1, self.chars)


@dataclass(frozen=True)
class Interval:
    """Between which two fractions a rate lies with 95 % confidence."""

    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of its width, for ``a ± b``."""
        return (self.high - self.low) / 2


def bootstrap(
    scores: Sequence[Score], *, rounds: int = 1000, seed: int = 0
) -> tuple[Interval, Interval]:
    """Confidence intervals of WER and CER, by drawing utterances anew with replacement.

    It says what other utterances of the same speakers and kind might have scored (Bisani and Ney,
    ICASSP 2004), not what other speakers would.
    """
    if not scores:
        return Interval(0.0, 0.0), Interval(0.0, 0.0)
    counts = np.array(
        [(s.word_errors, s.words, s.char_errors, s.chars) for s in scores], np.float64
    )
    rng = np.random.default_rng(seed)
    n = len(scores)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=rounds) @ counts
    rates = drawn[:, ::2] / np.maximum(1, drawn[:, 1::2])
    low, high = np.percentile(rates, (2.5, 97.5), axis=0)
    return Interval(float(low[0]), float(high[0])), Interval(float(low[1]), float(high[1]))


def ctc_greedy(labels: Sequence[int], blank: int) -> list[int]:
    """Collapse the best label of each frame: repeats merge, blanks vanish."""
    return [
        label
        for before, label in zip([blank, *labels], labels, strict=False)
        if label not in (before, blank)
    ]
