"""Tokens to words.

Pieces follow sentencepiece: ``▁`` starts a word, ``<0xE4>`` is a byte of a character that has no
piece of its own. With greedy decoding a token never changes once it is out, so every word is
settled as soon as the next one starts, and only the last one may still grow.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from loquent.engine.decode import Token
from loquent.engine.events import Word
from loquent.engine.spelling import Speller
from loquent.engine.words import PLAIN, WordRules

if TYPE_CHECKING:
    from loquent.engine.hotwords import HotwordGraph

WORD_START = "▁"
_BYTES = re.compile("(?:<0x[0-9A-F]{2}>)+")
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'"})
# Hyphens and dashes join words in print but are silent.
_SILENT = re.compile(r"[-–—_/]")
# "yes,no" is two words, "3,000" and "U.S." are one each.
_BETWEEN = re.compile(r"(?<=[^\W\d_])(?:[,;:!?…]|\.{2,})+(?=[^\W\d_])")
_QUOTING = re.compile(r"(?<!\w)'|'(?!\w)")


def join_pieces(pieces: Sequence[str]) -> str:
    """The text of pieces: put together first, spaces made of it once, edges stripped once."""
    text = "".join(pieces)
    if "<0x" in text:
        text = _BYTES.sub(_decode_bytes, text)
    return text.replace(WORD_START, " ").strip()


def normalise(text: str) -> str:
    """Lower case, no punctuation but the apostrophe inside words, single spaces, NFC.

    Letters, marks and digits of any script are kept: a language's own alphabet is not ours to cut.
    """
    text = unicodedata.normalize("NFC", text).translate(_APOSTROPHES).lower()
    text = _BETWEEN.sub(" ", _SILENT.sub(" ", text))
    text = "".join(
        c for c in text if c.isspace() or c == "'" or unicodedata.category(c)[0] in "LMN"
    )
    return " ".join(_QUOTING.sub(" ", text).split())


def _decode_bytes(match: re.Match[str]) -> str:
    return bytes.fromhex(match[0].replace("<0x", "").replace(">", "")).decode(errors="replace")


class Hypothesis:
    """The words of one segment: settled ones, and the last, which may still grow.

    Args:
        pieces: the bundle's tokens by id.
        frame_seconds: from one encoder frame to the next.
        rules: from tokens to times and confidences.
        speller: puts misspelt words right as soon as they are whole.

    Attributes:
        committed: the text of the settled words.
        hotwords: whose words are right.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        frame_seconds: float,
        rules: WordRules = PLAIN,
        speller: Speller | None = None,
    ) -> None:
        self._pieces = pieces
        self._frame_seconds = frame_seconds
        self._rules = rules
        self._speller = speller
        self.hotwords: HotwordGraph | None = None
        self._before: tuple[str, ...] = ()  # the last words of the sentence that were cut off
        self._settled: list[Word] = []
        self._growing: list[Token] = []
        self._after = 0.0  # no word begins before the end of the one before
        self.committed = ""

    def add(self, token: Token, limit: float) -> None:
        """Append a token; no time goes beyond ``limit`` seconds."""
        if self._growing and self._pieces[token.id].startswith(WORD_START):
            self._settle(token.frame, limit)
        self._growing.append(token)

    def followed_by(self, tokens: Sequence[Token], limit: float) -> Hypothesis:
        """This hypothesis if these tokens came next; itself if there are none."""
        if not tokens:
            return self
        longer = copy(self)
        longer._settled, longer._growing = list(self._settled), list(self._growing)
        for token in tokens:
            longer.add(token, limit)
        return longer

    @property
    def settled(self) -> bool:
        """Whether there is a word that will not change any more."""
        return bool(self._settled)

    @property
    def growing(self) -> tuple[Token, ...]:
        """The growing word's tokens."""
        return tuple(self._growing)

    @property
    def growing_since(self) -> int | None:
        """Frame of the first token of the last word, None if there is none."""
        return self._growing[0].frame if self._growing else None

    @property
    def tentative(self) -> str:
        """The growing word's text so far."""
        return join_pieces([self._pieces[token.id] for token in self._growing])

    def words(self, limit: float) -> tuple[Word, ...]:
        """All words, the growing one last."""
        last = self._last(limit)
        return (*self._settled, last) if last else tuple(self._settled)

    def cut(self) -> tuple[Word, ...]:
        """Take the settled words away; the growing one stays."""
        words = tuple(self._settled)
        self._before = self._context()
        self._settled.clear()
        self.committed = ""
        return words

    def finish(self, limit: float) -> tuple[Word, ...]:
        """Take all words away; the last will not grow any more."""
        if last := self._last(limit):
            self._settled.append(self._spelt(last))
        self._growing.clear()
        words = self.cut()
        self._before = ()
        self._after = words[-1].end if words else self._after
        return words

    def _settle(self, following: int, limit: float) -> None:
        """The last word is over: the next one begins with the token of this frame."""
        if word := self._last(min(limit, self._rules.start(following, self._frame_seconds))):
            word = self._spelt(word)
            self._settled.append(word)
            self._after = word.end
            self.committed = f"{self.committed} {word.text}".lstrip()
        self._growing.clear()

    def _context(self) -> tuple[str, ...]:
        return (*self._before, *(word.text for word in self._settled[-2:]))[-2:]

    def _spelt(self, word: Word) -> Word:
        if self._speller is None:
            return word
        known = self.hotwords.words if self.hotwords else ()
        text = self._speller.fix(word.text, self._context(), known)
        return word if text == word.text else replace(word, text=text)

    def _last(self, limit: float) -> Word | None:
        text = self.tentative
        if not text:
            return None  # nothing yet, or a lone word start
        first, last = self._growing[0], self._growing[-1]
        rules, seconds = self._rules, self._frame_seconds
        start = max(min(rules.start(first.frame, seconds), limit), self._after)
        characters = len(self._pieces[last.id].removeprefix(WORD_START))
        end = min(rules.end(last.frame, characters, seconds), limit)
        return Word(
            text=text,
            start=start,
            end=max(start, end),
            confidence=rules.confidence(self._growing),
        )
