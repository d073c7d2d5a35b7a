"""``loquent data score``: how well each recording fits its transcript, by a model's own alignment.

A label that departs from what is said (acted speech, a wrong file) has a path through the CTC
lattice that the model finds unlikely. The score is the natural logarithm of that best path's
probability divided by its tokens: near 0 where all is well, -3 and less where most is wrong. It
measures the model too, so compare within a source, and look at the worst before leaving them out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from loquent.engine.audio import load_audio
from loquent.engine.errors import AudioError
from loquent.models.align import AlignmentError, CtcModel, align_log_probs
from loquent.models.data import DataError, Utterance, read_manifest
from loquent.models.scoring import Score, ctc_greedy


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What the model thinks of one label.

    Attributes:
        score: see the module; -inf where it cannot be aligned at all.
        cer: of the model's greedy transcript against the label.
        heard: that transcript.
    """

    score: float
    cer: float
    heard: str


def fit(model: CtcModel, utterance: Utterance) -> Fit:
    """Score one label. Raises AudioError."""
    log_probs = model.log_probs(load_audio(utterance.audio, sample_rate=model.sample_rate))
    best = log_probs.argmax(1).tolist() if len(log_probs) else []
    heard = model.decode(ctc_greedy(best, model.blank))
    try:
        score = align_log_probs(model, log_probs, utterance.text).score
    except AlignmentError:
        score = float("-inf")
    return Fit(score=score, cer=Score.of(utterance.text, heard).cer, heard=heard)


def score_manifest(model: CtcModel, manifest: Path, out: Path) -> list[dict[str, Any]]:
    """Write the rows of ``manifest`` with ``ctc_score``, ``ctc_cer`` and ``ctc_heard`` to ``out``.

    A killed call goes on where it was: what stands in ``out`` already is kept. Rows that training
    leaves out are left out here too.

    Raises:
        DataError: a manifest or a recording cannot be read, or ``out`` has other rows.
    """
    utterances = read_manifest(manifest)
    done = _read(out)
    rows = [_row(u, out.parent) for u in utterances]
    for old, row in zip(done, rows, strict=False):
        if old["audio"] != row["audio"] or old["text"] != row["text"]:
            raise DataError(
                f"{out}: holds scores of other rows ({old['audio']}, expected {row['audio']}); "
                "remove it or choose another name"
            )
    if len(done) > len(rows):
        raise DataError(f"{out}: holds {len(done)} scores, {manifest} only {len(rows)} rows")
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        out.open("a", encoding="utf-8") as file,
        tqdm(
            total=round(sum(u.duration for u in utterances)),
            initial=round(sum(u.duration for u in utterances[: len(done)])),
            unit="s audio",
            disable=None,
        ) as bar,
    ):
        for utterance, row in zip(utterances[len(done) :], rows[len(done) :], strict=True):
            try:
                found = fit(model, utterance)
            except AudioError as error:
                raise DataError(str(error)) from error
            row |= {
                # JSON has no infinity.
                "ctc_score": round(max(found.score, -99.0), 4),
                "ctc_cer": round(found.cer, 4),
                "ctc_heard": found.heard,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            done.append(row)
            bar.update(round(utterance.duration))
    return done


def keep_best(rows: list[dict[str, Any]], out: Path, *, least: float) -> int:
    """Write the rows that score ``least`` or more to ``out``; returns how many."""
    kept = [row for row in rows if row["ctc_score"] >= least]
    with out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    return len(kept)


def summary(rows: list[dict[str, Any]]) -> str:
    """Markdown: how the scores of each source are spread, and the ten worst labels."""
    lines = [
        "| source | clips | h | 5 % | 25 % | median | CER % |",
        "|---|---|---|---|---|---|---|",
    ]
    for source in sorted({str(row.get("source", "-")) for row in rows}):
        own = [row for row in rows if str(row.get("source", "-")) == source]
        low, quarter, median = np.percentile([r["ctc_score"] for r in own], (5, 25, 50))
        hours = sum(float(r["duration"]) for r in own) / 3600
        cer = np.mean([min(1.0, r["ctc_cer"]) for r in own])
        lines.append(
            f"| {source} | {len(own)} | {hours:.2f} | {low:.2f} | {quarter:.2f} | {median:.2f} | "
            f"{100 * cer:.1f} |"
        )
    lines += ["", "The worst:", ""]
    for row in sorted(rows, key=lambda r: float(r["ctc_score"]))[:10]:
        lines.append(
            f"- {row['ctc_score']:.2f} {row['audio']}: {row['text']!r}, heard {row['ctc_heard']!r}"
        )
    return "\n".join(lines)


def _row(utterance: Utterance, folder: Path) -> dict[str, Any]:
    """The manifest's row with its audio relative to another folder."""
    audio = os.path.relpath(utterance.audio, folder)
    return {**utterance.row, "audio": audio}


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows that an earlier call wrote; half a line at the end of the file is cut off."""
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, "utf-8")
    try:
        return list(_rows(whole))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not written by `loquent data score` ({error!r})") from error


def _rows(text: str) -> Iterator[dict[str, Any]]:
    for line in text.split("\n"):
        if line:
            row: dict[str, Any] = json.loads(line)
            for key in ("audio", "text", "ctc_score", "ctc_cer", "ctc_heard"):
                row[key]
            yield row
