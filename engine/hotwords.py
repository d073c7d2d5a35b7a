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
import threading
import unicodedata
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
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
MAX_TOTAL = 100_000  # characters of a list: five thousand names have fifteen each
# Where nothing can be taken back a bias has to win at once, so it counts for more, and of that
# a phrase's first token gets a part (measured: with 1.5 a subword 19 % of rare words instead of
# 12 %, and 0.2 points of WER lost where there are none; with 3 it is 27 %, and 1.8 points).
GREEDY = np.float32(3.75)
FIRST = np.float32(0.3)
_MEMORY = 2048  # states whose bias is kept; a kilobyte or two each
# Lists whose automata are kept for the next session with them, and the characters of these lists.
_LISTS, _KEPT = 16, 250_000
_START = ord(WORD_START)
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


def check_size(hotwords: Sequence[Hotword]) -> None:
    """Raises ConfigError: too many phrases, or too long ones for so many."""
    if len(hotwords) > MAX_PHRASES:
        raise ConfigError(
            f"got {len(hotwords)} hotwords, expected at most {MAX_PHRASES}; leave out those that "
            "the model knows anyway"
        )
    total = characters(hotwords)
    if total > MAX_TOTAL:
        raise ConfigError(
            f"got {len(hotwords)} hotwords of {total} characters together, expected at most "
            f"{MAX_TOTAL}; give names and terms, and leave out those that the model knows anyway"
        )


def characters(hotwords: Iterable[Hotword]) -> int:
    """Of all phrases together: what an automaton costs to build and to keep."""
    return sum(len(hotword.phrase) for hotword in hotwords)


def _crowd(phrases: int) -> float:
    """What a boost is multiplied by in a list of so many phrases.

    The longer the list, the less likely each of its phrases, and the more there is to mistake for
    one: full boosts up to a hundred, three quarters at a thousand (measured by ``loquent words``).
    """
    return 1.0 / (1.0 + max(0.0, math.log10(max(1, phrases) / 100)) / 3)


class _Trie:
    """Strings of code points, by nodes; the root is 0, which is no node's child.

    Nearly all nodes have one child. It is kept in two arrays, of 4 bytes a node each, as a dict for
    every node would take ten times as much as all else.
    """

    def __init__(self) -> None:
        self._letter = array("I", [0])  # that leads to the first child ...
        self._child = array("I", [0])  # ... and the child; 0 for none
        self._more: dict[int, dict[int, int]] = {}  # the other children

    def child(self, node: int, letter: int) -> int:
        """Where a letter leads to, 0 if nowhere."""
        if self._letter[node] == letter:
            return self._child[node]
        more = self._more.get(node)
        return more.get(letter, 0) if more else 0

    def children(self, node: int) -> list[tuple[int, int]]:
        """Every letter that leads on, and where to."""
        if not self._child[node]:
            return []
        return [(self._letter[node], self._child[node]), *self._more.get(node, {}).items()]

    def grow(self, node: int, letter: int) -> int:
        """A new child."""
        new = len(self._child)
        if self._child[node]:
            self._more.setdefault(node, {})[letter] = new
        else:
            self._letter[node], self._child[node] = letter, new
        self._letter.append(0)
        self._child.append(0)
        return new


class HotwordGraph:
    """The phrases of a session in terms of one vocabulary. Immutable but for a memo.

    Args:
        hotwords: the same phrase twice counts with the higher boost.
        pieces: the bundle's tokens by id.
        blank: id of the blank.

    Attributes:
        hotwords: as given.
        words: the phrases' words as the model writes them.
        start: the state in which nothing of a phrase was said.

    Raises:
        ConfigError: too many phrases, or one that the model's pieces cannot spell.
    """

    start = HotwordState(0, 0.0)

    def __init__(self, hotwords: Iterable[Hotword], pieces: Sequence[str], blank: int) -> None:
        self.hotwords = tuple(hotwords)
        check_size(self.hotwords)
        vocabulary = Vocabulary(pieces, blank)
        self._texts = [tuple(map(ord, text)) for text in vocabulary.texts]
        self._starts = np.array([text.startswith(WORD_START) for text in vocabulary.texts])
        self._spoken = np.array([bool(text) for text in vocabulary.texts])
        self._by_letter: dict[int, list[int]] = {}
        for token, text in enumerate(self._texts):
            if text:
                self._by_letter.setdefault(text[0], []).append(token)
        self._trie = _Trie()
        self._held = array("d", [0.0])  # paid in advance on the way to a node
        self._total = array("d", [0.0])  # what a phrase that ends there is worth
        self._fail = array("I", [0])
        words: set[str] = set()
        crowd = _crowd(len(self.hotwords))
        for hotword in self.hotwords:
            spelling, count = vocabulary.spell(hotword.phrase)
            words.update(spelling.split(WORD_START)[1:])
            self._add(spelling, crowd * hotword.boost * count / len(spelling))
        self.words = frozenset(words)
        self._sorted = sorted(words)
        self._link()
        self._memo: dict[HotwordState, Float32] = {}
        self._leans: dict[HotwordState, Float32] = {}
        self._root = np.zeros(len(pieces), np.float32)
        for token in range(len(pieces)):
            self._root[token] = self.step(self.start, token)[0]
        self._memo[self.start] = self._root

    def begins(self, prefix: str) -> bool:
        """Whether one of the words begins like this."""
        at = bisect_left(self._sorted, prefix)
        return at < len(self._sorted) and self._sorted[at].startswith(prefix)

    def step(self, state: HotwordState, token: int) -> tuple[float, HotwordState]:
        """What saying ``token`` next is worth, and the state after it. Blank is for nothing."""
        node, safe = state
        before = max(self._held[node], safe)
        gained = 0.0
        for letter in self._texts[token]:
            if letter == _START:
                safe = max(safe, self._total[node])
            after = self._trie.child(node, letter)
            if not after:
                node, after = self._leave(node, letter)
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
            for letter, _ in self._trie.children(node):
                for token in self._by_letter.get(letter, ()):
                    bias[token] = self.step(state, token)[0]
            node = self._fail[node]
        return bias

    def _leave(self, node: int, letter: int) -> tuple[int, int]:
        """The longest end of what was spelled that goes on with ``letter``, and where to."""
        while node:
            node = self._fail[node]
            after = self._trie.child(node, letter)
            if after:
                return node, after
        return 0, 0

    def _add(self, spelling: str, credit: float) -> None:
        node = 0
        for depth, letter in enumerate(map(ord, spelling), 1):
            after = self._trie.child(node, letter)
            if not after:
                after = self._trie.grow(node, letter)
                self._held.append(0.0)
                self._total.append(0.0)
                self._fail.append(0)
            node = after
            self._held[node] = max(self._held[node], depth * credit)
        self._total[node] = max(self._total[node], len(spelling) * credit)

    def _link(self) -> None:
        """Failure links, by depth; a node is worth no less than the ends of what it spells."""
        level = [after for _, after in self._trie.children(0)]
        while level:
            below = []
            for node in level:
                for letter, after in self._trie.children(node):
                    _, fail = self._leave(node, letter)
                    self._fail[after] = fail
                    self._total[after] = max(self._total[after], self._total[fail])
                    self._held[after] = max(self._held[after], self._held[fail])
                    below.append(after)
            level = below


Hotwords = Sequence[Hotword] | HotwordGraph
"""A list, or what was made of one."""


class HotwordCache:
    """The automata of the lists that came last: sessions with the same list share one.

    For any thread. One is built at a time, whoever asks.

    Args:
        pieces, blank: see `HotwordGraph`.
    """

    def __init__(self, pieces: Sequence[str], blank: int) -> None:
        self._pieces, self._blank = pieces, blank
        self._graphs: dict[tuple[Hotword, ...], HotwordGraph] = {}  # the last ones last
        self._building = threading.Lock()
        self._looking = threading.Lock()

    def find(self, hotwords: tuple[Hotword, ...]) -> HotwordGraph | None:
        """The automaton of a list, if it is kept."""
        with self._looking:
            graph = self._graphs.pop(hotwords, None)
            if graph is not None:
                self._graphs[hotwords] = graph
        return graph

    def get(self, hotwords: tuple[Hotword, ...]) -> HotwordGraph:
        """The automaton of a list, built if need be. Raises ConfigError, see `HotwordGraph`."""
        with self._building:
            graph = self.find(hotwords)
            if graph is None:
                graph = HotwordGraph(hotwords, self._pieces, self._blank)
                self._keep(hotwords, graph)
        return graph

    def _keep(self, hotwords: tuple[Hotword, ...], graph: HotwordGraph) -> None:
        with self._looking:
            self._graphs[hotwords] = graph
            while len(self._graphs) > _LISTS or sum(map(characters, self._graphs)) > _KEPT:
                del self._graphs[next(iter(self._graphs))]


class Vocabulary:
    """What a model's pieces can write.

    Args:
        pieces, blank: see `HotwordGraph`.

    Attributes:
        texts: what each piece says of a phrase: byte pieces and control symbols nothing.
    """

    def __init__(self, pieces: Sequence[str], blank: int) -> None:
        self.texts = [
            "" if i == blank or (p.startswith("<") and p.endswith(">")) else p.lower()
            for i, p in enumerate(pieces)
        ]
        self._known = frozenset(self.texts) - {""}
        self._letters = frozenset(text for text in self._known if len(text) == 1)
        self._longest = max(map(len, self._known), default=0)

    def can_spell(self, phrase: str) -> bool:
        """Whether `spell` takes it; much faster where every letter has a piece of its own."""
        spelling = _spelling(phrase)
        if _wrong(phrase) is not None or not spelling:
            return False
        return self._letters.issuperset(spelling) or self._count(spelling) > 0

    def spell(self, phrase: str) -> tuple[str, int]:
        """A phrase as pieces write it, and the least number of pieces that it takes.

        Raises:
            ConfigError: these pieces cannot.
        """
        wrong = _wrong(phrase)
        spelling = _spelling(phrase)
        if wrong is None and (count := self._count(spelling)):
            return spelling, count
        known = set("".join(self._known))
        wrong = wrong or next((c for c in spelling if c not in known), None)
        what = f"the character {wrong!r}" if wrong else "these characters together"
        raise ConfigError(
            f"got the hotword {phrase!r}, but this model cannot spell {what}; write it as "
            "it is said, with the letters of the model's language"
        )

    def _count(self, spelling: str) -> int:
        """The least number of pieces that spell it, 0 if none do."""
        known, longest = self._known, self._longest
        none = len(spelling) + 1
        least = [0]
        for end in range(1, none):
            fewest = none
            for at in range(max(0, end - longest), end):
                if least[at] < fewest and spelling[at:end] in known:
                    fewest = least[at] + 1
            least.append(fewest)
        return least[-1] % none


def _spelling(phrase: str) -> str:
    return "".join(WORD_START + word for word in normalise(phrase).split())


def _wrong(phrase: str) -> str | None:
    """The first character that is no part of a word and cannot be left out either."""
    for c in dict.fromkeys(phrase):
        if not (c.isspace() or c in _SILENT or unicodedata.category(c)[0] in "LMN"):
            return c
    return None
