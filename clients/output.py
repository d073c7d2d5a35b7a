"""Text files that a command writes: only when whole they take the place of what was there."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

_HEAD = 4096  # bytes; audio and video have a zero byte among them, text has none


def refusal(outputs: Iterable[Path], inputs: Iterable[str]) -> str | None:
    """Why the outputs may not be written: one is an input, or a file that is no text; or None."""
    recordings = {_identity(path): name for name in inputs if (path := Path(name)).exists()}
    for path in filter(Path.exists, outputs):
        if name := recordings.get(_identity(path)):
            return (
                f"{path} is the same file as the recording {name}, which the text would destroy; "
                "give -o another name"
            )
        if path.is_file() and _is_binary(path):
            return (
                f"{path} is there already and is no text (a recording?), expected a new name or an "
                "old text; give -o another name, or remove the file first"
            )
    return None


@contextmanager
def open_output(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Gives what writes to a `NewFile`, or at once to a pipe, a device or stdout (None)."""
    if path is None or _is_stdout(path):
        yield partial(print, end="", flush=True)
    elif path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as out:
            yield partial(print, end="", flush=True, file=out)
    else:
        with NewFile(path) as new:
            yield new.write


class NewFile:
    """Text that takes the place of a file as a whole when the block ends.

    Until then it lies beside it under another name. Where nothing was written, or an exception ends
    the block, the file stays as it was. What was written before an exception stays too, and stderr
    says where.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()  # a link stays one
        self._file = _beside(self._path)
        self._written = False

    def write(self, text: str) -> None:
        """Add to the text; it is on the disk then, whatever becomes of this process."""
        self._file.write(text)
        self._file.flush()
        self._written = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        written = Path(self._file.name)
        if kind is None and self._written:
            if self._path.exists():
                shutil.copymode(self._path, written)
            written.replace(self._path)
        elif written.stat().st_size:
            print(f"loquent: what was done so far is in {written}", file=sys.stderr)
        else:
            written.unlink()


def _beside(path: Path) -> TextIO:
    for number in count(1):
        with suppress(FileExistsError):
            return path.with_name(f"{path.name}.{number}.part").open("x", encoding="utf-8")
    raise AssertionError("unreachable")


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(_HEAD)


def _is_stdout(path: Path) -> bool:
    # Whatever the shell sent it to: a file opened once more would begin at its own first byte.
    with suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(1))
    return False
