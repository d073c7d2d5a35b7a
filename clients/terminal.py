"""Live captions and a progress bar for a terminal, redrawn without flicker.

A caption is laid out into cells, one per character with its row, column and style. Only what
differs from the cells on the screen is written, in one write: committed words go out once and stay,
and just the growing word behind them, dimmed, is drawn over. Where stdout is no terminal, every
final is one plain line.
"""

from __future__ import annotations

import os
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TextIO, TypeVar

from loquent.engine.events import Ended, Event, Finalized, Partial

T = TypeVar("T")

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
ERASE_BELOW, ERASE_LINE = "\x1b[J", "\x1b[K"


@dataclass(frozen=True, slots=True)
class Cell:
    """One character on the screen; row and column count from where the caption began."""

    char: str
    dim: bool
    row: int
    column: int

    @property
    def end(self) -> tuple[int, int]:
        """Row and column of the place behind it."""
        return self.row, self.column + char_width(self.char)


def char_width(char: str) -> int:
    """Columns that a character takes: 0 (combining), 1, or 2 (wide)."""
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def lay_out(committed: str, tentative: str, width: int) -> list[Cell]:
    """Cells of a caption wrapped between words, in lines of at most `width` columns."""
    words = [(word, False) for word in committed.split()]
    words += [(word, True) for word in tentative.split()]
    cells: list[Cell] = []
    row = column = 0
    for number, (text, dim) in enumerate(words):
        # The text may come from a server: an escape sequence in it must not reach the terminal.
        word = "".join(char for char in text if char.isprintable())
        if number > 0:
            if column + 1 + sum(map(char_width, word)) <= width:
                cells.append(Cell(" ", False, row, column))
                column += 1
            else:
                row, column = row + 1, 0
        for char in word:
            if column + char_width(char) > width:  # a word longer than the line
                row, column = row + 1, 0
            cells.append(Cell(char, dim, row, column))
            column += char_width(char)
    return cells


class Captions:
    """Shows the events of one stream on `out`.

    Args:
        out: where to write.
        live: draw partials; None finds out whether `out` is a terminal that can.
        width: gives the columns of the terminal.
    """

    def __init__(
        self,
        out: TextIO,
        *,
        live: bool | None = None,
        width: Callable[[], int] = lambda: shutil.get_terminal_size().columns,
    ) -> None:
        self._out = out
        self._live = is_live(out) if live is None else live
        self._get_width = width
        self._width = 0
        self._shown: list[Cell] = []

    def show(self, event: Event) -> None:
        """Bring the screen up to date."""
        match event:
            case Ended():
                self.close()
            case Finalized():
                pass
            case Partial():
                if self._live:
                    self._draw(event.committed, event.tentative)
            case final if self._live:
                self._draw(final.text, "")
                self.close()
            case final:
                self._write("".join(c for c in final.text if c.isprintable()) + "\n")

    def close(self) -> None:
        """Leave the caption as it stands and go to a new line. Idempotent."""
        if self._shown:
            self._shown = []
            self._write("\n")

    def _draw(self, committed: str, tentative: str) -> None:
        # The last column stays free: a terminal that has just filled it is in a state of its own.
        width = max(2, self._get_width()) - 1
        if width != self._width:
            self.close()  # the terminal has moved what is on it; begin below
            self._width = width
        cells = lay_out(committed, tentative, width)
        same = 0
        for old, new in zip(self._shown, cells, strict=False):
            if old != new:
                break
            same += 1
        if same == len(self._shown) == len(cells):
            return
        row, column = self._shown[same - 1].end if same else (0, 0)
        text = ""
        if same < len(self._shown):
            last_row, last_column = self._shown[-1].end
            text += _move(last_row, last_column, row, column) + ERASE_BELOW
        dim = False
        for cell in cells[same:]:
            if cell.row > row:
                text += "\n" * (cell.row - row)
                row = cell.row
            if cell.dim != dim:
                text += DIM if cell.dim else PLAIN
                dim = cell.dim
            text += cell.char
        if dim:
            text += PLAIN
        self._shown = cells
        self._write(text)

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def _move(from_row: int, from_column: int, row: int, column: int) -> str:
    if from_row == row:
        return f"\x1b[{from_column - column}D" if from_column > column else ""
    up = f"\x1b[{from_row - row}A\r"
    return up + (f"\x1b[{column}C" if column else "")


def is_live(out: TextIO) -> bool:
    """Whether a stream is a terminal that understands escape sequences."""
    return out.isatty() and os.environ.get("TERM") != "dumb"


class ProgressBar:
    """One line: how much of a recording is done, how fast, and how long it will take.

    Args:
        out: where to draw; nothing is drawn unless it is a terminal.
        label: what is being worked on.
        total: seconds of audio, 0 if unknown.
        clock: seconds from any start.
    """

    def __init__(
        self,
        out: TextIO,
        label: str,
        total: float,
        *,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = out
        self._label = label
        self._total = total
        self._live = is_live(out) if live is None else live
        self._clock = clock
        self._begin = clock()
        self._last = float("-inf")

    def update(self, done: float) -> None:
        """`done` seconds of the audio are recognised."""
        now = self._clock()
        if not self._live or now - self._last < 0.1:
            return
        self._last = now
        line = self.line(done, now - self._begin)
        columns = shutil.get_terminal_size().columns - 1
        self._out.write(f"\r{line[:columns]}{ERASE_LINE}")
        self._out.flush()

    def watch(self, blocks: Iterable[T], done: Callable[[], float]) -> Iterator[T]:
        """`blocks` as they are; the bar follows `done` while they are used up."""
        for block in blocks:
            yield block
            self.update(done())

    def line(self, done: float, elapsed: float) -> str:
        """The text after `elapsed` seconds of work."""
        speed = done / elapsed if elapsed > 0 else 0.0
        parts = [self._label]
        if self._total > 0:
            share = min(1.0, done / self._total)
            filled = round(share * 20)
            parts.append(f"[{'#' * filled}{'.' * (20 - filled)}] {share:4.0%}")
        else:
            parts.append(clock_time(done))
        parts.append(f"{speed:.1f}x real time")
        if self._total > 0 and speed > 0:
            parts.append(f"ETA {clock_time(max(0.0, self._total - done) / speed)}")
        return "  ".join(parts)

    def close(self) -> None:
        """Take the bar away."""
        if self._live and self._last > float("-inf"):
            self._out.write(f"\r{ERASE_LINE}")
            self._out.flush()


def clock_time(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
