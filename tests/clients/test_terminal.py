"""What the captions look like on a terminal, as a terminal would show it."""

from __future__ import annotations

import io
import re
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loquent.clients.terminal import (
    Captions,
    ProgressBar,
    char_width,
    clock_time,
    is_live,
    lay_out,
)
from loquent.engine.events import Ended, Final, Partial


class Screen(io.StringIO):
    """A terminal of unlimited height: what was written, and what one sees."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: dict[tuple[int, int], tuple[str, bool]] = {}
        self.row = self.column = 0
        self.dim = False
        self.last = ""

    def write(self, text: str) -> int:
        self.last = text
        for code, char in re.findall(r"(\x1b\[\d*[A-Za-z])|([\s\S])", text):
            number = int(code[2:-1] or 1) if code else 0
            match code[-1:] or char:
                case "m" if code:
                    self.dim = code == "\x1b[2m"
                case "A" if code:
                    self.row -= number
                    assert self.row >= 0
                case "C" if code:
                    self.column += number
                case "D" if code:
                    self.column -= number
                    assert self.column >= 0
                case "J" if code:
                    here = (self.row, self.column)
                    self.cells = {at: cell for at, cell in self.cells.items() if at < here}
                case "\n":
                    self.row, self.column = self.row + 1, 0
                case "\r":
                    self.column = 0
                case _:
                    assert not code, f"unknown {code!r}"
                    self.cells[self.row, self.column] = char, self.dim
                    self.column += char_width(char)
        return super().write(text)

    def lines(self, *, dim: bool | None = None) -> list[str]:
        rows = max((row for row, _ in self.cells), default=-1) + 1
        shown = [""] * rows
        for (row, column), (char, is_dim) in sorted(self.cells.items()):
            if dim is None or is_dim == dim:
                shown[row] = shown[row].ljust(column) + char
        return [line.rstrip() for line in shown]


def partial(committed: str, tentative: str, segment: int = 0) -> Partial:
    return Partial(
        segment=segment, start=0, end=1, committed=committed, tentative=tentative, words=()
    )


def final(text: str, segment: int = 0) -> Final:
    return Final(segment=segment, start=0, end=1, text=text, words=(), reason="endpoint")


def captions(screen: Screen, width: int = 41) -> Captions:
    return Captions(screen, live=True, width=lambda: width)


WORDS = st.lists(st.text("abcdefg", min_size=1, max_size=9), min_size=1, max_size=25)


@given(segments=st.lists(WORDS, min_size=1, max_size=3), width=st.integers(10, 60), data=st.data())
def test_the_screen_always_shows_the_text_wrapped(
    segments: list[list[str]], width: int, data: st.DataObject
) -> None:
    screen = Screen()
    shown = captions(screen, width + 1)
    above: list[str] = []
    for number, words in enumerate(segments):
        for count in range(len(words)):
            # A word grows letter by letter, or comes at once.
            for length in data.draw(st.sets(st.integers(1, len(words[count])), max_size=3)):
                committed, tentative = " ".join(words[:count]), words[count][:length]
                shown.show(partial(committed, tentative, number))
                text = f"{committed} {tentative}".strip()
                assert screen.lines() == above + textwrap.wrap(text, width)
                assert " ".join(screen.lines(dim=True)).split() == [tentative]
        shown.show(final(" ".join(words), number))
        above += textwrap.wrap(" ".join(words), width)
        assert screen.lines() == above
    assert "".join(screen.lines(dim=True)) == ""
    before = screen.getvalue()
    shown.show(Ended(duration=1, segments=len(segments)))
    assert screen.getvalue() == before


def test_only_what_is_new_is_written() -> None:
    screen = Screen()
    shown = captions(screen)
    words = [f"word{number}" for number in range(40)]
    for count in range(len(words)):
        shown.show(partial(" ".join(words[:count]), words[count]))
        # The growing word, once more as a settled one, the next one, and how to get there.
        assert len(screen.last) < 50
    written = screen.getvalue()
    shown.show(partial(" ".join(words[:-1]), words[-1]))
    assert screen.getvalue() == written
    for word in words[:-1]:
        assert len(re.findall(rf"{word}\b", written)) == 2  # dimmed, then settled, then left alone


def test_one_write_per_change_so_that_nothing_flickers() -> None:
    screen = Screen()
    shown = captions(screen)
    writes: list[str] = []
    original = screen.write
    screen.write = lambda text: writes.append(text) or original(text)  # type: ignore[method-assign,func-returns-value]
    shown.show(partial("", "mor"))
    shown.show(partial("morning", "has"))
    assert len(writes) == 2


def test_a_final_that_differs_from_the_partial() -> None:
    screen = Screen()
    shown = captions(screen)
    shown.show(partial("good", "mourning"))
    shown.show(final("good morning"))
    shown.show(partial("", "next", 1))
    assert screen.lines() == ["good morning", "next"]


def test_a_final_without_a_partial() -> None:
    screen = Screen()
    captions(screen).show(final("hello there"))
    assert screen.lines() == ["hello there"]
    assert screen.getvalue().endswith("\n")


def test_a_window_that_changes_its_width() -> None:
    screen = Screen()
    width = 41
    shown = Captions(screen, live=True, width=lambda: width)
    shown.show(partial("one two three", "four"))
    width = 11
    shown.show(partial("one two three four", "five"))
    assert screen.lines() == ["one two three four", "one two", "three four", "five"]
    shown.show(final("one two three four five"))
    assert screen.lines() == ["one two three four", "one two", "three four", "five"]


def test_words_longer_than_the_line_and_wide_characters() -> None:
    screen = Screen()
    captions(screen, 6).show(final("ab abcdefghijkl x"))
    assert screen.lines() == ["ab", "abcde", "fghij", "kl x"]
    assert [char_width(char) for char in "aé日ｱ\u0301\u200b"] == [1, 1, 2, 1, 0, 0]
    wide = lay_out("日本語", "", 5)
    assert [(cell.row, cell.column) for cell in wide] == [(0, 0), (0, 2), (1, 0)]


def test_a_server_cannot_write_escape_sequences() -> None:
    for live in (True, False):
        out = io.StringIO()
        Captions(out, live=live, width=lambda: 80).show(final("a\x1b[2Jb \x07c\x9b1m"))
        assert "\x1b" not in out.getvalue()
        assert "\x07" not in out.getvalue()
        assert "\x9b" not in out.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    assert not is_live(out)
    shown = Captions(out)
    shown.show(partial("good", "mor"))
    shown.show(final("good morning"))
    shown.show(final("bye", 1))
    shown.show(Ended(duration=1, segments=2))
    assert out.getvalue() == "good morning\nbye\n"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    out.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    assert is_live(out)
    monkeypatch.setenv("TERM", "dumb")
    assert not is_live(out)


def test_the_progress_bar() -> None:
    now = 100.0
    out = io.StringIO()
    bar = ProgressBar(out, "talk.wav", 60.0, live=True, clock=lambda: now)
    now = 102.0
    bar.update(15.0)
    assert out.getvalue() == (
        "\rtalk.wav  [#####...............]  25%  7.5x real time  ETA 0:06\x1b[K"
    )
    now = 102.05
    bar.update(16.0)  # too soon to draw again
    assert out.getvalue().count("\r") == 1
    bar.close()
    assert out.getvalue().endswith("\r\x1b[K")
    assert list(bar.watch([1, 2], lambda: 20.0)) == [1, 2]


def test_the_progress_bar_without_a_length_and_without_a_terminal() -> None:
    out = io.StringIO()
    bar = ProgressBar(out, "x", 0.0, live=True, clock=lambda: 0.0)
    assert bar.line(3700.0, 37.0) == "x  1:01:40  100.0x real time"
    silent = ProgressBar(out, "x", 1.0)
    silent.update(1.0)
    silent.close()
    assert out.getvalue() == ""


def test_clock_times() -> None:
    assert [clock_time(s) for s in (0, 59.4, 59.6, 3599, 3600)] == [
        "0:00",
        "0:59",
        "1:00",
        "59:59",
        "1:00:00",
    ]
