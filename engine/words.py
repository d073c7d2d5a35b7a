"""What the tokens of a decoder say about its words: when they were said, and how sure they are.

A model says a token some time after its sound began and in one frame, whatever the token's length
(CTC and RNN-T alike), so the frames of tokens are no times of words. How late a model is, and what
its probabilities are worth, is measured (``loquent words``) and comes with the bundle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from loquent.engine.decode import Token

_MARGIN = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class WordRules:
    """Of one decoder of one model; the defaults take what the tokens say as it is.

    Attributes:
        delay: seconds from the beginning of a word to that of the frame of its first token.
        tail: seconds from the end of the frame of a word's last token to the end of the word, if
            no other word begins before.
        tail_character: to be added for every character of the last token.
        bias, least, odds, agreed: the probability that a word is right is the logistic function of
            bias + least * log(p) + odds * log(p / (1 - p)) + agreed * log(a / (1 - a)),
            where p is the lowest probability of its tokens and a their lowest ``Token.agreed``.
    """

    delay: float = 0.0
    tail: float = 0.0
    tail_character: float = 0.0
    bias: float | None = None
    least: float = 0.0
    odds: float = 0.0
    agreed: float = 0.0

    def start(self, frame: int, frame_seconds: float) -> float:
        """Seconds at which a word begins whose first token is in ``frame``."""
        return max(0.0, round(frame * frame_seconds - self.delay, 3))

    def end(self, frame: int, characters: int, frame_seconds: float) -> float:
        """Seconds at which a word ends whose last token, of so many characters, is in ``frame``."""
        tail = self.tail + characters * self.tail_character
        return max(0.0, round((frame + 1) * frame_seconds + tail, 3))

    def confidence(self, tokens: Sequence[Token]) -> float:
        """Probability that the word of these tokens is right, 0 to 1."""
        least, odds, agreed = evidence(tokens)
        if self.bias is None:
            return round(math.exp(least), 3)
        value = self.bias + self.least * least + self.odds * odds + self.agreed * agreed
        return round(1 / (1 + math.exp(-max(-30.0, min(30.0, value)))), 3)


def evidence(tokens: Sequence[Token]) -> tuple[float, float, float]:
    """What ``least``, ``odds`` and ``agreed`` of :class:`WordRules` weigh."""
    least = max(-20.0, min(0.0, *(token.logp for token in tokens)))
    return least, _odds(math.exp(least)), _odds(min(token.agreed for token in tokens))


def _odds(p: float) -> float:
    # The margin keeps what is nearly certain finite.
    return math.log((p + _MARGIN) / (1 - p + _MARGIN))


PLAIN = WordRules()
WORD_RULES = tuple(field.name for field in fields(WordRules))
