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

    # Hypotheses share most of their tokens, so each is asked for once.
    found: dict[tuple[int, int], float] = {}

    def ask(token: Token) -> Token:
        frame = token.frame
        if not since <= frame < until:
            return token
        key = token.id, frame
        mass = found.get(key)
        if mass is None:
            mass = 0.0
            for weight, tokens in zip(weights, hypotheses, strict=True):
                for other in reversed(tokens):  # in the order of their frames
                    if other.frame < frame - _NEAR:
                        break
                    if other.id == token.id and other.frame <= frame + _NEAR:
                        mass += weight
                        break
            found[key] = mass
        return token._replace(agreed=mass / total)

    return [
        tuple(map(ask, tokens)) if tokens and tokens[-1].frame >= since else tokens
        for tokens in hypotheses
    ]
