"""How late the tokens of a decoder are: fitted on reference times of words, judged on others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from loquent.engine.words import WordRules
from loquent.export.reference import Times
from loquent.export.wordtrial import Heard

Float = NDArray[np.float64]
_TAILS = np.arange(-0.1, 0.4001, 0.01)
_CHARACTERS = np.arange(0.0, 0.1001, 0.01)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A word that was heard right, and when it was said by the reference.

    Attributes:
        first, last: frames of its first and last token.
        following: frame of the next word's first token, None for the last word.
        characters: of its last token.
        start, end: seconds by the reference.
        duration: seconds of the clip.
    """

    first: int
    last: int
    following: int | None
    characters: int
    start: float
    end: float
    duration: float


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Seconds by which words begin and end too late (negative: too early)."""

    starts: Float
    ends: Float

    def medians(self) -> tuple[float, float]:
        """Median absolute errors of starts and ends."""
        return float(np.median(np.abs(self.starts))), float(np.median(np.abs(self.ends)))


def pairs(
    heard: Sequence[Sequence[Heard]],
    reference: Sequence[Sequence[Times]],
    durations: Sequence[float],
    characters: Sequence[int],
) -> Iterator[Pair]:
    """The words of all clips that have a reference.

    Args:
        characters: of every token, by id.
    """
    for words, times, duration in zip(heard, reference, durations, strict=True):
        for word in words:
            if word.reference is None or not times:
                continue
            said = times[word.reference]
            yield Pair(
                first=word.tokens[0].frame,
                last=word.tokens[-1].frame,
                following=word.following,
                characters=characters[word.tokens[-1].id],
                start=said.start,
                end=said.end,
                duration=duration,
            )


def fit_timing(found: Sequence[Pair], frame_seconds: float, rules: WordRules) -> WordRules:
    """The rules whose times have the least absolute errors, by search over a grid of 10 ms.

    Raises:
        ValueError: there are no words.
    """
    if not found:
        raise ValueError("times need words that were heard right in clips with a reference")
    first = np.array([pair.first for pair in found])
    start = np.array([pair.start for pair in found])
    delay = round(float(np.median(first * frame_seconds - start)), 3)
    last = (np.array([pair.last for pair in found]) + 1) * frame_seconds
    characters = np.array([pair.characters for pair in found])
    end = np.array([pair.end for pair in found])
    most = np.array(
        [
            pair.duration if pair.following is None else pair.following * frame_seconds - delay
            for pair in found
        ]
    )
    best = min(
        (float(np.abs(np.minimum(last + tail + each * characters, most) - end).mean()), tail, each)
        for tail in _TAILS
        for each in _CHARACTERS
    )
    return replace(
        rules, delay=delay, tail=round(float(best[1]), 3), tail_character=round(float(best[2]), 3)
    )


def errors(found: Sequence[Pair], frame_seconds: float, rules: WordRules) -> Errors:
    """What the rules' times are worth, as the engine makes them."""
    starts, ends = [], []
    for pair in found:
        start = min(rules.start(pair.first, frame_seconds), pair.duration)
        end = min(rules.end(pair.last, pair.characters, frame_seconds), pair.duration)
        if pair.following is not None:
            end = min(end, rules.start(pair.following, frame_seconds))
        starts.append(start - pair.start)
        ends.append(max(start, end) - pair.end)
    return Errors(starts=np.array(starts), ends=np.array(ends))
