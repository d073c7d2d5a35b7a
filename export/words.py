"""``loquent words``: what word times and confidences are worth, and the rules that make them.

Half of the clips is used to measure how late a decoder's tokens are and what their probabilities
mean; the other half to judge it. With --write the rules go into the bundle's manifest. With --train
hotwords are judged, too: on the words that the training transcripts have seldom or never.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loquent.engine.bundle import DECODERS, Bundle
from loquent.engine.errors import LoquentError
from loquent.engine.fields import MANIFEST
from loquent.engine.hotwords import DEFAULT_BOOST
from loquent.engine.recognizer import Recognizer
from loquent.engine.text import WORD_START
from loquent.engine.words import PLAIN, WordRules
from loquent.export import bias
from loquent.export.bias import BiasResult
from loquent.export.bundle import update_manifest
from loquent.export.calibration import Reliability, fit_confidence, reliability
from loquent.export.reference import Times, align_ctc, align_hmm, read_times, write_times
from loquent.export.timing import Errors, errors, fit_timing, pairs
from loquent.export.wordtrial import Heard, Probe, half
from loquent.models.align import AlignmentError, load_ctc
from loquent.models.data import DataError, Utterance, read_manifest


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One decoder: rules fitted on one half, judged on the other, beside what needs no rules."""

    rules: WordRules
    times: tuple[Errors, Errors]
    confidence: tuple[Reliability, Reliability]
    sources: Mapping[str, Errors]


def measure(
    heard: Sequence[Sequence[Heard]],
    reference: Sequence[Sequence[Times]],
    utterances: Sequence[Utterance],
    characters: Sequence[int],
    frame_seconds: float,
) -> Measured:
    """Fit on half 0 and judge on half 1 of the clips.

    Raises:
        ValueError: a half has too little in it.
    """
    rows = list(zip(utterances, heard, reference, strict=True))
    fit, test = ([row for row in rows if half(row[0]) == side] for side in (0, 1))

    def found(some: Sequence[tuple[Utterance, Sequence[Heard], Sequence[Times]]]) -> Any:
        return list(
            pairs(
                [words for _, words, _ in some],
                [times for _, _, times in some],
                [utterance.duration for utterance, _, _ in some],
                characters,
            )
        )

    rules = fit_timing(found(fit), frame_seconds, PLAIN)
    rules = fit_confidence([word for _, words, _ in fit for word in words], rules)
    judged = [word for _, words, _ in test for word in words]
    tests = found(test)
    if not tests or not judged:
        raise ValueError("the half that judges has no words")
    by_source = {
        source: errors(part, frame_seconds, rules)
        for source in sorted({utterance.source for utterance, _, _ in test})
        if (part := found([row for row in test if row[0].source == source]))
    }
    return Measured(
        rules=rules,
        times=(errors(tests, frame_seconds, PLAIN), errors(tests, frame_seconds, rules)),
        confidence=(reliability(judged, PLAIN), reliability(judged, rules)),
        sources=by_source,
    )


def tables(found: Mapping[str, Measured]) -> str:
    """Markdown: times and confidences of every decoder."""
    lines = [
        "Median absolute error against the reference, ms, and words within 80 ms:",
        "",
        "| decoder | words | start by frames | start | within | end by frames | end | within |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        before, after = one.times
        cells = []
        for raw, ours in ((before.starts, after.starts), (before.ends, after.ends)):
            near = 100 * float((abs(ours) <= 0.08).mean())
            cells += [_ms(raw), f"**{_ms(ours)}**", f"{near:.0f} %"]
        lines.append(f"| {name} | {len(after.starts)} | " + " | ".join(cells) + " |")
    sources = sorted({source for one in found.values() for source in one.sources})
    lines += [
        "",
        "By source, start / end, ms:",
        "",
        "| decoder | " + " | ".join(sources) + " |",
        "|---" * (len(sources) + 1) + "|",
    ]
    for name, one in found.items():
        cells = [
            f"{_ms(one.sources[s].starts)} / {_ms(one.sources[s].ends)}"
            if s in one.sources
            else "-"
            for s in sources
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Confidences, as decoded -> calibrated (ECE: lower is better; NCE, AUC: higher):",
        "",
        "| decoder | words | right % | ECE % | NCE | AUC |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        a, b = one.confidence
        lines.append(
            f"| {name} | {b.words} | {100 * b.right:.1f} | {100 * a.ece:.1f} -> "
            f"**{100 * b.ece:.1f}** | {a.nce:.2f} -> {b.nce:.2f} | {a.auc:.3f} -> {b.auc:.3f} |"
        )
    return "\n".join(lines)


def as_json(found: Mapping[str, Measured], hotwords: Sequence[BiasResult] = ()) -> str:
    """One JSON line with the numbers of :func:`tables` and the rules."""
    rows = {
        name: {
            "rules": rules_of(one.rules),
            "start_ms": [round(1000 * e.medians()[0], 1) for e in one.times],
            "end_ms": [round(1000 * e.medians()[1], 1) for e in one.times],
            "confidence": [
                {k: v if k == "bins" else round(v, 4) for k, v in asdict(r).items()}
                for r in one.confidence
            ],
        }
        for name, one in found.items()
    }
    return json.dumps({"words": rows, "hotwords": bias.as_rows(hotwords)})


def rules_of(rules: WordRules) -> dict[str, float]:
    """The fields of the manifest."""
    return {key: value for key, value in asdict(rules).items() if value is not None}


def _ms(values: NDArray[np.float64]) -> str:
    return f"{1000 * np.median(np.abs(values)):.0f}"


def _reference(
    args: argparse.Namespace, utterances: Sequence[Utterance]
) -> list[tuple[Times, ...]]:
    if args.reference and args.reference.exists():
        return read_times(args.reference, utterances)
    if args.align == "hmm":
        times = align_hmm(utterances)
    else:
        times = align_ctc(load_ctc(args.align), utterances)
    if args.reference:
        write_times(args.reference, utterances, times)
    return times


def _run(args: argparse.Namespace) -> None:
    utterances = read_manifest(args.manifest)
    if not utterances:
        raise DataError(f"{args.manifest}: no usable row")
    if args.write and not (Path(args.bundle) / MANIFEST).is_file():
        raise DataError(f"--write needs --bundle FOLDER, got {args.bundle!r}, which is no folder")
    reference = _reference(args, utterances)
    probe = Probe(args.bundle, threads=args.threads)
    bundle = probe.bundle
    characters = [len(piece.removeprefix(WORD_START)) for piece in bundle.tokens]
    chunk_ms = args.chunk_ms or bundle.milliseconds(bundle.encoder.segment)
    found: dict[str, Measured] = {}
    for decoder in args.decoder or bundle.decoders:
        heard = probe.hear(utterances, decoder=decoder, chunk_ms=chunk_ms)
        found[decoder] = measure(heard, reference, utterances, characters, bundle.frame_seconds)
    hotwords = _bias(args, utterances, list(found), chunk_ms) if args.train else []
    text = tables(found)
    if hotwords:
        text += "\n\nHotwords, for each clip its own rare words and others:\n\n"
        text += bias.table(hotwords)
    print(text)
    print(as_json(found, hotwords))
    if args.write:
        rules = {name: rules_of(one.rules) for name, one in found.items()}
        update_manifest(Path(args.bundle), words=dict(bundle.manifest.get("words", {})) | rules)
        Bundle.load(args.bundle)
    if args.report:
        from loquent.export.plots import plot_reliability, plot_times

        args.report.mkdir(parents=True, exist_ok=True)
        (args.report / "words.md").write_text(text + "\n", "utf-8")
        (args.report / "words.json").write_text(as_json(found, hotwords) + "\n", "utf-8")
        note = f"{bundle.name} {bundle.precision}, {chunk_ms:g} ms chunks, {args.manifest.name}"
        plot_reliability(
            args.report / "reliability.png",
            {name: one.confidence for name, one in found.items()},
            note,
        )
        plot_times(
            args.report / "times.png", {name: one.times for name, one in found.items()}, note
        )


def _bias(
    args: argparse.Namespace, utterances: Sequence[Utterance], decoders: Sequence[str], chunk: float
) -> list[BiasResult]:
    recognizer = Recognizer.load(args.bundle, threads=args.threads)
    training = [row for path in args.train for row in read_manifest(path)]
    cases = bias.make_set(utterances, training, recognizer)
    return [
        bias.run(
            recognizer, cases, decoder=decoder, chunk_ms=chunk, distractors=count, boost=args.boost
        )
        for decoder in decoders
        for count in (None, *args.distractors)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="loquent words", description=__doc__)
    parser.add_argument("manifest", type=Path, help="JSONL with audio, text, duration, source")
    parser.add_argument("--bundle", default="en", help="name, folder or tar (default: en)")
    parser.add_argument("--decoder", choices=DECODERS, action="append", help="default: all")
    parser.add_argument("--chunk-ms", type=float, help="(default: the bundle's)")
    parser.add_argument(
        "--align",
        default="hmm",
        metavar="hmm|MODEL",
        help="who says when words are said: hmm is PocketSphinx (English), MODEL the CTC head of a "
        "bundle or checkpoint (default: hmm)",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="JSON lines with the times of words: read if it is there, written if not",
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="tables, JSON and plots")
    parser.add_argument(
        "--write", action="store_true", help="put the rules into the manifest of --bundle FOLDER"
    )
    parser.add_argument(
        "--train",
        type=Path,
        action="append",
        default=[],
        metavar="MANIFEST",
        help="what the model was trained on; may be repeated; with it hotwords are judged",
    )
    parser.add_argument(
        "--distractors",
        type=int,
        nargs="+",
        default=[0, 100, 1000],
        metavar="N",
        help="words in a clip's list that it does not say (default: 0 100 1000)",
    )
    parser.add_argument(
        "--boost", type=float, default=DEFAULT_BOOST, help="of all hotwords (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        _run(args)
    except (LoquentError, DataError, AlignmentError) as error:
        parser.exit(1, f"loquent words: {error}\n")
    return 0
