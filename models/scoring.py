"""Scores of transcripts: counts that add up, and the greedy CTC path of a label sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def ctc_greedy(labels: Sequence[int], blank: int) -> list[int]:
    """Collapse the best label of each frame: repeats merge, blanks vanish."""
    return [
        label
        for before, label in zip([blank, *labels], labels, strict=False)
        if label not in (before, blank)
    ]
