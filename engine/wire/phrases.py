"""Hotwords as other people's protocols have them: phrases, and prompts that list some."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from loquent.engine.errors import ConfigError
from loquent.engine.hotwords import MAX_CHARACTERS, Hotword

MAX_WORDS = 4  # of a phrase in a prompt
# In a message, and the characters of all of them. Whether the model can spell them is found out on
# the event loop, at less than a microsecond a character.
MAX_PHRASES = 500
MAX_TOTAL = 10_000
_SENTENCE = re.compile(r"[.?!](?=\s)|[?!]$")


def listed(prompt: str) -> tuple[str, ...]:
    """The phrases of a prompt that lists names and terms, as Whisper's do; none of one in prose.

    A list is parts between commas, semicolons and line ends, each of few words.
    """
    parts = [part.strip() for part in re.split(r"[,;\n]", prompt.strip().removesuffix("."))]
    if _SENTENCE.search(prompt.strip()) or any(
        len(part.split()) > MAX_WORDS or len(part) > MAX_CHARACTERS for part in parts
    ):
        return ()
    return tuple(part for part in parts if part)


def hotwords(
    phrases: Iterable[str], spells: Callable[[str], bool]
) -> tuple[tuple[Hotword, ...], tuple[str, ...]]:
    """Those of the phrases that the model can spell, and the others.

    Raises:
        ConfigError: one is empty or too long, or they are together.
    """
    phrases = list(dict.fromkeys(phrases))
    if (total := sum(map(len, phrases))) > MAX_TOTAL:
        raise ConfigError(
            f"got {len(phrases)} phrases of {total} characters together, expected at most "
            f"{MAX_TOTAL}; give names and terms, and leave out those that the model knows anyway"
        )
    found: list[Hotword] = []
    unknown: list[str] = []
    for phrase in phrases:
        hotword = Hotword(phrase=phrase)
        if spells(phrase):
            found.append(hotword)
        else:
            unknown.append(phrase)
    return tuple(found), tuple(unknown)
