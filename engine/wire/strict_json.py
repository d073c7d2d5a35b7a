"""The one JSON parser for what strangers send: objects only, nothing deep, no surprises."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, NoReturn

MAX_DEPTH = 16
MAX_NUMBER = 64  # characters
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_object(text: str, *, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """A JSON object as RFC 8259 has it.

    Raises:
        ValueError: no JSON; no object; nested deeper than `max_depth`; a name twice in one object;
            a number of more than 64 characters, NaN or infinity; half of a surrogate pair.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_number,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {max_depth} levels") from None
    if not isinstance(value, dict):
        raise ValueError(f"JSON of type {type(value).__name__}, expected an object")
    if _deeper(value, max_depth):
        raise ValueError(f"nested deeper than {max_depth} levels")
    # Half a surrogate pair is no character, and could not be sent back.
    if "\\u" in text and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("half of a surrogate pair in a string")
    return value


def _deeper(value: dict[str, Any], depth: int) -> bool:
    level: list[Any] = [value]
    for _ in range(depth):
        level = [
            item
            for part in level
            for item in (part.values() if isinstance(part, dict) else part)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        count = Counter(name for name, _ in pairs)
        twice = next(name for name in count if count[name] > 1)
        raise ValueError(f"the name {twice[:40]!r} twice in one object")
    return fields


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def _integer(text: str) -> int:
    return int(_short(text))


def _number(text: str) -> float:
    value = float(_short(text))
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large")
    return value


def _short(text: str) -> str:
    if len(text) > MAX_NUMBER:
        raise ValueError(f"a number of {len(text)} characters, expected at most {MAX_NUMBER}")
    return text
