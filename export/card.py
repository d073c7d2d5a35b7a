"""A model card from what was measured: nothing in it is typed by hand but the text at its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loquent.engine.bundle import Bundle
from loquent.engine.fields import MANIFEST
from loquent.export.bundle import update_manifest
from loquent.export.results import (
    CLEAN,
    Result,
    as_dicts,
    cost_table,
    delay_table,
    entity_table,
    table,
)
from loquent.models.data import DataError


def model_card(
    bundle: Bundle, results: Sequence[Result], dataset: str, about: str | None = None
) -> str:
    """Markdown.

    Args:
        bundle: what was measured.
        results: of the bundle, and of others on the same clips.
        dataset: name of the clips' manifest.
        about: Markdown to begin with: what the model is for and what not.
    """
    clean = [r for r in results if r.noise == CLEAN]
    clips = results[0].lines
    hours = sum(line.utterance.duration for line in clips) / 3600
    languages = ", ".join(bundle.languages)
    parts = [
        f"# The model `{bundle.name}`, version {bundle.version}",
        about.strip() if about else "",
        _facts(
            {
                "language": languages,
                "precision": f"{bundle.precision}, {_size(bundle) / 1e6:.1f} MB",
                "vocabulary": f"{len(bundle.tokens)} subwords",
                "chunks": ", ".join(f"{ms:g}" for ms in bundle.chunks_ms) + " ms",
                "decoders": ", ".join(bundle.decoders) + f" (default {bundle.default_decoder})",
                "language model": _language_model(bundle),
                "licence": str(bundle.manifest.get("licence", "unknown")),
            }
        ),
        _training(bundle.manifest.get("training") or {}),
        "## Accuracy",
        (
            f"WER ± half of its 95 % interval (bootstrap over clips) / CER in percent on "
            f"{dataset}: {len(clips)} clips, {hours:.2f} h, streamed chunk by chunk."
        ),
        table(clean),
    ]
    if len(clean) < len(results):
        parts += ["## In noise, quieter, or through other channels", table(results)]
    if entities := entity_table(clean):
        parts += ["## Numbers and names", entities]
    if delays := delay_table(results):
        parts += [
            "## Delay",
            "Milliseconds of audio from the end of a word, by forced alignment, to its caption.",
            delays,
        ]
    parts += ["## Cost", "Processor seconds for a second of audio.", cost_table(clean)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_card(
    path: Path, results: Sequence[Result], source: str, dataset: str, about: Path | None
) -> None:
    """Write the card of ``source`` to ``path``; a bundle's folder also gets the scores.

    Raises:
        DataError: ``path`` is a folder but no bundle, or the text at the head cannot be read.
    """
    bundle = Bundle.load(source)
    try:
        head = about.read_text("utf-8") if about else None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--about {about}: cannot be read ({error})") from error
    text = model_card(bundle, results, dataset, head)
    if not path.is_dir():
        path.write_text(text, "utf-8")
        return
    if not (path / MANIFEST).is_file():
        raise DataError(
            f"--card {path}: got a folder without {MANIFEST}, expected a bundle's folder or the "
            "name of a Markdown file"
        )
    own = [r for r in results if r.bundle == bundle.name]
    update_manifest(path, scores=[{"set": dataset, **row} for row in as_dicts(own)])
    (path / "README.md").write_text(text, "utf-8")


def _language_model(bundle: Bundle) -> str:
    if bundle.lm is None:
        return "none"
    return "a word n-gram" + (" and a recurrent network" if bundle.lm.neural else "")


def _size(bundle: Bundle) -> int:
    """Bytes of the files that the manifest names."""
    names: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key in ("file", "spm") and isinstance(inner, str):
                    names.add(inner)
                collect(inner)

    collect(dict(bundle.manifest))
    return sum(len(bundle.files.read(name)) for name in sorted(names))


def _facts(facts: Mapping[str, str]) -> str:
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _training(training: Mapping[str, Any]) -> str:
    """What the checkpoint says of its training, as far as it says it."""
    origin = training.get("origin") or {}
    progress = training.get("progress") or {}
    lines = []
    if start := origin.get("start"):
        lines.append(f"- started from {start}")
    if average := origin.get("average"):
        lines.append(f"- averaged with {average}")
    lines += [f"- {name}" for name in origin.get("data", [])]
    if left_out := origin.get("excluded_licences"):
        lines.append(f"- without rows whose licence has {', '.join(left_out)}")
    if progress:
        lines.append(
            f"- {progress.get('step', 0)} steps, {progress.get('audio_hours', 0):.0f} h of audio "
            f"seen, {progress.get('core_hours', 0):.1f} core-hours"
        )
    return "\n".join(["## Training", "", *lines]) if lines else ""
