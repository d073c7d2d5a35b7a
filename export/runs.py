"""Training runs side by side on the same recordings, for comparisons at equal cost.

Word error rates are those of the greedy CTC path of the averaged weights, without a language model,
with a confidence interval (see ``models.scoring.bootstrap``). `loquent train --core-hours` makes
runs of equal cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from loquent.engine.features import whisper_spec
from loquent.models.checkpoint import Checkpoint, load_checkpoint
from loquent.models.data import FeatureCache, Utterance
from loquent.models.scoring import Interval, Score, bootstrap
from loquent.models.training import WHOLE, score_each


@dataclass(frozen=True)
class Row:
    """A run.

    Attributes:
        name: of its folder.
        steps, core_hours: what it took.
        wer: of everything, between ``interval``.
        sources: WER by source.
    """

    name: str
    steps: int
    core_hours: float
    wer: float
    interval: Interval
    sources: dict[str, float]


def compare(
    runs: Sequence[Path],
    utterances: Sequence[Utterance],
    features: Path,
    *,
    segment: int,
    right_context: int,
) -> list[Row]:
    """Score the last checkpoint of each run; lengths are in feature frames, segment 0 is all."""
    # Before the first is scored: a wrong path should not cost minutes.
    checkpoints = [load_checkpoint(_last(run)) for run in runs]
    cache = FeatureCache(utterances, whisper_spec(), features)
    return [
        _row(run, checkpoint, cache, segment or WHOLE, right_context)
        for run, checkpoint in zip(tqdm(runs, unit="run"), checkpoints, strict=True)
    ]


def _last(run: Path) -> Path:
    return run / "last" if (run / "last").is_dir() else run


def _row(run: Path, checkpoint: Checkpoint, cache: FeatureCache, segment: int, right: int) -> Row:
    each = score_each(checkpoint.student, checkpoint.tokenizer, cache, segment, right)
    sources: dict[str, Score] = {}
    for utterance, score in zip(cache.utterances, each, strict=True):
        sources[utterance.source] = sources.get(utterance.source, Score()) + score
    progress = checkpoint.state.get("progress", {})
    return Row(
        name=run.name,
        steps=progress.get("step", 0),
        core_hours=progress.get("core_hours", 0.0),
        wer=sum(each, Score()).wer,
        interval=bootstrap(each)[0],
        sources={source: score.wer for source, score in sorted(sources.items())},
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown, WER in percent."""
    sources = list(rows[0].sources)
    head = ["run", "core-hours", "steps", "all", *sources]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row.name, f"{row.core_hours:.2f}", str(row.steps)]
        cells.append(f"{100 * row.wer:.1f} ± {100 * row.interval.half:.1f}")
        cells += [f"{100 * row.sources[source]:.1f}" for source in sources]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
