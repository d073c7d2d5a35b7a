"""Misspelt words put right: the likeliest of the words that the language model knows.

A model of subwords writes what it hears ("laotennit"), and of a word that it has rarely read it
knows the sound and not the spelling. What comes out is no word that the language model knows, and
then the noisy channel of spelling correction applies (Kernighan, Church and Gale 1990): the word
that is likeliest here, times the probability of its being written like that. The latter falls with
the edit distance, in which letters that sound alike cost less.

Only whole words are looked at, each with those before it alone: what was committed never changes.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loquent.engine.errors import ConfigError
from loquent.engine.ngram import Ngram

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_VOWELS = "aeiouy"
# Consonants said in nearly the same place, or written for the same sound.
_ALIKE = ("ckqsxz", "dt", "bp", "fvw", "mn", "gj", "lr")
_VOWEL, _NEAR, _WEAK, _FAR = 0.4, 0.5, 0.5, 1.0
_SHORTEST = 4  # letters; shorter words are near everything
_MOST = 3.0  # edits, however long the word
_MEMORY = 4096  # misspelt words whose neighbours are remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class SpellingRules:
    """How far to go.

    Attributes:
        reach: edits a letter of the word as heard; nothing beyond it is looked at.
        weight: what an edit costs, in nats of the language model.
    """

    reach: float = 0.25
    weight: float = 8.0

    def __post_init__(self) -> None:
        for name in ("reach", "weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"got {name} {value!r} of spelling, expected a number from 0 on")


SPELLING_RULES = tuple(field.name for field in fields(SpellingRules))


class _Level(NamedTuple):
    """Nodes of one depth of the trie.

    Attributes:
        parents: their parents, by index among the nodes above.
        letters: codes of what leads to them.
        gaps: what it costs to leave that letter out.
        words: the word that ends in each, -1 for none.
    """

    parents: Int64
    letters: Int64
    gaps: Float32
    words: Int64


class Speller:
    """The words of one language model, as a trie of their letters. Shared by all streams.

    Args:
        ngram: whose words are right.
        rules: how far to go.
    """

    def __init__(self, ngram: Ngram, rules: SpellingRules) -> None:
        self._ngram, self.rules = ngram, rules
        self._words = sorted(word for word in ngram.ids if word.isalpha())
        points, codes = np.unique(_points("".join(self._words)), return_inverse=True)
        self._letters = [chr(point) for point in points]
        self._levels = list(self._trie(codes))
        self._memo: dict[str, list[tuple[str, float]]] = {}

    def _trie(self, codes: Int64) -> list[_Level]:
        lengths = np.array([len(word) for word in self._words], np.int64)
        inside = np.arange(lengths.max(initial=0)) < lengths[:, None]
        letters = np.full(inside.shape, -1, np.int64)
        letters[inside] = codes
        weak = np.array([_is_weak(letter) for letter in self._letters], bool)
        levels = []
        # A word begins a node if it differs from the word before it in one of the letters so far.
        new = np.zeros(len(lengths), bool)
        new[:1] = True
        above = np.zeros(1, np.int64)
        for depth in range(inside.shape[1]):
            new[1:] |= letters[1:, depth] != letters[:-1, depth]
            first = np.flatnonzero(new & inside[:, depth])
            own = letters[first, depth]
            cheap = weak[own] | (own == letters[first, depth - 1] if depth else False)
            levels.append(
                _Level(
                    parents=above.searchsorted(first, "right") - 1,
                    letters=own,
                    gaps=np.where(cheap, np.float32(_WEAK), np.float32(_FAR)),
                    words=np.where(lengths[first] == depth + 1, first, -1),
                )
            )
            above = first
        return levels

    def fix(self, word: str, before: Sequence[str], known: Collection[str] = ()) -> str:
        """The word, or what it was most likely meant to be.

        Args:
            word: as heard, whole.
            before: the words before it in the sentence, as they were fixed.
            known: more words that are right.
        """
        ids, rules = self._ngram.ids, self.rules
        if len(word) < _SHORTEST or word in ids or word in known or not word.isalpha():
            return word
        near = self.near(word)
        if not near:
            return word
        state = self._ngram.start
        for earlier in before[-2:]:
            state = self._ngram.score(state, ids.get(earlier, self._ngram.unknown))[1]

        def score(found: tuple[str, float]) -> float:
            return self._ngram.score(state, ids[found[0]])[0] - rules.weight * found[1]

        return max(near, key=score)[0]

    def near(self, word: str) -> list[tuple[str, float]]:
        """Known words within reach, with their distances."""
        found = self._memo.get(word)
        if found is None:
            if len(self._memo) >= _MEMORY:
                self._memo.clear()
            found = self._memo[word] = self._search(word, min(self.rules.reach * len(word), _MOST))
        return found

    def _search(self, word: str, limit: float) -> list[tuple[str, float]]:
        """Edit distances (Wagner and Fischer 1974) down the trie, level by level.

        Shapes: I letters of the word, N nodes of a level that are within the limit.
        """
        gaps_I = _gaps(word)
        swaps_IV = np.array([[_swap(c, other) for other in self._letters] for c in word])
        cost = np.cumsum([0.0, *gaps_I])[:, None]
        alive = np.zeros(1, np.int64)
        found: list[tuple[str, float]] = []
        for level in self._levels:
            # Of the nodes that are alive, which are ascending, the children.
            place = alive.searchsorted(level.parents).clip(max=len(alive) - 1)
            nodes = np.flatnonzero(alive[place] == level.parents)
            if not len(nodes):
                break
            before, swaps = cost[:, place[nodes]], swaps_IV[:, level.letters[nodes]]
            cost = before + level.gaps[nodes]
            np.minimum(cost[1:], before[:-1] + swaps, out=cost[1:])
            for i, gap in enumerate(gaps_I):
                np.minimum(cost[i + 1], cost[i] + gap, out=cost[i + 1])
            ends = np.flatnonzero((level.words[nodes] >= 0) & (cost[-1] <= limit))
            names = level.words[nodes[ends]].tolist()
            found += zip((self._words[i] for i in names), cost[-1, ends].tolist(), strict=True)
            kept = np.flatnonzero(cost.min(axis=0) <= limit)
            alive, cost = nodes[kept], cost[:, kept]
            if not len(alive):
                break
        return found


def _points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _plain(letter: str) -> str:
    return unicodedata.normalize("NFD", letter)[0]


def _is_weak(letter: str) -> bool:
    return _plain(letter) in _VOWELS


@cache
def _swap(a: str, b: str) -> float:
    """What it costs to have written one letter for another."""
    if a == b:
        return 0.0
    a, b = _plain(a), _plain(b)
    if a in _VOWELS and b in _VOWELS:
        return _VOWEL
    return _NEAR if a == b or any(a in group and b in group for group in _ALIKE) else _FAR


def _gaps(word: str) -> list[float]:
    """What it costs to leave each letter out."""
    return [
        _WEAK if _is_weak(letter) or (i and letter == word[i - 1]) else _FAR
        for i, letter in enumerate(word)
    ]
