"""Greedy decoders on plain arrays, frame by frame, with the state in the caller's hands."""

from __future__ import annotations

from typing import NamedTuple


class Token(NamedTuple):
    """A decoded token.

    Attributes:
        id: line of the token in the bundle's ``tokens.txt``, from 0.
        frame: encoder frame, counted from the start of the stream, that emitted it.
        logp: natural logarithm of its probability at that frame.
        agreed: part of a beam's probability that agreed on it while there was doubt, 0 to 1.
    """

    id: int
    frame: int
    logp: float
    agreed: float = 1.0


class Frame(NamedTuple):
    """What one encoder frame decoded to.

    Attributes:
        number: of the frame, counted from the start of the stream.
        tokens: that it emitted; often none.
        speech: False where the model says blank, which is what silence is to the endpoint rule.
    """

    number: int
    tokens: tuple[Token, ...]
    speech: bool
