"""Finals as subtitle files: SRT and WebVTT.

The numbers follow what broadcasters ask for: two lines of at most 42 characters, on the screen for
one to seven seconds, a new cue where the speaker pauses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from loquent.engine.events import Final, Word

LINE = 42
LONGEST = 7.0
SHORTEST = 1.0
PAUSE = 0.8


@dataclass(frozen=True, slots=True)
class Cue:
    """One subtitle; times in seconds."""

    start: float
    end: float
    lines: tuple[str, ...]


def make_cues(finals: Iterable[Final]) -> list[Cue]:
    """Cues in order of time that do not overlap."""
    groups = [group for final in finals for group in _split(final.words)]
    cues = []
    for number, group in enumerate(groups):
        start, end = group[0].start, group[-1].end
        following = groups[number + 1][0].start if number + 1 < len(groups) else float("inf")
        end = max(min(max(end, start + SHORTEST), following), start)
        cues.append(Cue(start, end, _break(" ".join(word.text for word in group))))
    return cues


def _split(words: Sequence[Word]) -> Iterator[list[Word]]:
    group: list[Word] = []
    for word in words:
        if group:
            text = " ".join([*(member.text for member in group), word.text])
            if (
                max(map(len, _break(text))) > LINE
                or word.end - group[0].start > LONGEST
                or word.start - group[-1].end > PAUSE
            ):
                yield group
                group = []
        group.append(word)
    if group:
        yield group


def _break(text: str) -> tuple[str, ...]:
    """One line, or two as equal as the words allow."""
    if len(text) <= LINE or " " not in text:
        return (text,)
    spaces = [at for at, char in enumerate(text) if char == " "]
    at = min(spaces, key=lambda at: max(at, len(text) - at - 1))
    return text[:at], text[at + 1 :]


def srt(finals: Iterable[Final]) -> str:
    """A SubRip file."""
    return "\n".join(
        f"{number}\n{_time(cue.start, ',')} --> {_time(cue.end, ',')}\n"
        + "\n".join(cue.lines)
        + "\n"
        for number, cue in enumerate(make_cues(finals), 1)
    )


def vtt(finals: Iterable[Final]) -> str:
    """A WebVTT file."""
    cues = (
        f"{_time(cue.start, '.')} --> {_time(cue.end, '.')}\n"
        + "\n".join(escape(line, quote=False) for line in cue.lines)
        + "\n"
        for cue in make_cues(finals)
    )
    return "\n".join(["WEBVTT\n", *cues])


def _time(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, milliseconds = divmod(milliseconds, 1000)
    return f"{hours:02}:{minutes:02}:{whole:02}{point}{milliseconds:03}"
