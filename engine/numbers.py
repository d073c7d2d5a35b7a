"""Spoken English numbers to digits, by rules: "twenty five dollars" -> "$25".

Whole numbers below ten stay words, as style guides want it, unless something makes them a quantity:
money, percent, a time, a date, a decimal point. What is ambiguous stays as it was said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


def _words(text: str) -> list[str]:
    return text.split()


_SMALL = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_UNITS = {word: value for value, word in enumerate(_SMALL)}
_ROUND = _words("twenty thirty forty fifty sixty seventy eighty ninety")
_TENS = {word: 10 * value for value, word in enumerate(_ROUND, 2)}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_RANKS = _words(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
    "thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth"
)
_ORDINALS = {word: value for value, word in enumerate(_RANKS, 1)} | {
    word.removesuffix("y") + "ieth": value for word, value in _TENS.items()
}
_MONTHS = frozenset(
    _words("january february march april may june july august september october november december")
)
_CURRENCIES = {"dollar": "$", "dollars": "$", "euro": "€", "euros": "€"}  # pounds weigh
_VERBS = frozenset({"march", "may"})
_DATE_BEFORE = frozenset(_words("on of by until till since before after from to next last every"))
_TIME_BEFORE = frozenset(
    _words("at by until till around before after from to morning afternoon evening")
)


class Span(NamedTuple):
    """Text in the place of words ``[start, end)``."""

    text: str
    start: int
    end: int


def format_numbers(words: Sequence[str], breaks: Sequence[bool] = ()) -> list[Span]:
    """Spans that cover all words, in order; most are a single word as it was.

    Args:
        words: lower case, as recognised.
        breaks: whether punctuation follows each word, which no number goes beyond; none if empty.
    """
    spans = []
    at = 0
    while at < len(words):
        end = at
        while end < len(words) - 1 and not (breaks and breaks[end]):
            end += 1
        spans += _Reader(words, at, end + 1).read()
        at = end + 1
    return spans


class _Reader:
    """The words ``[at, end)``, between which there is no punctuation."""

    def __init__(self, words: Sequence[str], at: int, end: int) -> None:
        self._words, self._at, self._end = words, at, end

    def read(self) -> list[Span]:
        spans = []
        at = self._at
        while at < self._end:
            span = self._span(at) or Span(self._words[at], at, at + 1)
            spans.append(span)
            at = span.end
        return spans

    def _word(self, at: int) -> str:
        return self._words[at] if self._at <= at < self._end else ""

    def _span(self, at: int) -> Span | None:
        for rule in (self._time, self._ordinal, self._year, self._digits, self._quantity):
            if span := rule(at):
                return span
        return None

    # -- rules -----------------------------------------------------------------------------

    def _time(self, at: int) -> Span | None:
        """ "ten thirty a m", "five o'clock", "at nine oh five"."""
        hour, then = _UNITS.get(self._word(at), 0), at + 1
        if not 1 <= hour <= 12:
            return None
        if self._word(then) == "o'clock":
            return Span(f"{hour} o'clock", at, then + 1)
        minute = None
        if self._word(then) == "oh" and 1 <= _UNITS.get(self._word(then + 1), 0) <= 9:
            minute, then = _UNITS[self._word(then + 1)], then + 2
        elif (found := self._below_hundred(then)) and 10 <= found[0] <= 59:
            minute, then = found
        half, after = self._half_of_day(then)
        clock = f"{hour}" if minute is None else f"{hour}:{minute:02}"
        if half:
            return Span(f"{clock} {half}", at, after)
        # Two numbers in a row could be anything else.
        if minute is not None and self._word(at - 1) in _TIME_BEFORE and not self._counts(then):
            return Span(clock, at, then)
        return None

    def _ordinal(self, at: int) -> Span | None:
        """ "march first", "the first of march", "twenty first"."""
        value, then = 0, at
        if self._word(then) in _TENS:
            unit = _ORDINALS.get(self._word(then + 1), 10)
            if unit < 10:
                value, then = _TENS[self._word(then)] + unit, then + 2
        if not value and self._word(then) in _ORDINALS:
            value, then = _ORDINALS[self._word(then)], then + 1
        if value:
            month = self._word(at - 1)
            in_date = (
                month in _MONTHS - _VERBS
                or (month in _VERBS and self._word(at - 2) in _DATE_BEFORE | {""})
                or (self._word(then) == "of" and self._word(then + 1) in _MONTHS)
            )
            return Span(_nth(value), at, then) if in_date or value >= 10 else None
        # "june five", but "march two" and "may five" are words as often as dates.
        if self._word(at - 1) in _MONTHS - _VERBS:
            day = self._below_hundred(at)
            if day and 1 <= day[0] <= 31 and not self._counts(day[1]):
                return Span(str(day[0]), at, day[1])
        return None

    def _year(self, at: int) -> Span | None:
        """ "nineteen eighty four", "twenty twenty six", "nineteen oh five"."""
        century = self._below_hundred(at, units=False)
        if century is None or not 13 <= century[0] <= 20:
            return None
        then = century[1]
        if self._word(then) == "oh" and 1 <= _UNITS.get(self._word(then + 1), 0) <= 9:
            return Span(f"{century[0]}0{_UNITS[self._word(then + 1)]}", at, then + 2)
        rest = self._below_hundred(then)
        if rest is None or rest[0] < 10 or self._word(rest[1]) in {"hundred", *_SCALES}:
            return None
        before = _UNITS.get(self._word(at - 1)) if self._word(at - 2) not in _MONTHS else None
        after = self._below_hundred(rest[1])
        if before == century[0] - 1 or (after and after[0] == rest[0] + 1):
            return None  # somebody counts
        return Span(f"{century[0]}{rest[0]}", at, rest[1])

    def _digits(self, at: int) -> Span | None:
        """ "five five five oh one": three or more in a row."""
        then, text = at, ""
        while True:
            word = self._word(then)
            value = 0 if word == "oh" and text else _UNITS.get(word, 10)
            if value > 9:
                break
            text, then = text + str(value), then + 1
        if len(text) < 3 or self._word(then) in {"hundred", *_SCALES}:
            return None
        return Span(text, at, then)

    def _quantity(self, at: int) -> Span | None:
        """A whole or decimal number with what it counts."""
        found = self._cardinal(at)
        if found is None:
            return None
        value, then = found
        text = _grouped(value)
        decimal = False
        idiom = value == 1 and self._word(at - 1) == "at"  # "at one point two men came"
        if not idiom and self._word(then) == "point" and _UNITS.get(self._word(then + 1), 10) <= 9:
            then, text, decimal = then + 1, f"{value}.", True
            while (digit := _UNITS.get(self._word(then), 10)) <= 9:
                text, then = text + str(digit), then + 1
        if self._word(then) in ("million", "billion"):
            text, then, decimal = f"{text} {self._word(then)}", then + 1, True
        if self._word(then) in _CURRENCIES:
            sign, then = _CURRENCIES[self._word(then)], then + 1
            skip = then + (self._word(then) == "and")
            cents = self._below_hundred(skip)
            if cents and self._word(cents[1]) in ("cent", "cents") and not decimal:
                return Span(f"{sign}{text}.{cents[0]:02}", at, cents[1] + 1)
            return Span(f"{sign}{text}", at, then)
        if self._word(then) == "percent":
            return Span(f"{text}%", at, then + 1)
        if self._word(then) == "per" and self._word(then + 1) == "cent":
            return Span(f"{text}%", at, then + 2)
        return Span(text, at, then) if value >= 10 or decimal else None

    # -- parts -----------------------------------------------------------------------------

    def _counts(self, at: int) -> bool:
        """Whether a unit follows: what looked like a time or a day counts something."""
        word = self._word(at)
        return word in _CURRENCIES or word in _SCALES or word in ("hundred", "percent", "point")

    def _half_of_day(self, at: int) -> tuple[str, int]:
        word = self._word(at)
        if word in ("am", "pm") and self._word(at + 1) != "i":  # "which one am i"
            return word, at + 1
        if word in ("a", "p") and self._word(at + 1) == "m":
            return f"{word}m", at + 2
        return "", at

    def _below_hundred(self, at: int, *, units: bool = True) -> tuple[int, int] | None:
        """Value and end of "seven", "seventeen", "seventy" or "seventy seven"."""
        word = self._word(at)
        if word in _UNITS:
            return _UNITS[word], at + 1
        if word not in _TENS:
            return None
        unit = _UNITS.get(self._word(at + 1), 0) if units else 0
        return (_TENS[word] + unit, at + 2) if 1 <= unit <= 9 else (_TENS[word], at + 1)

    def _below_thousand(self, at: int) -> tuple[int, int] | None:
        found = self._below_hundred(at)
        if found is None or self._word(found[1]) != "hundred" or not found[0]:
            return found
        value, then = 100 * found[0], found[1] + 1
        rest = self._below_hundred(then + (self._word(then) == "and"))
        if rest and rest[0] and self._word(rest[1]) != "hundred":
            return value + rest[0], rest[1]
        return value, then

    def _cardinal(self, at: int) -> tuple[int, int] | None:
        """ "two hundred and five thousand"; millions are left to words unless more follows."""
        found = self._below_thousand(at)
        if found is None:
            return None
        value, then = found
        if self._word(then) != "thousand" or not value:
            return found
        value, then = 1000 * value, then + 1
        rest = self._below_thousand(then + (self._word(then) == "and"))
        if rest and rest[0] and self._word(rest[1]) not in _SCALES:
            return value + rest[0], rest[1]
        return value, then


def _grouped(value: int) -> str:
    return f"{value:,}" if value >= 10_000 else str(value)


def _nth(value: int) -> str:
    last = value % 10
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(last, "th") if not 11 <= value % 100 <= 13 else "th"
    return f"{value}{suffix}"
