"""A word n-gram language model with backoff, as data of a bundle.

The probabilities lie in sorted arrays, context by context (the trie layout of KenLM,
https://kheafield.com/papers/avenue/kenlm.pdf), so that a model of a million n-grams takes a few
megabytes and loads without being built. Not KenLM itself: on PyPI it is source only (0.3.0), which
would make a compiler part of the installation; flashlight-text (0.0.7) has it in wheels, but none
for Python 3.13; pyctcdecode (0.5.0) wants numpy below 2. Their models come in as ARPA files.

Made by ``loquent lm``; log-probabilities are natural logarithms.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

State = tuple[int, ...]
"""Ids of the words before, the last one last; at most order - 1."""

UNKNOWN, START = "<unk>", "<s>"
_ORDERS = (2, 3)
_MEMORY = 16_000  # entries of the memo of one model, about 7 MB


@dataclass(frozen=True, eq=False)
class Table:
    """The n-grams of one order above 1. N entries, C contexts (entries of the order below).

    Attributes:
        first: (C + 1,) uint32, where each context's entries start.
        word: (N,) uint16 ids, ascending within a context.
        logp: (N,) float16.
        backoff: (N,) float16, empty for the highest order.
    """

    first: NDArray[np.uint32]
    word: NDArray[np.uint16]
    logp: NDArray[np.float16]
    backoff: NDArray[np.float16]

    def find(self, context: int, word: int) -> int:
        """Index of an n-gram, -1 if there is none."""
        low, high = int(self.first[context]), int(self.first[context + 1])
        if low == high:
            return -1
        at = low + int(self.word[low:high].searchsorted(np.uint16(word)))
        return at if at < high and self.word[at] == word else -1


class Ngram:
    """A backoff model over words.

    Args:
        words: by id; ``<unk>`` and ``<s>`` among them.
        logp, backoff: (V,) of the single words.
        tables: of order 2 and, if there is one, 3.

    Raises:
        ValueError: arrays that do not fit each other.
    """

    def __init__(
        self,
        words: list[str],
        logp: NDArray[np.float16],
        backoff: NDArray[np.float16],
        tables: tuple[Table, ...],
    ) -> None:
        self.ids = {word: i for i, word in enumerate(words)}
        if missing := {UNKNOWN, START} - self.ids.keys():
            raise ValueError(f"got a vocabulary without {', '.join(sorted(missing))}")
        contexts = len(words)
        if not len(logp) == len(backoff) == contexts:
            raise ValueError(f"got {len(logp)} probabilities for {contexts} words")
        for order, table in zip(_ORDERS, tables, strict=False):
            if len(table.first) != contexts + 1 or table.first[-1] != len(table.word):
                raise ValueError(f"the {order}-grams do not fit the {order - 1}-grams")
            if len(table.logp) != len(table.word) or (len(table.word) > 0xFFFFFFFE):
                raise ValueError(f"got {len(table.logp)} probabilities of {order}-grams")
            contexts = len(table.word)
        self.words = words
        self.order = 1 + len(tables)
        self.unknown = self.ids[UNKNOWN]
        self.start: State = (self.ids[START],)
        self._logp: list[float] = logp.astype(np.float64).tolist()
        self._backoff: list[float] = backoff.astype(np.float64).tolist()
        self._tables = tables
        self._memo: dict[tuple[State, int], tuple[float, State]] = {}

    @classmethod
    def from_bytes(cls, data: bytes) -> Ngram:
        """Read what :meth:`to_bytes` wrote. Raises ValueError."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                words = arrays["words"].tobytes().decode().split("\n")
                tables = tuple(
                    Table(
                        first=np.concatenate(
                            [np.zeros(1, np.uint32), arrays[f"count{n}"].cumsum(dtype=np.uint32)]
                        ),
                        word=arrays[f"word{n}"],
                        logp=arrays[f"logp{n}"],
                        backoff=arrays[f"backoff{n}"],
                    )
                    for n in _ORDERS
                    if f"word{n}" in arrays
                )
                return cls(words, arrays["logp1"], arrays["backoff1"], tables)
        except (KeyError, OSError, UnicodeDecodeError, EOFError, BadZipFile) as error:
            raise ValueError(f"no language model of `loquent lm`: {error}") from error

    def to_bytes(self) -> bytes:
        """As a compressed npz file."""
        arrays: dict[str, NDArray[np.generic]] = {
            "words": np.frombuffer("\n".join(self.words).encode(), np.uint8),
            "logp1": np.asarray(self._logp, np.float16),
            "backoff1": np.asarray(self._backoff, np.float16),
        }
        for n, table in zip(_ORDERS, self._tables, strict=False):
            # Counts of entries compress far better than the places they add up to.
            arrays[f"count{n}"] = np.diff(table.first).astype(np.uint16)
            arrays[f"word{n}"] = table.word
            arrays[f"logp{n}"] = table.logp
            arrays[f"backoff{n}"] = table.backoff
        out = io.BytesIO()
        np.savez_compressed(out, **arrays)  # type: ignore[arg-type]
        return out.getvalue()

    def grams(self, order: int) -> Iterator[tuple[tuple[str, ...], float, float | None]]:
        """All n-grams of an order: words, log-probability, and backoff below the highest order."""
        names: list[tuple[str, ...]] = [(word,) for word in self.words]
        if order == 1:
            yield from zip(names, self._logp, self._backoff, strict=True)
            return
        for n, table in zip(_ORDERS, self._tables, strict=False):
            first = table.first.astype(np.int64)
            counts = first[1:] - first[:-1]
            context = np.repeat(np.arange(len(names)), counts).tolist()
            words = table.word.tolist()
            names = [(*names[c], self.words[w]) for c, w in zip(context, words, strict=True)]
            if n == order:
                backoff = table.backoff.tolist() or [None] * len(words)
                yield from zip(names, table.logp.tolist(), backoff, strict=True)
                return

    def unigram(self, word: int) -> float:
        """Log-probability of a word by itself."""
        return self._logp[word]

    def score(self, state: State, word: int) -> tuple[float, State]:
        """Log-probability of a word after ``state``, and the state that follows."""
        key = (state, word)
        known = self._memo.get(key)
        if known is None:
            if len(self._memo) >= _MEMORY:
                self._memo.clear()
            known = self._memo[key] = self._score(state, word)
        return known

    def _score(self, state: State, word: int) -> tuple[float, State]:
        following = (*state, word)[-(self.order - 1) :] if self.order > 1 else ()
        bow = 0.0
        if len(state) == 2 and self.order == 3:
            pair = self._tables[0].find(state[0], state[1])
            if pair >= 0:
                at = self._tables[1].find(pair, word)
                if at >= 0:
                    return float(self._tables[1].logp[at]), following
                bow += float(self._tables[0].backoff[pair])
        if state and self.order > 1:
            at = self._tables[0].find(state[-1], word)
            if at >= 0:
                return bow + float(self._tables[0].logp[at]), following
            bow += self._backoff[state[-1]]
        return bow + self._logp[word], following
