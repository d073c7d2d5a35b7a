"""Hotwords: phrases that a session expects, as an automaton that biases a search towards them.

The phrases lie in a trie with the failure links of Aho and Corasick (Commun. ACM 18(6), 1975). It
is a trie of characters and not of one encoding in subwords: a token moves through it by all its
characters, so whatever way the model spells a phrase with its own pieces is the phrase.

As in the context graphs of icefall and sherpa, a hypothesis is paid in advance while it spells a
phrase, and pays back when it leaves before the end; so of two hypotheses that said other things the
score differs by nothing. Phrases begin and end between words: "cat" pays nothing in "category".
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loquent.engine.errors import ConfigError
from loquent.engine.text import WORD_START, normalise

Float32 = NDArray[np.float32]

DEFAULT_BOOST = 0.4
MAX_BOOST = 10.0
MAX_PHRASES = 5000
MAX_CHARACTERS = 100
# Where nothing can be taken back a bias has to win at once, so it counts for more, and of that
# a phrase's first token gets a part (measured: with 1.5 a subword 19 % of rare words instead of
# 12 %, and 0.2 points of WER lost where there are none; with 3 it is 27 %, and 1.8 points).
GREEDY = np.float32(3.75)
FIRST = np.float32(0.3)
_MEMORY = 2048  # states whose bias is kept; a kilobyte or two each
# What normalising may drop without changing how a phrase is said.
_SILENT = frozenset(".,;:!?…\"“”„«»()[]¿¡-‐‑–—_/'’‘ʼ`")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hotword:
    """A phrase and how much to lean towards it.

    Attributes:
        phrase: one or more words as they are written, in any casing.
        boost: natural logarithm for each subword that the phrase takes. More finds more, and hears
            more that was not said. In a list of more than a hundred phrases it counts for less.

    Raises:
        ConfigError: the phrase is empty or too long, or the boost out of range.
    """

    phrase: str
    boost: float = DEFAULT_BOOST

    def __post_init__(self) -> None:
        if not self.phrase.strip():
            raise ConfigError("got an empty hotword, expected one or more words")
        if len(self.phrase) > MAX_CHARACTERS:
            raise ConfigError(
                f"got the hotword {self.phrase[:40]!r}... of {len(self.phrase)} characters, "
                f"expected at most {MAX_CHARACTERS}: give names and terms, not sentences"
            )
        if not 0 < self.boost <= MAX_BOOST:  # NaN too
            raise ConfigError(
                f"got boost {self.boost!r} for the hotword {self.phrase!r}, expected a number "
                f"above 0 and up to {MAX_BOOST:g}; {DEFAULT_BOOST:g} is the default"
            )

    @classmethod
    def parse(cls, text: str) -> Hotword:
        """``PHRASE`` or ``PHRASE:BOOST``. Raises ConfigError."""
        phrase, colon, boost = text.rpartition(":")
        if not colon:
            return cls(phrase=text.strip())
        try:
            return cls(phrase=phrase.strip(), boost=float(boost))
        except ValueError:
            raise ConfigError(
                f"got the hotword {text!r}, expected PHRASE or PHRASE:BOOST with a number"
            ) from None


class HotwordState(NamedTuple):
    """Where a hypothesis stands.

    Attributes:
        node: of the automaton.
        safe: what it keeps if it leaves the phrase that it is spelling: it has said a shorter one.
    """

    node: int
    safe: float


def _crowd(phrases: int) -> float:
    """What a boost is multiplied by in a list of so many phrases.

    The longer the list, the less likely each of its phrases, and the more there is to mistake for
    one: full boosts up to a hundred, three quarters at a thousand (measured by ``loquent words``).
    """
    return 1.0 / (1.0 + max(0.0, math.log10(max(1, phrases) / 100)) / 3)


class HotwordGraph:
    """The phrases of a session in terms of one vocabulary. Immutable but for a memo.

    Args:
        hotwords: the same phrase twice counts with the higher boost.
        pieces: the bundle's tokens by id.
        blank: id of the blank.

    Attributes:
        hotwords: as given.
        words, beginnings: the phrases' words as the model writes them, and all they begin with.
        start: the state in which nothing of a phrase was said.

    Raises:
        ConfigError: too many phrases, or one that the model's pieces cannot spell.
    """

    start = HotwordState(0, 0.0)

    def __init__(self, hotwords: Iterable[Hotword], pieces: Sequence[str], blank: int) -> None:
        self.hotwords = tuple(hotwords)
        if len(self.hotwords) > MAX_PHRASES:
            raise ConfigError(
                f"got {len(self.hotwords)} hotwords, expected at most {MAX_PHRASES}; leave out "
                "those that the model knows anyway"
            )
        self._texts = spoken_texts(pieces, blank)
        self._starts = np.array([text.startswith(WORD_START) for text in self._texts])
        self._spoken = np.array([bool(text) for text in self._texts])
        self._by_character: dict[str, list[int]] = {}
        for token, text in enumerate(self._texts):
            if text:
                self._by_character.setdefault(text[0], []).append(token)
        self._next: list[dict[str, int]] = [{}]
        self._held = [0.0]  # paid in advance on the way to a node
        self._total = [0.0]  # what a phrase that ends there is worth
        self._fail = [0]
        texts = set(self._texts) - {""}
        words: set[str] = set()
        crowd = _crowd(len(self.hotwords))
        for hotword in self.hotwords:
            spelling, count = spell(hotword.phrase, texts)
            words.update(spelling.split(WORD_START)[1:])
            self._add(spelling, crowd * hotword.boost * count / len(spelling))
        self.words = frozenset(words)
        self.beginnings = frozenset(w[:end] for w in words for end in range(1, len(w) + 1))
        self._link()
        self._memo: dict[HotwordState, Float32] = {}
        self._leans: dict[HotwordState, Float32] = {}
        self._root = np.zeros(len(pieces), np.float32)
        for token in range(len(pieces)):
            self._root[token] = self.step(self.start, token)[0]
        self._memo[self.start] = self._root

    def step(self, state: HotwordState, token: int) -> tuple[float, HotwordState]:
        """What saying ``token`` next is worth, and the state after it. Blank is for nothing."""
        node, safe = state
        before = max(self._held[node], safe)
        gained = 0.0
        for character in self._texts[token]:
            if character == WORD_START:
                safe = max(safe, self._total[node])
            after = self._next[node].get(character)
            if after is None:
                node, after = self._leave(node, character)
                if not node:
                    # The phrase before has nothing in common with what begins here, if anything.
                    gained += safe
                    safe = 0.0
            node = after
        return gained + max(self._held[node], safe) - before, HotwordState(node, safe)

    def bias(self, state: HotwordState) -> Float32:
        """The first value of :meth:`step` for every token (V,). Not to be written to."""
        found = self._memo.get(state)
        if found is None:
            if len(self._memo) >= _MEMORY:
                self._memo = {self.start: self._root}
            found = self._memo[state] = self._bias(state)
        return found

    def lean(self, state: HotwordState) -> Float32:
        """The bias (V,) for a search that cannot go back. Not to be written to."""
        found = self._leans.get(state)
        if found is None:
            if len(self._leans) >= _MEMORY:
                self._leans = {}
            found = GREEDY * np.maximum(self.bias(state), 0)
            if not state.node:
                found *= FIRST
            self._leans[state] = found
        return found

    def finish(self, state: HotwordState) -> float:
        """What changes if no token follows: the last word is over, the phrase may be not."""
        held = max(self._held[state.node], state.safe)
        return max(state.safe, self._total[state.node]) - held

    def _bias(self, state: HotwordState) -> Float32:
        node, safe = state
        before = max(self._held[node], safe)
        # Whatever goes on with none of the phrases that are being spelled:
        kept = max(safe, self._total[node]) - before
        bias = np.where(self._starts, self._root + np.float32(kept), np.float32(safe - before))
        bias[~self._spoken] = 0.0
        while node:
            for character in self._next[node]:
                for token in self._by_character.get(character, ()):
                    bias[token] = self.step(state, token)[0]
            node = self._fail[node]
        return bias

    def _leave(self, node: int, character: str) -> tuple[int, int]:
        """The longest end of what was spelled that goes on with ``character``, and where to."""
        while node:
            node = self._fail[node]
            after = self._next[node].get(character)
            if after is not None:
                return node, after
        return 0, 0

    def _add(self, spelling: str, credit: float) -> None:
        node = 0
        for depth, character in enumerate(spelling, 1):
            after = self._next[node].get(character)
            if after is None:
                after = len(self._next)
                self._next[node][character] = after
                self._next.append({})
                self._held.append(0.0)
                self._total.append(0.0)
                self._fail.append(0)
            node = after
            self._held[node] = max(self._held[node], depth * credit)
        self._total[node] = max(self._total[node], len(spelling) * credit)

    def _link(self) -> None:
        """Failure links, by depth; a node is worth no less than the ends of what it spells."""
        level = list(self._next[0].values())
        while level:
            below = []
            for node in level:
                for character, after in self._next[node].items():
                    _, fail = self._leave(node, character)
                    self._fail[after] = fail
                    self._total[after] = max(self._total[after], self._total[fail])
                    self._held[after] = max(self._held[after], self._held[fail])
                    below.append(after)
            level = below


def spoken_texts(pieces: Sequence[str], blank: int) -> list[str]:
    """What each piece says of a phrase: byte pieces and control symbols nothing."""
    return [
        "" if i == blank or (p.startswith("<") and p.endswith(">")) else p.lower()
        for i, p in enumerate(pieces)
    ]


def spell(phrase: str, texts: Set[str]) -> tuple[str, int]:
    """A phrase as pieces write it, and the least number of pieces that it takes.

    Raises:
        ConfigError: these pieces cannot.
    """
    wrong = next(
        (
            c
            for c in phrase
            if not (c.isspace() or c in _SILENT or unicodedata.category(c)[0] in "LMN")
        ),
        None,
    )
    words = normalise(phrase).split()
    spelling = "".join(WORD_START + word for word in words)
    if wrong is None and (count := _pieces(spelling, texts)):
        return spelling, count
    known = set("".join(texts))
    wrong = wrong or next((c for c in spelling if c not in known), None)
    what = f"the character {wrong!r}" if wrong else "these characters together"
    raise ConfigError(
        f"got the hotword {phrase!r}, but this model cannot spell {what}; write it as "
        "it is said, with the letters of the model's language"
    )


def _pieces(spelling: str, texts: Set[str]) -> int:
    """The least number of pieces that spell it, 0 if none do."""
    longest = max(map(len, texts), default=0)
    least: list[float] = [0.0] + [math.inf] * len(spelling)
    for end in range(1, len(spelling) + 1):
        least[end] = min(
            (
                least[at] + 1
                for at in range(max(0, end - longest), end)
                if spelling[at:end] in texts
            ),
            default=math.inf,
        )
    return int(least[-1]) if math.isfinite(least[-1]) else 0
