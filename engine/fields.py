"""Reading ``manifest.json`` with the type of every field checked."""

from __future__ import annotations

from typing import Any, cast

from loquent.engine.errors import BundleError

MANIFEST = "manifest.json"


class Fields:
    """A JSON object; every method raises BundleError for a field that is not as expected."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise BundleError(f"{MANIFEST}: {where or 'the file'} is no object")
        self._value = value
        self._where = where

    def _path(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def _get(self, key: str, kinds: tuple[type, ...], expected: str) -> Any:
        if key not in self._value:
            raise BundleError(f"{MANIFEST}: {self._path(key)} is missing, expected {expected}")
        value = self._value[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise BundleError(f"{MANIFEST}: got {self._path(key)} = {value!r}, expected {expected}")
        return value

    def integer(self, key: str, low: int) -> int:
        """A whole number of at least ``low``."""
        value: int = self._get(key, (int,), "a whole number")
        if value < low:
            raise BundleError(
                f"{MANIFEST}: got {self._path(key)} = {value}, expected {low} or more"
            )
        return value

    def number(self, key: str, default: float) -> float:
        """A number; ``default`` if the field is missing."""
        return (
            cast(float, self._get(key, (int, float), "a number")) if key in self._value else default
        )

    def string(self, key: str) -> str:
        """A string."""
        return cast(str, self._get(key, (str,), "a string"))

    def boolean(self, key: str) -> bool:
        """True or false."""
        return cast(bool, self._get(key, (bool,), "true or false"))

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """One of these strings."""
        value = self.string(key)
        if value not in choices:
            names = ", ".join(choices)
            raise BundleError(
                f"{MANIFEST}: got {self._path(key)} = {value!r}, expected one of {names}"
            )
        return value

    def integers(self, key: str, low: int) -> tuple[int, ...]:
        """A list of whole numbers of at least ``low``."""
        expected = f"a list of whole numbers from {low} up"
        values = self._get(key, (list,), expected)
        if any(not isinstance(v, int) or isinstance(v, bool) or v < low for v in values):
            raise BundleError(f"{MANIFEST}: got {self._path(key)} = {values}, expected {expected}")
        return tuple(values)

    def has(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self._value.get(key) is not None

    def object(self, key: str) -> Fields:
        """An object, to be read in turn."""
        return Fields(self._get(key, (dict,), "an object"), self._path(key))

    def objects(self, key: str) -> list[Fields]:
        """A list of objects."""
        values = self._get(key, (list,), "a list of objects")
        return [Fields(value, f"{self._path(key)}[{i}]") for i, value in enumerate(values)]

    def file(self, key: str) -> str:
        """The plain name of a file in the bundle; paths are refused."""
        name = self.string(key)
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise BundleError(
                f"{MANIFEST}: got {self._path(key)} = {name!r}, expected the plain name of a file "
                "in the bundle"
            )
        return name

    def strings(self, key: str) -> dict[str, str]:
        """An object whose values are strings."""
        values = self._get(key, (dict,), "an object of strings")
        if any(not isinstance(value, str) for value in values.values()):
            raise BundleError(f"{MANIFEST}: {self._path(key)} has values that are no strings")
        return dict(values)

    def plain(self, key: str) -> dict[str, Any]:
        """An object as it stands."""
        return dict(self._get(key, (dict,), "an object"))
