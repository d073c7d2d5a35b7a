"""Command lines of small training runs, and what they log."""

from __future__ import annotations

import csv
from pathlib import Path


def options(**values: object) -> list[str]:
    words: list[str] = []
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            words += ["--" + name.replace("_", "-"), *([] if one is True else [str(one)])]
    return words


def loop(corpus: Path, run: Path, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "data": corpus,
        "dev": corpus,
        "run": run,
        "steps": 3,
        "batch_seconds": 8,
        "eval_every": 3,
        "save_every": 1,
        "threads": 1,
    }
    return options(**{**settings, **changes})


def columns(run: Path) -> dict[str, str]:
    with (run / "log.csv").open() as file:
        return list(csv.DictReader(file))[-1]
