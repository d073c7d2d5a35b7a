"""Sessions on their way from a server that stops to the one that follows it.

One file for each session, in a folder that nobody else may read, named by a hash of the session's
token: whoever has only the folder cannot resume, and whoever has only the token cannot guess the
name of another's file. A file is claimed by renaming it, so of several servers that share the
folder one gets it. A server that is asked for a session which another one still has, because it
has not noticed that the connection is dead, says so by an empty file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loquent.engine.errors import ConfigError, SnapshotError
from loquent.engine.snapshot import MAX_BYTES

VERSION = 1
# Seconds for which a session waits on the disk.
MAX_AGE = 300.0
# Sessions on the disk at a time.
MAX_FILES = 4096
_WANTED = ".wanted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """A session without its connection.

    Attributes:
        session: its id.
        key: name of the API key that it was opened with.
        address: of the client.
        wire: the protocol's own state, plain JSON values.
        finalizes: how many calls of ``finalize`` the stream has.
        stream: a snapshot.
    """

    session: str
    key: str | None
    address: str
    wire: dict[str, Any]
    finalizes: int
    stream: bytes


class Folder:
    """The folder. Raises ConfigError if others may look into it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = path.stat()
        if os.name == "posix" and (
            stat.S_IMODE(about.st_mode) & 0o077 or about.st_uid != os.getuid()
        ):
            raise ConfigError(
                f"got {path}, which others may read or own; snapshots hold what people said: "
                f"chmod 700 {path}"
            )
        self._purge()

    def put(self, token: str, handed: Handed) -> None:
        """Write a session down. Raises OSError, SnapshotError."""
        if self._purge() >= MAX_FILES:
            raise SnapshotError(f"got {MAX_FILES} sessions in {self._path} already")
        head: dict[str, Any] = {"version": VERSION}
        for name in ("session", "key", "address", "wire", "finalizes"):
            head[name] = getattr(handed, name)
        final = self._name(token)
        part = final.with_suffix(".part")
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as out:
            out.write(json.dumps(head).encode() + b"\n" + handed.stream)
        part.rename(final)

    def take(self, token: str) -> Handed | None:
        """A session, which is gone from the folder then; None if it is not there.

        Raises:
            SnapshotError: it cannot be read.
        """
        name = self._name(token)
        mine = name.with_suffix(f".{os.getpid()}")
        try:
            name.rename(mine)
        except FileNotFoundError:
            return None
        try:
            about = mine.stat()
            if time.time() - about.st_mtime > MAX_AGE:
                return None
            if about.st_size > 2 * MAX_BYTES:
                raise SnapshotError(f"got a session of {about.st_size} bytes")
            head, _, stream = mine.read_bytes().partition(b"\n")
            try:
                fields = json.loads(head)
                if fields.pop("version") != VERSION:
                    raise SnapshotError("got a session that another release has written down")
                return Handed(**fields, stream=stream)
            except (ValueError, TypeError, KeyError, AttributeError) as exc:
                raise SnapshotError(f"got a damaged session ({exc})") from exc
        finally:
            mine.unlink(missing_ok=True)

    def want(self, token: str) -> None:
        """Ask whoever has the session for it. Raises OSError."""
        self._name(token).with_suffix(_WANTED).touch(0o600)

    def unwant(self, token: str) -> None:
        """It has come, or is not waited for any more. Raises OSError."""
        self._name(token).with_suffix(_WANTED).unlink(missing_ok=True)

    def wanted(self, tokens: Iterable[str]) -> list[str]:
        """Those of these sessions that others have asked for since the last call."""
        asked = {path.name for path in self._path.glob(f"*{_WANTED}")}
        found = []
        for token in tokens if asked else ():
            file = self._name(token).with_suffix(_WANTED)
            if file.name in asked:
                file.unlink(missing_ok=True)
                found.append(token)
        return found

    def _name(self, token: str) -> Path:
        return self._path / f"{hashlib.sha256(token.encode()).hexdigest()}.session"

    def _purge(self) -> int:
        """Remove what is too old; returns how many are left."""
        left, old = 0, time.time() - MAX_AGE
        for path in self._path.iterdir():
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < old:
                    path.unlink()
                else:
                    left += 1
        return left
