"""``loquent data check``: what is wrong with a training set, before hours are spent on it."""

from __future__ import annotations

import itertools
import json
import textwrap
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from loquent.engine.audio import AudioFile
from loquent.engine.errors import AudioError
from loquent.models.data import DataError
from loquent.models.text import normalise

Level = Literal["error", "warning", "note"]
SHORTEST, LONGEST = 0.2, 30.0  # seconds; training leaves out what is longer
_EXAMPLES, _WIDTH = 5, 160
# Half of the audio within this many characters a second of the other half is usual; what lies
# beyond so many deviations (median absolute, scaled) is no reading speed but a wrong text or cut.
_DEVIATIONS = 6.0
# Slower and faster than any language is read aloud (3 to 25 characters a second).
_RATE = (1.0, 35.0)
_QUIET_DB, _CLIPPED = -50.0, 0.001  # of full scale; part of samples at full scale


@dataclass(frozen=True)
class Finding:
    """Something to know.

    Attributes:
        level: an ``error`` fails the check, a ``warning`` is to be looked at.
        title: what, in one line, with numbers.
        remedy: what to do.
        examples: rows or characters that show it.
    """

    level: Level
    title: str
    remedy: str = ""
    examples: tuple[str, ...] = ()


@dataclass
class Report:
    """What was found, and figures by split and language."""

    findings: list[Finding] = field(default_factory=list)
    hours: dict[str, dict[str, float]] = field(default_factory=dict)  # split -> language -> hours
    clips: dict[str, int] = field(default_factory=dict)
    speakers: dict[str, int] = field(default_factory=dict)
    letters: dict[str, Counter[str]] = field(default_factory=dict)  # split -> character -> count

    @property
    def passed(self) -> bool:
        """Whether nothing is an error."""
        return all(f.level != "error" for f in self.findings)

    def add(
        self, level: Level, title: str, remedy: str = "", examples: Iterable[object] = ()
    ) -> None:
        """Note something down."""
        cut = (textwrap.shorten(str(e), _WIDTH) for e in examples)
        shown = tuple(itertools.islice(cut, _EXAMPLES))
        self.findings.append(Finding(level, title, remedy, shown))


@dataclass(frozen=True)
class Row:
    """A row of a manifest, as far as it could be read."""

    split: str
    number: int
    audio: Path
    raw: str
    text: str
    duration: float
    language: str
    speaker: str
    source: str

    @property
    def usable(self) -> bool:
        """Whether training takes it."""
        return bool(self.text) and not self.digits and self.duration <= LONGEST

    @property
    def digits(self) -> bool:
        """Whether there are digits, so that how they were read is unknown."""
        return any(c.isdigit() for c in self.text)

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.split}:{self.number} {self.audio.name}"


def check(
    train: Sequence[Path],
    dev: Sequence[Path],
    *,
    vocabulary: Iterable[str] | None = None,
    hours: Mapping[str, float] | None = None,
    audio: bool = True,
    workers: int = 2,
) -> Report:
    """Look at all of it.

    Args:
        train, dev: JSONL manifests.
        vocabulary: pieces of the model's head, if there is one already.
        hours: least hours of training per language.
        audio: also open the recordings: length, level, clipping.
        workers: processes that do so.

    Raises:
        DataError: a manifest cannot be read at all.
    """
    report = Report()
    splits = {"train": train, "dev": dev}
    rows: dict[str, list[Row]] = {}
    for split, paths in splits.items():
        rows[split] = [row for path in paths for row in _read(path, split, report)]
        usable = [r for r in rows[split] if r.usable]
        report.clips[split] = len(usable)
        report.speakers[split] = len({r.speaker for r in usable if r.speaker})
        by_language: dict[str, float] = defaultdict(float)
        for r in usable:
            by_language[r.language] += r.duration / 3600
        report.hours[split] = dict(sorted(by_language.items()))
        report.letters[split] = Counter(itertools.chain.from_iterable(r.text for r in usable))
        report.letters[split].pop(" ", None)
        if not usable:
            report.add("error", f"{split}: no usable row", "give a manifest with text")
    _alphabet(rows, report, vocabulary)
    _lengths(rows, report)
    _rates([*rows["train"], *rows["dev"]], report)
    _overlap(rows, report)
    _expected_hours(report, hours or {})
    if audio:
        _sound([*rows["train"], *rows["dev"]], report, workers)
    order = {"error": 0, "warning": 1, "note": 2}
    report.findings.sort(key=lambda f: order[f.level])
    return report


def _read(path: Path, split: str, report: Report) -> list[Row]:
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a JSONL file ({error})") from error
    rows: list[Row] = []
    broken: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data: dict[str, Any] = json.loads(line)
            raw = str(data["text"] or "")
            rows.append(
                Row(
                    split=split,
                    number=number,
                    audio=path.parent / data["audio"],
                    raw=raw,
                    text=normalise(raw),
                    duration=float(data["duration"]),
                    language=str(data.get("lang") or "-"),
                    speaker=str(data.get("speaker") or ""),
                    source=str(data.get("source") or path.stem),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            broken.append(f"{path.name}:{number}: {type(error).__name__} {error}")
    if broken:
        report.add(
            "error",
            f"{path.name}: {len(broken)} rows are no JSON objects with audio, text and duration",
            "write them anew; `loquent data prepare` makes such manifests",
            broken,
        )
    return rows


def _name(character: str) -> str:
    code = f"U+{ord(character):04X}"
    return f"{character} ({code} {unicodedata.name(character, 'no name')})"


def remedy(character: str, known: Iterable[str]) -> str:
    """What to write instead of a character that the training text does not have, if anything.

    Its compatibility form, or the letter without its marks, whichever is known.
    """
    known = set(known)
    for form in ("NFKC", "NFD", "NFKD"):
        plain = unicodedata.normalize(form, character)
        bare = "".join(c for c in plain if not unicodedata.combining(c)).lower()
        if bare and bare != character and set(bare) <= known:
            return f"write {bare!r} for {character!r}"
    return f"add text with {character!r} to train, or leave it out of dev"


def _alphabet(
    rows: Mapping[str, Sequence[Row]], report: Report, vocabulary: Iterable[str] | None
) -> None:
    known = set(report.letters["train"])
    unseen = Counter({c: n for c, n in report.letters["dev"].items() if c not in known})
    if unseen and known:
        total = sum(report.letters["dev"].values())
        report.add(
            "error",
            f"dev has {len(unseen)} characters that train has not: {sum(unseen.values())} of "
            f"{total} ({100 * sum(unseen.values()) / total:.2f} %)",
            "; ".join(remedy(c, known) for c, _ in unseen.most_common(_EXAMPLES)),
            (f"{_name(c)}: {n} times" for c, n in unseen.most_common()),
        )
    rare = [c for c, n in report.letters["train"].items() if n < 5]
    if rare:
        report.add(
            "warning",
            f"{len(rare)} characters stand fewer than 5 times in train, too few to learn",
            "; ".join(remedy(c, known - set(rare)) for c in sorted(rare)[:_EXAMPLES]),
            (f"{_name(c)}: {report.letters['train'][c]} times" for c in sorted(rare)),
        )
    if vocabulary is not None:
        head = set(itertools.chain.from_iterable(vocabulary))
        missing = Counter(
            {c: n for split in rows for c, n in report.letters[split].items() if c not in head}
        )
        if missing:
            report.add(
                "error",
                f"the model's vocabulary lacks {len(missing)} characters of the data",
                "; ".join(remedy(c, head) for c, _ in missing.most_common(_EXAMPLES)),
                (f"{_name(c)}: {n} times" for c, n in missing.most_common()),
            )
    for split, every in rows.items():
        decomposed = [r for r in every if unicodedata.normalize("NFC", r.raw) != r.raw]
        if decomposed:
            report.add(
                "note",
                f"{split}: {len(decomposed)} texts are not in NFC; training composes them",
                examples=(r.place for r in decomposed),
            )
        digits = [r for r in every if r.digits]
        if digits:
            report.add(
                "warning",
                f"{split}: {len(digits)} texts have digits; they are left out, as how they were "
                "read is unknown",
                "write numbers in words as they were said",
                (f"{r.place}: {r.raw}" for r in digits),
            )


def _lengths(rows: Mapping[str, Sequence[Row]], report: Report) -> None:
    for split, every in rows.items():
        groups = {
            "have no text": [r for r in every if not r.text],
            f"are shorter than {SHORTEST:g} s": [r for r in every if r.duration < SHORTEST],
            f"are longer than {LONGEST:g} s; they are left out": [
                r for r in every if r.duration > LONGEST
            ],
        }
        for what, found in groups.items():
            if found:
                # One in a hundred is an accident, one in ten a broken export.
                level: Level = "error" if len(found) > 0.1 * len(every) else "warning"
                report.add(
                    level,
                    f"{split}: {len(found)} of {len(every)} clips {what}",
                    "cut, label or remove them",
                    (f"{r.place}: {r.duration:.2f} s, {r.raw!r}" for r in found),
                )


def _rates(rows: Sequence[Row], report: Report) -> None:
    """Characters a second, by source: each is read at a speed of its own."""
    for source in sorted({r.source for r in rows}):
        own = [r for r in rows if r.source == source and r.text and r.duration > 0]
        if len(own) < 20:
            continue
        rates = np.array([len(r.text) / r.duration for r in own])
        log = np.log(rates)
        middle = np.median(log)
        spread = max(1.4826 * float(np.median(np.abs(log - middle))), 0.1)
        off = (np.abs(log - middle) > _DEVIATIONS * spread) | (rates > _RATE[1])
        off |= rates < _RATE[0]
        if off.any():
            worst = sorted(np.flatnonzero(off), key=lambda i: -abs(log[i] - middle))
            report.add(
                "warning",
                f"{source}: {int(off.sum())} of {len(own)} clips have an odd number of characters "
                f"a second (median {np.exp(middle):.1f})",
                "listen: the text may be of another recording, or the recording cut",
                (f"{own[i].place}: {rates[i]:.1f}/s, {own[i].raw!r}" for i in worst),
            )


def _overlap(rows: Mapping[str, Sequence[Row]], report: Report) -> None:
    audio = {r.audio.resolve() for r in rows["train"]}
    same = [r for r in rows["dev"] if r.audio.resolve() in audio]
    if same:
        report.add(
            "error",
            f"{len(same)} recordings of dev are in train too",
            "remove them from train",
            (r.place for r in same),
        )
    texts = Counter(r.text for r in rows["train"])
    # A word or two may well be said by different people; a sentence gives the answer away.
    both = [r for r in rows["dev"] if len(r.text.split()) > 3 and texts[r.text]]
    if both:
        part = len(both) / max(1, len(rows["dev"]))
        report.add(
            "error" if part > 0.1 else "warning",
            f"{len(both)} of {len(rows['dev'])} texts of dev (over three words) stand in train too",
            "fine where speakers differ, if the sentences are prompts; else move them to one side",
            (f"{r.place}: {r.raw!r}, {texts[r.text]} times" for r in both),
        )
    trained = {(r.source, r.speaker) for r in rows["train"] if r.speaker}
    known = [r for r in rows["dev"] if (r.source, r.speaker) in trained]
    if known:
        speakers = sorted({f"{r.speaker} ({r.source})" for r in known})
        report.add(
            "warning",
            f"{len(known)} of {len(rows['dev'])} clips of dev are by {len(speakers)} speakers of "
            "train: what dev says holds for them, not for strangers",
            "hold speakers out, or say so where you report the result",
            speakers,
        )
    unnamed = sum(not r.speaker for split in rows.values() for r in split)
    if unnamed:
        report.add("note", f"{unnamed} rows name no speaker: whether they leak cannot be checked")


def _expected_hours(report: Report, expected: Mapping[str, float]) -> None:
    for language, least in expected.items():
        found = report.hours["train"].get(language, 0.0)
        if found < least:
            report.add(
                "error",
                f"{language}: {found:.2f} h to train on, expected {least:g}",
                "add recordings, or expect less of --hours",
            )
    for language, found in report.hours["dev"].items():
        if language not in report.hours["train"]:
            report.add("error", f"dev has {found:.2f} h of {language}, which train has none of")


@dataclass(frozen=True)
class Sound:
    """Of one recording: seconds, level in dB of full scale, part of samples at full scale."""

    seconds: float
    level: float
    clipped: float
    rate: int
    error: str = ""


def measure(path: Path) -> Sound:
    """Decode a recording and look at it."""
    try:
        file = AudioFile(path)
        total, squares, clipped = 0, 0.0, 0
        for block in file.blocks(seconds=30.0):
            total += len(block)
            squares += float(np.square(block, dtype=np.float64).sum())
            clipped += int((np.abs(block) >= 0.999).sum())
    except AudioError as error:
        return Sound(0.0, -np.inf, 0.0, 0, str(error))
    level = 10 * np.log10(squares / total) if squares else -np.inf
    return Sound(total / file.sample_rate, float(level), clipped / total, file.sample_rate)


def _sound(rows: Sequence[Row], report: Report, workers: int) -> None:
    with (
        ProcessPoolExecutor(workers) as pool,
        tqdm(total=len(rows), unit="clip", disable=None, desc="recordings") as bar,
    ):
        found: list[tuple[Row, Sound]] = []
        for row, sound in zip(
            rows, pool.map(measure, (r.audio for r in rows), chunksize=64), strict=True
        ):
            found.append((row, sound))
            bar.update()
    groups: dict[tuple[Level, str, str], list[str]] = {
        ("error", "recordings cannot be read", "convert or remove them"): [
            f"{r.place}: {s.error}" for r, s in found if s.error
        ],
        (
            "error",
            "recordings are not as long as their row says (over 0.1 s and 5 % off)",
            "write the durations anew with `loquent data prepare`",
        ): [
            f"{r.place}: {s.seconds:.2f} s, the row says {r.duration:.2f}"
            for r, s in found
            if not s.error and abs(s.seconds - r.duration) > max(0.1, 0.05 * s.seconds)
        ],
        (
            "warning",
            f"recordings are nearly silent (under {_QUIET_DB:g} dB of full scale)",
            "listen: is there speech?",
        ): [
            f"{r.place}: {s.level:.0f} dB, {r.raw!r}"
            for r, s in found
            if not s.error and s.level < _QUIET_DB
        ],
        (
            "warning",
            f"recordings clip (over {100 * _CLIPPED:g} % of samples at full scale)",
            "record quieter; in training they are better than none",
        ): [f"{r.place}: {100 * s.clipped:.2f} %" for r, s in found if s.clipped > _CLIPPED],
        (
            "note",
            "recordings have less than 16 kHz: what is above is missing",
            "",
        ): [f"{r.place}: {s.rate} Hz" for r, s in found if 0 < s.rate < 16000],
    }
    for (level, what, cure), examples in groups.items():
        if examples:
            report.add(level, f"{len(examples)} of {len(found)} {what}", cure, examples)
    levels: dict[str, list[float]] = defaultdict(list)
    for r, s in found:
        if np.isfinite(s.level):
            levels[r.source].append(s.level)
    if levels:
        report.add(
            "note",
            "median level by source, dB of full scale: "
            + ", ".join(f"{n} {np.median(v):.0f}" for n, v in sorted(levels.items())),
        )
