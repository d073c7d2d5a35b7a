"""A command's options from flags, from ``LOQUENT_*`` variables and from a TOML file, in this order.

Every option of the command can be given in each of the three: ``--max-sessions 8``,
``LOQUENT_MAX_SESSIONS=8``, ``max-sessions = 8``. Whatever is given in a stronger place replaces
what a weaker one says, lists too.
"""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from loquent.engine.errors import ConfigError

PREFIX = "LOQUENT_"
# These say what to do now and make no sense in a file.
_FLAGS_ONLY = frozenset({"config", "check"})
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def resolve(
    parser: argparse.ArgumentParser, argv: Sequence[str], environ: Mapping[str, str]
) -> argparse.Namespace:
    """The options of `parser`, which has a ``--config`` and no positional arguments.

    Raises:
        ConfigError: a variable or the file says something that is not allowed.
        OSError: the file cannot be read.
        SystemExit: as argparse does it, for flags.
    """
    defaults = vars(parser.parse_args([]))
    flags = _given(parser, argv, defaults)
    variables: dict[str, Any] = {}
    for dest, default in defaults.items():
        name = PREFIX + dest.upper()
        if name in environ and dest != "check":
            tokens = _from_text(dest, default, environ[name], name)
            variables |= _given(_Source(parser, name), tokens, defaults)
    path = flags.get("config") or variables.get("config")
    file = _from_file(parser, Path(path), defaults) if path is not None else {}
    return argparse.Namespace(**(defaults | file | variables | flags))


class _Source(argparse.ArgumentParser):
    """The same options, with errors that say where they come from."""

    def __init__(self, parser: argparse.ArgumentParser, where: str) -> None:
        super().__init__(parents=[parser], add_help=False, allow_abbrev=False)
        self._where = where

    def error(self, message: str) -> NoReturn:
        """Instead of leaving the program."""
        raise ConfigError(f"{self._where}: {message}")


def _given(
    parser: argparse.ArgumentParser, tokens: Sequence[str], dests: Mapping[str, Any]
) -> dict[str, Any]:
    """What `tokens` say; argparse itself would not tell it from a default."""
    found = vars(parser.parse_args(tokens, argparse.Namespace(**dict.fromkeys(dests))))
    return {dest: value for dest, value in found.items() if value is not None}


def _from_text(dest: str, default: object, text: str, where: str) -> list[str]:
    flag = "--" + dest.replace("_", "-")
    if isinstance(default, bool):
        if text.lower() not in _YES + _NO:
            raise ConfigError(f"{where}: got {text!r}, expected true or false")
        return [flag] if text.lower() in _YES else []
    if isinstance(default, list):
        return [f"{flag}={item}" for item in text.replace(",", " ").split()]
    return [f"{flag}={text}"]


def _from_file(
    parser: argparse.ArgumentParser, path: Path, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: not TOML ({exc})") from exc
    names = {dest.replace("_", "-"): dest for dest in defaults if dest not in _FLAGS_ONLY}
    found: dict[str, Any] = {}
    for name, value in fields.items():
        dest = names.get(name.replace("_", "-"))
        if dest is None:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"{path}: there is no option {name!r}{hint} (`loquent serve --help` has them all)"
            )
        where = f"{path}, {name}"
        tokens = _from_toml("--" + dest.replace("_", "-"), value, where)
        found |= _given(_Source(parser, where), tokens, defaults)
    return found


def _from_toml(flag: str, value: object, where: str) -> list[str]:
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, list):
        return [token for item in value for token in _from_toml(flag, item, where)]
    if isinstance(value, str | int | float):
        return [f"{flag}={value}"]
    raise ConfigError(f"{where}: got a {type(value).__name__}, expected a string or a number")
