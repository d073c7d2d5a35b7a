"""What an evaluation found, clip by clip, and how it is written down: tables, JSON, JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from loquent.models.data import Utterance
from loquent.models.entities import Tally, names_heard, number_errors
from loquent.models.scoring import Interval, Score, bootstrap

CLEAN = "clean"


@dataclass(frozen=True)
class Line:
    """One clip: what it says, what was heard, and the counts."""

    utterance: Utterance
    heard: str
    score: Score

    @classmethod
    def of(cls, utterance: Utterance, heard: str) -> Line:
        """Score one transcript."""
        return cls(utterance, heard, Score.of(utterance.text, heard))


@dataclass(frozen=True, kw_only=True)
class Result:
    """One recogniser with one setting on a set of clips.

    Attributes:
        bundle: name of the bundle, or of the peer.
        precision, decoder, chunk_ms: of the bundle's; of a peer ``""``, ``""`` and 0 (it hears a
            clip as a whole).
        noise: ``clean``, or the distance of the noise, for example ``10 dB``, or ``20 dB quieter``,
            or ``telephone``.
        lines: the clips.
        cpu_seconds: processor time that they took, features included, reading files excluded.
        audio_seconds: their length.
        steps_ms: processor milliseconds of one step by how many streams it takes; empty unless
            measured.
        delays: seconds from the end of each word that was heard right to its caption: as it stood
            there for good, and as it was committed. Empty unless measured.
    """

    bundle: str
    precision: str = ""
    decoder: str = ""
    chunk_ms: float = 0.0
    noise: str = CLEAN
    lines: tuple[Line, ...]
    cpu_seconds: float = 0.0
    audio_seconds: float = 0.0
    steps_ms: Mapping[int, float] = field(default_factory=dict)
    delays: tuple[tuple[float, float], ...] = ()
    numbers: Tally = field(init=False)
    names: Tally = field(init=False)

    def __post_init__(self) -> None:
        raw = [str(line.utterance.row.get("text") or line.utterance.text) for line in self.lines]
        heard = [line.heard for line in self.lines]
        numbers = map(number_errors, raw, heard)
        object.__setattr__(self, "numbers", sum(numbers, Tally()))
        object.__setattr__(self, "names", sum(map(names_heard, raw, heard), Tally()))

    @cached_property
    def total(self) -> Score:
        """All clips together."""
        return sum((line.score for line in self.lines), Score())

    @cached_property
    def scores(self) -> dict[str, Score]:
        """By source."""
        return {name: sum(found, Score()) for name, found in self.by("source").items()}

    def by(self, name: str) -> dict[str, list[Score]]:
        """Scores of the clips by any field of the manifest; ``-`` stands for a row without it."""
        groups: dict[str, list[Score]] = {}
        for line in self.lines:
            value = line.utterance.source if name == "source" else line.utterance.row.get(name)
            groups.setdefault("-" if value is None else str(value), []).append(line.score)
        return dict(sorted(groups.items()))

    @property
    def intervals(self) -> tuple[Interval, Interval]:
        """95 % intervals of WER and CER over the clips."""
        return bootstrap([line.score for line in self.lines])

    @property
    def cpu(self) -> float:
        """Processor seconds for a second of audio, NaN if not measured."""
        return self.cpu_seconds / self.audio_seconds if self.audio_seconds else float("nan")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    first, second, *rest = ("| " + " | ".join(cells) + " |" for cells in lines)
    return "\n".join([first, second.replace(" ", ""), *rest])


def _setting(r: Result, noisy: bool) -> list[str]:
    chunk = f"{r.chunk_ms:g}" if r.chunk_ms else "whole"
    cells = [r.bundle, r.precision or "-", r.decoder or "-", chunk]
    return [*cells, r.noise] if noisy else cells


def _table(
    results: Sequence[Result], columns: Sequence[str], cells: Callable[[Result], Sequence[str]]
) -> str:
    noisy = any(r.noise != CLEAN for r in results)
    head = ["system", "precision", "decoder", "chunk ms", *(["noise"] if noisy else []), *columns]
    return _markdown(head, [[*_setting(r, noisy), *cells(r)] for r in results])


def _rates(scores: Sequence[Score]) -> str:
    total = sum(scores, Score())
    wer, _ = bootstrap(scores)
    return f"{100 * total.wer:.1f} ± {100 * wer.half:.1f} / {100 * total.cer:.1f}"


def table(results: Sequence[Result], by: str = "source") -> str:
    """Markdown: a row per setting; WER ± half of its 95 % interval / CER in percent by a field."""
    groups = [r.by(by) for r in results]
    names = sorted({name for group in groups for name in group})

    def cells(r: Result) -> list[str]:
        group = r.by(by)
        every = [s for scores in group.values() for s in scores]
        return [*(_rates(group[n]) if n in group else "-" for n in names), _rates(every)]

    return _table(results, [*names, "all"], cells)


def entity_table(results: Sequence[Result]) -> str:
    """Markdown: errors on number words, names that came through; empty where there are none."""
    if not any(r.numbers.total or r.names.total for r in results):
        return ""

    def cells(r: Result) -> list[str]:
        return [
            f"{100 * r.numbers.rate:.1f} of {r.numbers.total}" if r.numbers.total else "-",
            f"{100 * r.names.rate:.1f} of {r.names.total}" if r.names.total else "-",
        ]

    return _table(results, ["WER of number words %", "names heard %"], cells)


def cost_table(results: Sequence[Result]) -> str:
    """Markdown: processor seconds for a second of audio."""
    return _table(results, ["CPU s / audio s"], lambda r: [f"{r.cpu:.4f}"])


def speed_table(results: Sequence[Result]) -> str:
    """Markdown: processor milliseconds a chunk, beside greedy RNN-T; empty if not measured."""
    measured = [r for r in results if r.steps_ms and r.noise == CLEAN]
    if not measured:
        return ""
    batches = sorted({batch for r in measured for batch in r.steps_ms})
    greedy = {
        (r.bundle, r.precision, r.chunk_ms): r.steps_ms for r in measured if r.decoder == "rnnt"
    }

    def cells(r: Result) -> list[str]:
        found = []
        for batch in batches:
            ms = r.steps_ms[batch]
            base = greedy.get((r.bundle, r.precision, r.chunk_ms))
            found.append(f"{ms:.2f}" + (f" ({ms / base[batch]:.2f}x)" if base else ""))
        most = batches[-1]
        return [*found, f"{most * r.chunk_ms / r.steps_ms[most]:.0f}"]

    heads = [f"ms a chunk, {batch} stream{'s' * (batch > 1)}" for batch in batches]
    return _table(measured, [*heads, f"streams a core, {batches[-1]} together"], cells)


def delay_table(results: Sequence[Result]) -> str:
    """Markdown: milliseconds from the end of a word to its caption; empty if not measured."""
    measured = [r for r in results if r.delays]
    if not measured:
        return ""

    def cells(r: Result) -> list[str]:
        found = []
        for values in np.array(r.delays).T * 1000:
            median, p90 = np.percentile(values, (50, 90))
            found.append(f"{values.mean():.0f} / {median:.0f} / {p90:.0f}")
        return [str(len(r.delays)), *found]

    return _table(measured, ["words", "shown ms (mean / median / p90)", "committed ms"], cells)


def _score(scores: Sequence[Score]) -> dict[str, Any]:
    total = sum(scores, Score())
    wer, cer = bootstrap(scores)
    return {
        "wer": round(total.wer, 5),
        "wer_95": [round(wer.low, 5), round(wer.high, 5)],
        "cer": round(total.cer, 5),
        "cer_95": [round(cer.low, 5), round(cer.high, 5)],
        "words": total.words,
        "clips": total.utterances,
    }


def as_dicts(results: Sequence[Result], by: Sequence[str] = ("source",)) -> list[dict[str, Any]]:
    """Every number of the tables, ready for JSON."""
    rows = []
    for r in results:
        row: dict[str, Any] = {
            "system": r.bundle,
            "precision": r.precision,
            "decoder": r.decoder,
            "chunk_ms": r.chunk_ms,
            "noise": r.noise,
            **_score([line.score for line in r.lines]),
            "by": {n: {g: _score(s) for g, s in r.by(n).items()} for n in by},
            "numbers": {"errors": r.numbers.count, "words": r.numbers.total},
            "names": {"heard": r.names.count, "words": r.names.total},
            "cpu_per_second": round(r.cpu, 5) if r.audio_seconds else None,
        }
        if r.steps_ms:
            row["step_ms"] = {str(n): round(ms, 3) for n, ms in r.steps_ms.items()}
        if r.delays:
            shown, committed = np.array(r.delays).T
            row["delay_ms"] = {
                "words": len(r.delays),
                "shown": round(1000 * float(shown.mean()), 1),
                "committed": round(1000 * float(committed.mean()), 1),
            }
        rows.append(row)
    return rows


def write_lines(results: Sequence[Result], path: Path) -> None:
    """One JSON object a line for each clip and setting: what it says and what was heard."""
    with path.open("w", encoding="utf-8") as out:
        for r in results:
            setting: Mapping[str, Any] = {
                "system": r.bundle,
                "precision": r.precision,
                "decoder": r.decoder,
                "chunk_ms": r.chunk_ms,
                "noise": r.noise,
            }
            for line in r.lines:
                row = {
                    "id": line.utterance.row.get("id", line.utterance.audio.name),
                    **setting,
                    "source": line.utterance.source,
                    "text": line.utterance.text,
                    "heard": line.heard,
                    "errors": line.score.word_errors,
                    "words": line.score.words,
                }
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
