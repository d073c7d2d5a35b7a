"""Transcripts: what is normalised away before training and scoring, and error rates."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from loquent.engine.text import normalise as normalise


def edit_distance(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> int:
    """Levenshtein distance: substitutions, deletions and insertions at cost 1."""
    row = list(range(len(hypothesis) + 1))
    for i, r in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, h in enumerate(hypothesis, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (r != h))
    return row[-1]
