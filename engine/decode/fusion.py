"""A word language model in terms of subwords, as a beam search wants it.

The model is applied to whole words, and to the beginning of a word as the best word that begins so,
which keeps hypotheses in the middle of a word comparable with those at its end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import NamedTuple

from loquent.engine.decode.neural import Neural, Said
from loquent.engine.errors import ConfigError
from loquent.engine.hotwords import HotwordGraph, HotwordState
from loquent.engine.ngram import Ngram, State
from loquent.engine.text import WORD_START


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamRules:
    """How wide to search and what counts how much; scores are natural logarithms.

    Attributes:
        beam: hypotheses kept.
        margin: a hypothesis that is this much worse than the best is dropped.
        horizon: encoder frames after which a token of the best hypothesis is settled.
        ctc: share of CTC where both CTC and RNN-T score; RNN-T has the rest.
        lm_weight: of the language model.
        own_weight: of the transducer's own language model, which is taken off: it learnt from a
            thousandth of the other's text (arXiv 2011.01991).
        word_bonus: for every word, against the deletions that a language model causes.
        unknown: for a word that the language model does not know ...
        unknown_letter: ... and for each of its letters from the ninth on. Names are short, and what
            is long is mostly two words whose boundary was not heard.
        blank_penalty: taken off blank in every frame.
    """

    beam: int = 8
    margin: float = 5.0
    horizon: int = 50
    ctc: float = 0.5
    lm_weight: float = 0.4
    own_weight: float = 0.0
    word_bonus: float = 1.5
    unknown: float = -10.0
    unknown_letter: float = 0.0
    blank_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise ConfigError(f"got beam {self.beam}, expected 1 or more")
        if not 0 <= self.ctc <= 1:
            raise ConfigError(f"got ctc {self.ctc!r}, expected a share from 0 to 1")
        for name in BEAM_WEIGHTS:
            check_weight(name, getattr(self, name))


# What a manifest holds of them besides the beam.
BEAM_WEIGHTS = (
    "margin",
    "ctc",
    "lm_weight",
    "own_weight",
    "word_bonus",
    "unknown",
    "unknown_letter",
    "blank_penalty",
)
_ANY = frozenset({"word_bonus", "unknown", "unknown_letter", "blank_penalty"})  # also below 0
_SHORT = 8  # letters of an unknown word that cost nothing more


def check_weight(name: str, value: float) -> None:
    """Raises ConfigError for what makes no sense as a weight or penalty."""
    low = -math.inf if name in _ANY else 0.0
    if not (low <= value and math.isfinite(value)):
        expected = "a number" if low else "a number, 0 or above"
        raise ConfigError(f"got {name} {value!r}, expected {expected}")


class Words(NamedTuple):
    """The language model's view of a hypothesis.

    Attributes:
        state: behind the words that are over.
        total: their scores together.
        growing: the word that is not over.
        score: ``total`` and what is to be expected of the growing word.
        hot: where the hypothesis stands in the hotwords.
        said: the words that are over, as a neural model sees them, if there is one.
        gained: what of that model's view is in ``total``.
        ending: what it adds should the growing word be over; None until it was asked.
    """

    state: State
    total: float
    growing: str
    score: float
    hot: HotwordState = HotwordGraph.start
    said: Said | None = None
    gained: float = 0.0
    ending: float | None = None


def reconsider(searches: Sequence[tuple[Fusion, Sequence[Words]]]) -> list[list[Words]]:
    """Ask the neural model about the words that searches have gained, together.

    Args:
        searches: each with its hypotheses' words. All are of one bundle.

    Returns:
        The words of each, the model's view in their scores.
    """
    neural = next((fusion._neural for fusion, _ in searches if fusion._neural), None)
    if neural is None:
        return [list(every) for _, every in searches]
    new = [
        (words.said, *fusion._known(words.state, words.growing))
        for fusion, every in searches
        for words in every
        if words.said is not None and words.ending is None
    ]
    neural.compute([said for said, _, _ in new])
    endings = iter(neural.gains(new))
    return [
        [
            words
            if words.said is None or words.ending is not None
            else _gaining(words, words.said, fusion.rules.lm_weight, next(endings))
            for words in every
        ]
        for fusion, every in searches
    ]


def _gaining(words: Words, said: Said, weight: float, ending: float) -> Words:
    gained = weight * said.gain
    more = gained - words.gained
    return words._replace(
        total=words.total + more,
        score=words.score + more,
        gained=gained,
        ending=weight * ending,
    )


class Fusion:
    """The language model in terms of the pieces of one vocabulary. Shared by all streams.

    Args:
        pieces: the bundle's tokens by id.
        ngram: None scores nothing.
        rules: weights.
        neural: a network beside the n-gram.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        ngram: Ngram | None,
        rules: BeamRules,
        neural: Neural | None = None,
    ) -> None:
        self._starts = [piece.startswith(WORD_START) for piece in pieces]
        self._texts = [piece.removeprefix(WORD_START) for piece in pieces]
        self._models = ngram, neural if ngram else None
        self._ngram, self._neural = self._models
        self.rules = rules
        self.hotwords: HotwordGraph | None = None
        self._ahead: dict[str, float] = {}
        if ngram:
            for word, index in ngram.ids.items():
                logp = ngram.unigram(index)
                for end in range(1, len(word) + 1):
                    prefix = word[:end]
                    if logp > self._ahead.get(prefix, -math.inf):
                        self._ahead[prefix] = logp
            self._ahead[""] = 0.0
        # What a hotword that the language model does not know counts as.
        known = [w for w in ngram.ids if not w.startswith("<")] if ngram else []
        self._rarest = min((self._ahead[w] for w in known), default=0.0)

    def adjusted(self, lm_weight: float | None, blank_penalty: float | None) -> Fusion:
        """With a session's own weights. Without weight the language model plays no part."""
        rules = self.rules
        if lm_weight is not None:
            rules = replace(rules, lm_weight=lm_weight)
        if blank_penalty is not None:
            rules = replace(rules, blank_penalty=blank_penalty)
        other = copy(self)
        other.rules = rules
        other._ngram, other._neural = self._models if rules.lm_weight else (None, None)
        return other

    def biased(self, hotwords: HotwordGraph | None) -> Fusion:
        """With a session's hotwords, whose words the language model then takes for rare ones."""
        other = copy(self)
        other.hotwords = hotwords
        return other

    def ruled(self, rules: BeamRules) -> Fusion:
        """With other rules."""
        other = copy(self)
        other.rules = rules
        return other

    @property
    def active(self) -> bool:
        """Whether there is a language model."""
        return self._ngram is not None

    def start(self) -> Words:
        """The beginning of a sentence."""
        said = self._neural.start if self._neural else None
        return Words(self._ngram.start if self._ngram else (), 0.0, "", 0.0, said=said)

    def extend(self, words: Words, token: int, bonus: float) -> Words:
        """With one more token, which is worth ``bonus`` besides."""
        state, total, growing, _, hot, said, gained, _ = words
        total += bonus
        if self.hotwords:
            gain, hot = self.hotwords.step(hot, token)
            total += gain
        if self._starts[token]:
            if said and growing:
                said = Said(said, *self._known(state, growing))
            score, state = self._word(state, growing)
            total += score
            growing = self._texts[token]
        else:
            growing += self._texts[token]
        return Words(state, total, growing, total + self._expected(growing), hot, said, gained)

    def rebiased(self, words: Words, before: HotwordGraph | None) -> Words:
        """The same after other hotwords: those of ``before`` pay no longer for what is not over."""
        total = words.total + (before.finish(words.hot) if before else 0.0)
        expected = self._expected(words.growing)
        return words._replace(total=total, score=total + expected, hot=HotwordGraph.start)

    def finished(self, words: Words) -> float:
        """The score if the growing word is over, the neural model asked by :func:`reconsider`."""
        hot = self.hotwords.finish(words.hot) if self.hotwords else 0.0
        score = self._word(words.state, words.growing)[0] + (words.ending or 0.0)
        return words.total + hot + score

    def _known(self, state: State, word: str) -> tuple[int, float | None]:
        """Id of a word, and its log-probability by the n-gram if that knows it."""
        assert self._ngram, "there is a language model"
        index = self._ngram.ids.get(word)
        if index is None:
            return self._ngram.unknown, None
        return index, self._ngram.score(state, index)[0]

    def _expected(self, prefix: str) -> float:
        if self._ngram is None:
            return 0.0
        rules = self.rules
        logp = self._ahead.get(prefix)
        if logp is None and self.hotwords and self.hotwords.begins(prefix):
            logp = self._rarest
        return rules.lm_weight * logp if logp is not None else self._unknown(prefix)

    def _unknown(self, word: str) -> float:
        return self.rules.unknown + self.rules.unknown_letter * max(0, len(word) - _SHORT)

    def _word(self, state: State, word: str) -> tuple[float, State]:
        if self._ngram is None or not word:
            return 0.0, state
        rules = self.rules
        index = self._ngram.ids.get(word)
        if index is None:
            _, state = self._ngram.score(state, self._ngram.unknown)
            hot = self.hotwords and word in self.hotwords.words
            score = rules.lm_weight * self._rarest if hot else self._unknown(word)
            return score + rules.word_bonus, state
        logp, state = self._ngram.score(state, index)
        return rules.lm_weight * logp + rules.word_bonus, state
