"""API keys: who may use the server. Held as hashes, compared in constant time, never logged."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Collection, Iterable
from pathlib import Path

from loquent.engine.errors import ConfigError

MIN_LENGTH = 16  # characters; `openssl rand -hex 24` gives 48
# A request may carry this many keys; the rest is not looked at.
MAX_CREDENTIALS = 4
HASHED = "sha256:"
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")


class Keys:
    """The keys of a server, each with a name for the log and the limits.

    Two keys may have one name: the old and the new one while clients change over. No keys at all
    means that everybody may come in.
    """

    def __init__(self, entries: Iterable[tuple[str, bytes]] = ()) -> None:
        self._entries = tuple(entries)  # name, SHA-256 of the key

    def __len__(self) -> int:
        return len(self._entries)

    def __add__(self, other: Keys) -> Keys:
        return Keys(self._entries + other._entries)

    @property
    def names(self) -> Collection[str]:
        """Every name once, in order."""
        return tuple(dict.fromkeys(name for name, _ in self._entries))

    def name_of(self, credentials: Iterable[str]) -> str | None:
        """Whose key is among the credentials; None if nobody's.

        Takes the same time whether and where a key matches: hashes are compared, every one of them.
        """
        found = None
        for _, credential in zip(range(MAX_CREDENTIALS), credentials, strict=False):
            digest = _digest(credential)
            for name, known in self._entries:
                if hmac.compare_digest(digest, known):
                    found = name
        return found

    @classmethod
    def parse(cls, text: str, where: str) -> Keys:
        """Lines of ``NAME KEY`` or ``NAME sha256:HEX``; empty lines and ``#`` comments are skipped.

        Raises ConfigError, which names the line and never shows the key.
        """
        entries = []
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            here = f"{where}, line {number}"
            if len(words) != 2:
                raise ConfigError(f"{here}: got {len(words)} words, expected a name and a key")
            name, key = words
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"{here}: the name may have letters, digits and . _ @ - only, 64 of them"
                )
            if key.startswith(HASHED):
                digest = key.removeprefix(HASHED)
                if not re.fullmatch("[0-9a-fA-F]{64}", digest):
                    raise ConfigError(f"{here}: expected 64 hexadecimal digits after {HASHED}")
                entries.append((name, bytes.fromhex(digest)))
            elif len(key) < MIN_LENGTH:
                raise ConfigError(
                    f"{here}: got a key of {len(key)} characters, expected at least {MIN_LENGTH}; "
                    "make one with `openssl rand -hex 24`"
                )
            else:
                entries.append((name, _digest(key)))
        return cls(entries)

    @classmethod
    def load(cls, path: Path) -> Keys:
        """From a file that only its owner may change and strangers may not read.

        Raises ConfigError, OSError.
        """
        check_private(path)
        try:
            keys = cls.parse(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as exc:
            raise ConfigError(f"{path}: not UTF-8 text ({exc.reason})") from exc
        if not keys:
            raise ConfigError(f"{path}: no key in it; expected lines of a name and a key")
        return keys

    @classmethod
    def from_environment(cls, value: str) -> Keys:
        """From a variable: ``NAME:KEY`` pairs, separated by commas or white space."""
        pairs = [pair.partition(":") for pair in value.replace(",", " ").split()]
        lines = "\n".join(f"{name} {key}" for name, _, key in pairs)
        return cls.parse(lines, "LOQUENT_API_KEYS")


def same_key(given: str, expected: str) -> bool:
    """Whether two keys are one; takes the same time either way."""
    return hmac.compare_digest(_digest(given), _digest(expected))


def check_private(path: Path) -> None:
    """Raises ConfigError where strangers may read a file or its group may write to it."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & 0o037:
        raise ConfigError(
            f"{path}: others may read or change this file (mode {mode:04o}), expected 0600 or "
            f"0640; run `chmod 600 {path}`"
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
