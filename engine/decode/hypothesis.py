"""A prefix of what may have been said, and its probability by CTC, by RNN-T and in words."""

from __future__ import annotations

import math

from loquent.engine.decode import Token
from loquent.engine.decode.fusion import Words
from loquent.engine.decode.transducer import Context

NEVER = -math.inf


class Hypothesis:
    """Tokens that are not settled, what is known of all before them, and how likely they are.

    Attributes:
        ids, tokens: that are not settled.
        last: the last token, settled or not; -1 at the start.
        words: the language model's view.
        context: the predictor's, if RNN-T scores.
        rnnt: probability of all alignments by RNN-T (natural logarithm, as all of them); 0 where
            RNN-T does not score.
        blank, token: of the alignments by CTC that end with blank, and with the last token; 0 and
            minus infinity where CTC does not score.
        total: the score, words and all, once :meth:`weigh` was called.
        longer: a memo of ``ids`` and ``words`` with one more token.
    """

    __slots__ = (
        "blank",
        "context",
        "ids",
        "last",
        "longer",
        "rnnt",
        "token",
        "tokens",
        "total",
        "words",
    )

    def __init__(
        self,
        ids: tuple[int, ...],
        tokens: tuple[Token, ...],
        last: int,
        words: Words,
        context: Context | None,
        rnnt: float,
        blank: float,
        token: float,
    ) -> None:
        self.ids, self.tokens, self.last = ids, tokens, last
        self.words, self.context = words, context
        self.rnnt, self.blank, self.token = rnnt, blank, token
        self.total = 0.0
        self.longer: dict[int, tuple[tuple[int, ...], Words]] = {}

    def scored(self, rnnt: float, blank: float, token: float) -> Hypothesis:
        """The same with other probabilities."""
        other = Hypothesis(
            self.ids, self.tokens, self.last, self.words, self.context, rnnt, blank, token
        )
        other.longer = self.longer
        return other

    def reworded(self, words: Words) -> Hypothesis:
        """The same with another view of its words."""
        other = self.settled(0)
        other.words = words
        other.total += words.score - self.words.score
        return other

    def settled(self, count: int) -> Hypothesis:
        """The same after its first ``count`` tokens have been given out."""
        other = Hypothesis(
            self.ids[count:],
            self.tokens[count:],
            self.last,
            self.words,
            self.context,
            self.rnnt,
            self.blank,
            self.token,
        )
        other.total = self.total
        return other

    def acoustic(self, share: float) -> float:
        """The score without words, ``share`` of it CTC's."""
        return (1 - share) * self.rnnt + share * log_add(self.blank, self.token)

    def weigh(self, share: float) -> Hypothesis:
        """This one, its total known."""
        self.total = self.acoustic(share) + self.words.score
        return self


def log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    # e^-37 is below the resolution of a double; two impossible scores have no difference.
    return a if b == NEVER or b < a - 37.0 else a + math.log1p(math.exp(b - a))
