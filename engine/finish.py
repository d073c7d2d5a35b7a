"""Recognised words to text as people write it: casing, punctuation, digits.

A linear model over hashed word n-grams says what follows each word (nothing, comma, full stop or
question mark) and how it is cased; `numbers.py` then writes numbers as digits. The model is data,
``finishers/LANGUAGE.npz``, learnt from text with ``loquent finish`` (see ``models/finish.py``).
Words, their order and their times are not touched: only ``Final.text`` is.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from loquent.engine.errors import ConfigError
from loquent.engine.numbers import format_numbers

MARKS = ("", ",", ".", "?")
LOWER, CAPITAL, UPPER = range(3)
BEGIN, END = "<s>", "</s>"
_FOLDER = "finishers"


def mark_features(words: Sequence[str], at: int, start: int) -> Iterator[str]:
    """What the mark behind word ``at`` depends on; the sentence began at word ``start``."""
    b, c, d, e = _around(words, at)
    first, second = words[start], words[start + 1] if start + 1 < len(words) else END
    yield f"1{c}"
    yield f"2{d}"
    yield f"3{c} {d}"
    yield f"4{b} {c}"
    yield f"5{d} {e}"
    yield f"6{b} {c} {d}"
    yield f"7{c} {d} {e}"
    yield f"8{first} {d}"
    yield f"9{first} {second} {d == END}"
    length = min(at - start, 30)
    length -= length % 3 if length > 5 else 0
    yield f"a{length} {d}"
    yield f"b{length}"


def case_features(words: Sequence[str], at: int) -> Iterator[str]:
    """What the casing of word ``at`` depends on."""
    b, c, d, _ = _around(words, at)
    yield f"A{c}"
    yield f"B{b} {c}"
    yield f"C{c} {d}"
    yield f"D{c[-3:]}"
    yield f"E{b} {c} {d}"
    yield f"F{b}"


def _around(words: Sequence[str], at: int) -> tuple[str, str, str, str]:
    before = words[at - 1] if at else BEGIN
    after = words[at + 1] if at + 1 < len(words) else END
    return before, words[at], after, words[at + 2] if at + 2 < len(words) else END


def bucket(feature: str, size: int) -> int:
    """The row of a feature in a table of ``size`` rows, a power of two."""
    return crc32(feature.encode()) & (size - 1)


class Finisher:
    """The model of one language. Shared by all streams.

    Args:
        marks: (N, 4) int8 weights by hashed feature, N a power of two, for ``MARKS``.
        cases: (N, 3) int8 weights for ``LOWER``, ``CAPITAL`` and ``UPPER``.
        forms: words with a spelling of their own ("mcdonald" -> "McDonald").
    """

    def __init__(
        self, marks: NDArray[np.int8], cases: NDArray[np.int8], forms: Mapping[str, str]
    ) -> None:
        self._marks, self._cases, self._forms = marks, cases, forms

    @classmethod
    def load(cls, language: str) -> Finisher:
        """The one that came with Loquent for a language. Raises ConfigError."""
        folder = files("loquent.engine") / _FOLDER
        file = folder / f"{language}.npz"
        if not file.is_file():
            known = sorted(f.name[:-4] for f in folder.iterdir() if f.name.endswith(".npz"))
            raise ConfigError(
                f"got finish for the language {language!r}, expected one of {', '.join(known)}; "
                "leave it out for plain words"
            )
        return cls.read(file.read_bytes())

    @classmethod
    def read(cls, data: bytes) -> Finisher:
        """From the bytes of a file that :meth:`write` made."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            spelled = bytes(arrays["forms"]).decode().split("\n")
            forms = {form.lower(): form for form in spelled if form}
            return cls(arrays["marks"], arrays["cases"], forms)

    def write(self) -> bytes:
        """As the bytes of an npz file."""
        out = io.BytesIO()
        forms = "\n".join(sorted(self._forms.values())).encode()
        np.savez_compressed(
            out, marks=self._marks, cases=self._cases, forms=np.frombuffer(forms, np.uint8)
        )
        return out.getvalue()

    def marks(self, words: Sequence[str]) -> list[str]:
        """The mark behind each word."""
        marks: list[str] = []
        start = 0
        for at in range(len(words)):
            scores = self._score(self._marks, mark_features(words, at, start))
            marks.append(MARKS[int(scores.argmax())])
            if marks[-1] in (".", "?"):
                start = at + 1
        return marks

    def case(self, words: Sequence[str], at: int) -> str:
        """Word ``at`` as it is written within a sentence."""
        word = words[at]
        if word in self._forms:
            return self._forms[word]
        case = int(self._score(self._cases, case_features(words, at)).argmax())
        return word if case == LOWER else word.upper() if case == UPPER else _capital(word)

    def finish(self, words: Sequence[str], *, open_sentence: bool = False) -> tuple[str, bool]:
        """The text of a segment.

        Args:
            words: as recognised.
            open_sentence: the segment goes on with the sentence of the one before.

        Returns:
            The text, and whether it leaves its sentence open.
        """
        if not words:
            return "", open_sentence
        marks = self.marks(words)
        written = []
        begins = not open_sentence
        for span in format_numbers(words, [bool(mark) for mark in marks]):
            text = span.text
            if span.end == span.start + 1 and text == words[span.start]:
                text = self.case(words, span.start)
            written.append((_capital(text) if begins else text) + marks[span.end - 1])
            begins = marks[span.end - 1] in (".", "?")
        return " ".join(written), not begins

    def _score(self, table: NDArray[np.int8], features: Iterator[str]) -> NDArray[np.int64]:
        rows = [bucket(feature, len(table)) for feature in features]
        scores: NDArray[np.int64] = table[rows].sum(axis=0, dtype=np.int64)
        return scores


class Finishing:
    """The finisher's view of one stream: whether a sentence is open."""

    def __init__(self, finisher: Finisher) -> None:
        self._finisher = finisher
        self._open = False

    def finish(self, words: Sequence[str]) -> str:
        """The text of the segment that follows."""
        text, self._open = self._finisher.finish(words, open_sentence=self._open)
        return text


def has_finisher(language: str) -> bool:
    """Whether there is one for a language."""
    return (files("loquent.engine") / _FOLDER / f"{language}.npz").is_file()


@cache
def finisher(language: str) -> Finisher:
    """As :meth:`Finisher.load`, once for each language."""
    return Finisher.load(language)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
