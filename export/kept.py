"""Results of an evaluation that is not finished, on disk: a killed one goes on where it was.

What a system heard depends on the system and the clips, so the key of a result is made of both: a
changed model, manifest or setting is evaluated anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loquent.engine.bundle import Bundle
from loquent.export.results import Line, Result
from loquent.models.data import DataError, Utterance


class Kept:
    """A folder of results.

    Args:
        folder: is made; None keeps nothing.

    Raises:
        DataError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"--resume {folder}: cannot be made ({error})") from error

    def result(
        self,
        key: Mapping[str, object],
        utterances: Sequence[Utterance],
        measure: Callable[[], Result],
    ) -> Result:
        """The kept result, or ``measure``'s, which is kept then.

        Args:
            key: of the system and its settings, ready for JSON.
            utterances: the clips.
            measure: evaluates.
        """
        if self._folder is None:
            return measure()
        clips = [(str(u.audio), u.duration, u.text) for u in utterances]
        text = json.dumps([dict(key), clips], sort_keys=True)
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        if (found := _read(path, utterances)) is not None:
            return found
        result = measure()
        fields = {
            f.name: getattr(result, f.name)
            for f in dataclasses.fields(result)
            if f.init and f.name not in ("lines", "steps_ms")
        }
        partial = path.with_suffix(".part")
        heard = [line.heard for line in result.lines]
        partial.write_text(json.dumps({**fields, "heard": heard}, ensure_ascii=False), "utf-8")
        partial.replace(path)
        return result


def _read(path: Path, utterances: Sequence[Utterance]) -> Result | None:
    try:
        data: dict[str, Any] = json.loads(path.read_text("utf-8"))
        heard = data.pop("heard")
        delays = tuple((float(a), float(b)) for a, b in data.pop("delays"))
        lines = tuple(map(Line.of, utterances, heard))
        return Result(**data, delays=delays, lines=lines) if len(heard) == len(lines) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing or damaged: measured anew


def identity(bundle: Bundle) -> str:
    """What makes a bundle hear what it hears: its manifest with all hashes, without its scores."""
    plain = {name: value for name, value in bundle.manifest.items() if name != "scores"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
