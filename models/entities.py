"""Words that matter more than others: how numbers and names come through.

Numbers are digits and number words (English); names are what the reference capitalises in the
middle of a sentence, so a reference without casing has none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from loquent.models.text import normalise

_SMALL = (
    "zero oh one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty "
    "ninety hundred thousand million billion"
)
_ORDINALS = (
    "first third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth thirtieth"
)
NUMBER_WORDS = frozenset(f"{_SMALL} {_ORDINALS}".split()) - {"oh"}
# Capitals that say nothing.
_PLAIN = frozenset(("i", "i'm", "i'll", "i've", "i'd"))
_OPENING = "\"'“”‘’«([{¿¡"
_ENDS_SENTENCE = re.compile(r"[.!?:…][\"'”’»)\]}]*$")


@dataclass(frozen=True)
class Tally:
    """``count`` of ``total``; add those of utterances to get that of a set."""

    count: int = 0
    total: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.count + other.count, self.total + other.total)

    @property
    def rate(self) -> float:
        """As a fraction, 0 of nothing."""
        return self.count / max(1, self.total)


def is_number(word: str) -> bool:
    """Whether a normalised word is a number: digits, or an English number word."""
    return word in NUMBER_WORDS or any(c.isdigit() for c in word)


def number_errors(reference: str, heard: str) -> Tally:
    """Errors on number words of the number words in ``reference``.

    A number word that was replaced or left out is an error, and so is one that was put in.
    """
    expected, got = normalise(reference).split(), normalise(heard).split()
    errors = 0
    for edit in Levenshtein.opcodes(expected, got):
        if edit.tag != "equal":
            missed = sum(map(is_number, expected[edit.src_start : edit.src_end]))
            added = sum(map(is_number, got[edit.dest_start : edit.dest_end]))
            errors += max(missed, added)
    return Tally(errors, sum(map(is_number, expected)))


def name_positions(raw: str) -> list[int]:
    """Which words of ``normalise(raw)`` are names: capitalised, and not because a sentence starts.

    Empty where the text has no lower case, hence no casing.
    """
    if not any(c.islower() for c in raw):
        return []
    found: list[int] = []
    position, starts = 0, True
    for token in raw.split():
        words = normalise(token).split()
        starts = starts or token[0] in _OPENING
        bare = token.lstrip(_OPENING)
        if words and not starts and bare[:1].isupper() and words[0] not in _PLAIN:
            found.append(position)
        if words:
            starts = False
        position += len(words)
        if _ENDS_SENTENCE.search(token):
            starts = True
    # Punctuation that stands alone could shift the count; such texts have no names then.
    return found if position == len(normalise(raw).split()) else []


def names_heard(raw: str, heard: str) -> Tally:
    """How many of the names in the reference, as it was written, came through word for word."""
    names = name_positions(raw)
    if not names:
        return Tally()
    expected, got = normalise(raw).split(), normalise(heard).split()
    equal: set[int] = set()
    for block in Levenshtein.opcodes(expected, got).as_matching_blocks():
        equal.update(range(block.a, block.a + block.size))
    return Tally(sum(n in equal for n in names), len(names))
