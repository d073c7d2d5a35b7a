"""How much of a beam agrees on a token, while there is doubt: what a confidence can be made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loquent.engine.decode import Token

# Encoder frames after a token when the beam is asked: late enough for the sounds that follow to
# count, early enough for another opinion to be still there.
PATIENCE = 6
_NEAR = 4  # frames by which two hypotheses may differ on when they heard the same token


def agreed(
    scores: Sequence[float], hypotheses: Sequence[tuple[Token, ...]], since: int, until: int
) -> list[tuple[Token, ...]]:
    """The tokens of hypotheses, those of frames ``since`` to ``until - 1`` with their agreement.

    Args:
        scores: of the hypotheses, natural logarithms up to a constant.
        hypotheses: their tokens that are not settled.
    """
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)

    def ask(token: Token) -> Token:
        if not since <= token.frame < until:
            return token
        mass = sum(
            weight
            for weight, tokens in zip(weights, hypotheses, strict=True)
            if any(t.id == token.id and abs(t.frame - token.frame) <= _NEAR for t in tokens)
        )
        return token._replace(agreed=mass / total)

    return [tuple(map(ask, tokens)) for tokens in hypotheses]
