"""Which words stand behind which part of a finished text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from difflib import SequenceMatcher

from loquent.engine.events import Word

MARKS = ",.?"  # that stand behind words


def written(words: Sequence[Word], text: str) -> list[tuple[Word, str]]:
    """The words of a `Final` with what its text makes of each, in order.

    Words that became a number are one word, from the first one's start to the last one's end. The
    second items, joined by spaces, are the text.
    """
    tokens = text.split()
    plain = [token.rstrip(MARKS).lower() for token in tokens]
    found: list[tuple[Word, str]] = []
    first: tuple[list[Word], list[str]] = [], []  # of one kind alone, before all that matches
    matcher = SequenceMatcher(None, [word.text for word in words], plain, autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            if not found and any(first):
                said, shown = [*first[0], words[a]], [*first[1], tokens[c]]
                found.append((_one(said, shown), " ".join(shown)))
                a, c = a + 1, c + 1
            found += zip(words[a:b], tokens[c:d], strict=True)
            continue
        said, shown = list(words[a:b]), tokens[c:d]
        if not (said and shown) and found:  # the matcher met "five" of "twenty five" too early
            before, head = found.pop()
            said, shown = [before, *said], [head, *shown]
        if said and shown:
            found.append((_one(said, shown), " ".join(shown)))
        else:
            first = said, shown
    return found


def _one(words: Sequence[Word], tokens: Sequence[str]) -> Word:
    return dataclasses.replace(
        words[0],
        text=" ".join(token.rstrip(MARKS).lower() for token in tokens),
        end=words[-1].end,
        confidence=min(word.confidence for word in words),
    )
