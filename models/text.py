"""Transcripts: what is normalised away before training and scoring, and error rates."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Sequence

_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'"})
# Hyphens and dashes join words in print but are silent.
_SILENT = re.compile(r"[-–—_/]")
_QUOTING = re.compile(r"(?<!\w)'|'(?!\w)")


def normalise(text: str) -> str:
    """Lower case, no punctuation but the apostrophe inside words, single spaces, NFC.

    Letters, marks and digits of any script are kept: a language's own alphabet is not ours to cut.
    """
    text = unicodedata.normalize("NFC", text).translate(_APOSTROPHES).lower()
    text = _SILENT.sub(" ", text)
    text = "".join(
        c for c in text if c.isspace() or c == "'" or unicodedata.category(c)[0] in "LMN"
    )
    return " ".join(_QUOTING.sub(" ", text).split())


def edit_distance(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> int:
    """Levenshtein distance: substitutions, deletions and insertions at cost 1."""
    row = list(range(len(hypothesis) + 1))
    for i, r in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, h in enumerate(hypothesis, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (r != h))
    return row[-1]
