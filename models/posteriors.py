"""The teacher's outputs on disk: compact, mapped into memory, resumable after a kill.

A folder: ``tokens.spm``, ``teacher.json`` (what made it), ``index.jsonl`` (a line for each
utterance, in the order of computing), ``logs.bin`` and, if asked for, ``features.bin``. Of each
frame the ``kept`` most likely tokens are stored as uint16 with float16 log-probabilities: with 8 of
them and 25 frames a second 3 MB an hour, where all of 256 would be 92.

A line of the index is written once the data in front of it are on disk, so whatever a kill cuts
short lies behind the last line and is cut off on the next start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loquent.models.checkpoint import CheckpointError, read_json
from loquent.models.data import Utterance
from loquent.models.distillation import Said
from loquent.models.tokens import Tokenizer


def key_of(utterance: Utterance) -> str:
    """What an utterance goes by in the cache."""
    return str(utterance.audio.resolve())


def _frame(kept: int) -> np.dtype[Any]:
    return np.dtype([("blank", "<f2"), ("ids", "<u2", (kept,)), ("logs", "<f2", (kept,))])


class PosteriorWriter:
    """Appends to a cache; use as a context manager.

    Args:
        folder: made if needed; a cache of the same teacher is continued.
        tokenizer: of the teacher's vocabulary.
        about: what made it; a cache of another teacher is refused.
        kept: tokens per frame; 0 if the teacher's head has learnt nothing.
        width: of the encoder's output, 0: not kept.

    Raises:
        CheckpointError: the folder holds the outputs of another teacher.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, about: dict[str, Any], kept: int, width: int
    ) -> None:
        self._kept, self._width = min(kept, tokenizer.size), width
        folder.mkdir(parents=True, exist_ok=True)
        settings = {**about, "kept": self._kept, "width": width}
        settings = json.loads(json.dumps(settings))
        if (folder / "teacher.json").exists():
            found = read_json(folder / "teacher.json")
            same = (folder / "tokens.spm").read_bytes() == tokenizer.model
            if found != settings or not same:
                raise CheckpointError(
                    f"{folder}: holds the outputs of another teacher or of other settings "
                    f"({found}), expected {settings}; choose another folder"
                )
        else:
            (folder / "tokens.spm").write_bytes(tokenizer.model)
            (folder / "teacher.json").write_text(json.dumps(settings, indent=1))
        entries = _entries(folder)
        self.done = {entry["audio"]: entry for entry in entries}
        self.frames = sum(entry["frames"] for entry in entries)
        self._files = ExitStack()
        sizes = {"logs.bin": _frame(self._kept).itemsize, "features.bin": 2 * width}
        self._data = {}
        for name, size in sizes.items():
            if size:
                self._data[name] = self._files.enter_context((folder / name).open("ab"))
                self._data[name].truncate(self.frames * size)
        index = folder / "index.jsonl"
        whole = "".join(json.dumps(entry) + "\n" for entry in entries)
        if not index.exists() or index.read_text() != whole:
            index.write_text(whole)
        self._index = self._files.enter_context(index.open("a"))

    def __enter__(self) -> PosteriorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(
        self,
        utterances: Sequence[Utterance],
        log_probs: Sequence[NDArray[np.float32]],
        features: Sequence[NDArray[np.float32]] | None,
        more: Sequence[dict[str, Any]],
    ) -> None:
        """Append a batch.

        Args:
            utterances: B of them.
            log_probs: (N, V) of each, blank 0.
            features: (N, E) of each, if ``width`` is not 0.
            more: JSON fields of each for the index.
        """
        lines = []
        for i, (utterance, logs_NV) in enumerate(zip(utterances, log_probs, strict=True)):
            best = np.argpartition(-logs_NV, max(0, self._kept - 1), axis=1)[:, : self._kept]
            order = np.take_along_axis(logs_NV, best, 1).argsort(1)[:, ::-1]
            best = np.take_along_axis(best, order, 1)
            record = np.zeros(len(logs_NV), _frame(self._kept))
            record["blank"] = np.maximum(logs_NV[:, 0], -60000)
            record["ids"] = best
            record["logs"] = np.maximum(np.take_along_axis(logs_NV, best, 1), -60000)
            self._data["logs.bin"].write(record.tobytes())
            if features is not None:
                self._data["features.bin"].write(features[i].astype(np.float16).tobytes())
            entry = {
                "audio": key_of(utterance),
                "start": self.frames,
                "frames": len(logs_NV),
                **more[i],
            }
            self.frames += len(logs_NV)
            self.done[entry["audio"]] = entry
            lines.append(json.dumps(entry) + "\n")
        for file in self._data.values():
            file.flush()
            os.fsync(file.fileno())
        self._index.write("".join(lines))
        self._index.flush()


def _entries(folder: Path) -> list[dict[str, Any]]:
    """Lines of the index up to the first that a kill has cut short."""
    index = folder / "index.jsonl"
    entries: list[dict[str, Any]] = []
    for line in index.read_text().splitlines(keepends=True) if index.exists() else []:
        if not line.endswith("\n"):
            break
        entries.append(json.loads(line))
    return entries


class Posteriors:
    """Reads a cache.

    Attributes:
        tokenizer: of the vocabulary.
        about: what made it.
        kept: tokens per frame; 0: there are no posteriors, only the encoder's output.
        width: of the encoder's output, 0: not kept.

    Raises:
        CheckpointError: no cache there.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "teacher.json").is_file():
            raise CheckpointError(
                f"{folder}: no teacher.json; expected a folder as `loquent distill` writes"
            )
        self.about = read_json(folder / "teacher.json")
        self.tokenizer = Tokenizer.load(folder / "tokens.spm")
        self.kept, self.width = int(self.about["kept"]), int(self.about["width"])
        entries = _entries(folder)
        self._entries = {entry["audio"]: entry for entry in entries}
        if not self._entries:
            raise CheckpointError(f"{folder}: holds no utterance yet; run `loquent distill` again")
        # Behind that a kill may have left the start of another utterance.
        count = sum(entry["frames"] for entry in entries)
        self._logs = np.memmap(folder / "logs.bin", _frame(self.kept), "r", shape=(count,))
        self._features: NDArray[np.float16] | None = None
        if self.width:
            self._features = np.memmap(
                folder / "features.bin", np.float16, "r", shape=(count, self.width)
            )

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, utterance: Utterance) -> Said | None:
        """What the teacher said about an utterance, if it was asked."""
        entry = self._entries.get(key_of(utterance))
        if entry is None:
            return None
        part = slice(entry["start"], entry["start"] + entry["frames"])
        frames = self._logs[part]
        logs = frames["logs"].astype(np.float32)
        # What was not kept is shared out, so that the divergence is one of distributions.
        if self.kept:
            logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        text = entry.get("text_log")
        return Said(
            ids_NK=frames["ids"],
            logs_NK=logs,
            blank_N=frames["blank"],
            text=float("nan") if text is None else float(text),
            features_NE=None if self._features is None else self._features[part],
        )
