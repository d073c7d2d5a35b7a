"""Written English numbers as they are spoken: the inverse of ``engine/numbers.py``."""

from __future__ import annotations

import re


def _words(text: str) -> list[str]:
    return text.split()


_SMALL = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = _words("_ _ twenty thirty forty fifty sixty seventy eighty ninety")
_IRREGULAR = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_TIME = re.compile(r"(\d{1,2}):(\d\d)(am|pm|a\.m|p\.m)?", re.IGNORECASE)
_MONEY = re.compile(r"\$(\d[\d,]*)(?:\.(\d\d))?")
_ORDINAL = re.compile(r"(\d+)(?:st|nd|rd|th)")
_PERCENT = re.compile(r"(\d+)%")
_HALF_DAY = re.compile(r"(\d{1,2})(am|pm)", re.IGNORECASE)
_MOST = 1_000_000_000


def spoken(token: str) -> str | None:
    """A token as it is said; itself if it has no digits, None if it is not understood."""
    if not any(c.isdigit() for c in token):
        return token
    token = token.strip("\"'“”‘’([{*_")
    if m := _TIME.fullmatch(token):
        hour, minute = int(m[1]), int(m[2])
        if hour > 12 or minute > 59:
            return None
        rest = [] if not minute else ["oh", _SMALL[minute]] if minute < 10 else [cardinal(minute)]
        half = [m[3].lower().replace(".", "")] if m[3] else []
        # Without minutes nor half of the day it would be "ten", which is no time any more.
        return " ".join([cardinal(hour), *rest, *half]) if rest or half else None
    if m := _HALF_DAY.fullmatch(token):
        return f"{cardinal(int(m[1]))} {m[2].lower()}"
    if m := _MONEY.fullmatch(token):
        value = int(m[1].replace(",", ""))
        dollars = f"{cardinal(value)} dollar{'' if value == 1 else 's'}"
        cents = int(m[2] or 0)
        return f"{dollars} and {cardinal(cents)} cents" if cents else dollars
    if m := _ORDINAL.fullmatch(token):
        return ordinal(int(m[1])) if int(m[1]) < 100 else None
    if m := _PERCENT.fullmatch(token):
        return f"{cardinal(int(m[1]))} percent"
    plain = token.replace(",", "")
    if not plain.isascii() or not plain.isdigit() or (plain != token and len(plain) < 4):
        return None
    if (len(plain) > 1 and plain[0] == "0") or len(plain) > 6:
        return " ".join(_SMALL[int(c)] for c in plain)
    value = int(plain)
    if 1300 <= value <= 2099 and plain == token and value % 1000 >= 10:
        return year(value)
    return cardinal(value)


def cardinal(value: int) -> str:
    """0 up to, not including, a billion."""
    if not 0 <= value < _MOST:
        raise ValueError(f"got {value}, expected 0 to {_MOST - 1}")
    if value < 20:
        return _SMALL[value]
    if value < 100:
        return f"{_TENS[value // 10]} {_SMALL[value % 10]}" if value % 10 else _TENS[value // 10]
    for unit, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if value >= unit:
            rest = f" {cardinal(value % unit)}" if value % unit else ""
            return f"{cardinal(value // unit)} {name}{rest}"
    raise AssertionError(value)


def ordinal(value: int) -> str:
    """As :func:`cardinal`, of a rank."""
    *before, last = cardinal(value).split()
    last = _IRREGULAR.get(last) or (last[:-1] + "ieth" if last.endswith("y") else last + "th")
    return " ".join([*before, last])


def year(value: int) -> str:
    """1300 to 2099 as a year is read."""
    century, rest = divmod(value, 100)
    if rest >= 10:
        return f"{cardinal(century)} {cardinal(rest)}"
    return f"{cardinal(century)} oh {_SMALL[rest]}" if rest else f"{cardinal(century)} hundred"
