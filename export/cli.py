"""``loquent export``: a checkpoint becomes a bundle, checked against torch on the way."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from loquent.engine.audio import load_audio
from loquent.engine.bundle import DECODERS, Bundle
from loquent.engine.errors import LoquentError
from loquent.engine.features import FeatureSpec, fbank, whisper_spec
from loquent.engine.fields import MANIFEST
from loquent.engine.level import LevelRules, loudest
from loquent.engine.recognizer import Recognizer
from loquent.export.bundle import (
    RIGHT_CONTEXTS_MS,
    BundleSpec,
    update_manifest,
    write_bundle,
    write_int8,
)
from loquent.export.evaluate import evaluate
from loquent.export.parity import compare
from loquent.export.results import Result
from loquent.models.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    shrink,
)
from loquent.models.data import DataError, Utterance, read_manifest
from loquent.models.student import Student

# Float graph and torch model differ by the order of sums alone.
PARITY_TOLERANCE = 1e-3
# Absolute WER that int8 may cost before it is refused.
INT8_MAX_LOSS = 0.01
# Share of the clips of --dev that are quieter than what counts as quiet.
_QUIETEST = 0.05


class ExportRefused(ValueError):  # noqa: N818
    """The export would ship something worse than promised."""


def check_parity(student: Student, bundle: Bundle, tolerance: float | None) -> None:
    """Print the parity table.

    Args:
        tolerance: largest difference allowed, None to report only (int8 differs by design).

    Raises:
        ExportRefused: a difference is larger.
    """
    print(f"torch against ONNX ({bundle.precision}), largest difference over carried state:")
    print("| batch | segment | right ctx | steps | ctc | joiner | state | labels that differ |")
    print("|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for row in compare(student, bundle):
        print(
            f"| {row.batch} | {row.segment} | {row.right_context} | {row.steps} | {row.ctc:.1e} | "
            f"{row.joiner:.1e} | {row.state:.1e} | {row.flips} of {row.frames} |"
        )
        worst = float(np.max([worst, row.ctc, row.joiner, row.state]))  # NaN stays NaN
    if tolerance is not None and not worst <= tolerance:
        raise ExportRefused(
            f"the graph differs from the torch model by {worst:.2e}, expected at most "
            f"{tolerance:.0e}; nothing was written"
        )


def check_int8(
    single: Path, quantised: Path, utterances: Sequence[Utterance], limit: float
) -> list[Result]:
    """Score both bundles on ``utterances`` at the default chunk, greedily and with the default.

    Raises:
        ExportRefused: int8 loses more than ``limit`` WER (absolute) with some decoder.
    """
    results: list[Result] = []
    bundle = Bundle.load(single)
    for decoder in bundle.decoders:
        if decoder not in ("rnnt", "ctc", bundle.default_decoder):
            continue
        pair = []
        for path in (single, quantised):
            recognizer = Recognizer.load(path)
            chunk_ms = recognizer.bundle.milliseconds(recognizer.bundle.encoder.segment)
            pair.append(evaluate(recognizer, utterances, decoder=decoder, chunk_ms=chunk_ms))
        before, after = (r.total.wer for r in pair)
        print(
            f"{decoder}: WER fp32 {100 * before:.2f} %, int8 {100 * after:.2f} % "
            f"({100 * (after - before):+.2f} points, allowed +{100 * limit:.2f})"
        )
        if after - before > limit:
            raise ExportRefused(
                f"int8 costs {100 * (after - before):.2f} points of WER with {decoder}, allowed "
                f"are {100 * limit:.2f}; ship fp32 (leave out --int8) or allow more with "
                "--int8-max-loss"
            )
        results += pair
    return results


def _beams(path: Path) -> dict[str, dict[str, float]]:
    try:
        found: dict[str, dict[str, float]] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; expected what `loquent tune -o` writes") from error
    return found


def quiet(features: FeatureSpec, utterances: Sequence[Utterance]) -> LevelRules:
    """How loud the quietest of speech is that a model knows: all but a twentieth are louder."""
    clips = (load_audio(u.audio, sample_rate=features.sample_rate) for u in utterances)
    peaks = [loudest(features, fbank(features, pcm)) for pcm in clips]
    rules = LevelRules(quiet=round(float(np.quantile(peaks, _QUIETEST)), 1))
    print(f"speech below {rules.quiet:g} dB is raised, by up to {rules.most:g} dB")
    return rules


def _spec(
    checkpoint: Checkpoint, args: argparse.Namespace, utterances: Sequence[Utterance]
) -> BundleSpec:
    features = whisper_spec()
    if checkpoint.state.get("features") != features.to_dict():
        raise CheckpointError(
            f"{args.checkpoint}: trained on the features {checkpoint.state.get('features')}, but "
            f"Whisper's, {features.to_dict()}, would be written into the bundle"
        )
    return BundleSpec(
        name=args.name,
        version=args.bundle_version,
        features=features,
        pieces=checkpoint.tokenizer.pieces(),
        spm=checkpoint.tokenizer.model,
        licence=args.licence,
        languages={args.language: "default"},
        default_decoder=args.decoder or ("rnnt" if checkpoint.student.config.joiner_dim else "ctc"),
        right_context_ms=args.right_context_ms,
        lm=args.lm.read_bytes() if args.lm else None,
        level=quiet(features, utterances) if utterances else None,
        beams=_beams(args.beams) if args.beams else {},
        training={
            key: checkpoint.state[key]
            for key in ("origin", "progress", "training")
            if key in checkpoint.state
        },
    )


def _average(checkpoint: Checkpoint, other: str) -> None:
    folder, _, text = other.rpartition("=")
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not folder or not 0 <= share <= 1:
        raise DataError(f"--average: got {other!r}, expected CHECKPOINT=SHARE, a share from 0 to 1")
    found = load_checkpoint(Path(folder))
    if (found.student.config, found.tokenizer.model) != (
        checkpoint.student.config,
        checkpoint.tokenizer.model,
    ):
        raise CheckpointError(f"{folder}: another shape or other subwords; nothing to average")
    with torch.no_grad():
        theirs = dict(found.student.named_parameters())
        for name, weight in checkpoint.student.named_parameters():
            weight.lerp_(theirs[name], share)
    origin = checkpoint.state.setdefault("origin", {})
    own = Path(folder)
    name = own.parent.name if own.name in ("last", "best") else own.name
    before = f"{origin['average']}; then " if "average" in origin else ""
    origin["average"] = f"{before}{name}, {share:g} of the weights"


def _export(args: argparse.Namespace) -> None:
    checkpoint = load_checkpoint(args.checkpoint)
    for other in args.average:
        _average(checkpoint, other)
    utterances = read_manifest(args.dev) if args.dev else []
    if args.int8 and not utterances:
        raise DataError("--int8 needs --dev MANIFEST to measure what quantisation costs")
    with tempfile.TemporaryDirectory() as scratch:
        single = Path(scratch) / "fp32"
        bundle = write_bundle(checkpoint.student, _spec(checkpoint, args, utterances), single)
        check_parity(checkpoint.student, bundle, PARITY_TOLERANCE)
        chosen = single
        if args.int8:
            chosen = Path(scratch) / "int8"
            check_parity(checkpoint.student, write_int8(single, chosen), None)
            results = check_int8(single, chosen, utterances, args.int8_max_loss)
            scores = [
                {
                    "precision": r.precision,
                    "decoder": r.decoder,
                    "chunk_ms": r.chunk_ms,
                    "set": args.dev.name,
                    "wer": {name: round(s.wer, 4) for name, s in sorted(r.scores.items())},
                    "cer": {name: round(s.cer, 4) for name, s in sorted(r.scores.items())},
                }
                for r in results
            ]
            update_manifest(chosen, scores=scores)
        args.output.mkdir(parents=True, exist_ok=True)
        for old in args.output.iterdir():
            if old.is_file():
                old.unlink()
        for file in sorted(chosen.iterdir()):
            (args.output / file.name).write_bytes(file.read_bytes())
    if args.weights:
        small = shrink(checkpoint.student.state_dict())
        config, tokenizer = checkpoint.student.config, checkpoint.tokenizer
        save_checkpoint(args.weights, config, tokenizer, small, checkpoint.state)
    written = Bundle.load(args.output)
    size = sum(f.stat().st_size for f in args.output.iterdir())
    print(f"{args.output}: {written.name} {written.precision}, {size / 1e6:.1f} MB")


def is_free(output: Path, mark: str) -> bool:
    """Whether to write there: there is nothing, an empty folder, or one with the file ``mark``."""
    if not output.exists() or (output / mark).is_file():
        return True
    return output.is_dir() and not any(output.iterdir())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="loquent export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder, for example RUN/best")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--name", default="en", help="name of the bundle")
    parser.add_argument("--bundle-version", default="0.1.0")
    parser.add_argument("--language", default="en")
    parser.add_argument("--licence", default="unknown", help="licence of the weights, in words")
    parser.add_argument("--decoder", choices=DECODERS, help="default decoder of the bundle")
    parser.add_argument(
        "--right-context-ms",
        type=int,
        choices=RIGHT_CONTEXTS_MS,
        default=BundleSpec.right_context_ms,
        help="default of the bundle; sessions may choose another (default %(default)s)",
    )
    parser.add_argument("--lm", type=Path, help="word language model of `loquent lm`")
    parser.add_argument(
        "--beams", type=Path, help="rules of the beam searches, which `loquent tune -o` wrote"
    )
    parser.add_argument(
        "--average",
        metavar="CHECKPOINT=SHARE",
        action="append",
        default=[],
        help="mix in the weights of another one, SHARE of all so far: what a model was fine-tuned "
        "from keeps it from forgetting (arXiv 2109.01903); may be repeated",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help="also write a small checkpoint here (int8 and half precision), to fine-tune from",
    )
    parser.add_argument("--int8", action="store_true", help="quantise the encoder's weights")
    parser.add_argument(
        "--dev", type=Path, help="JSONL manifest for the int8 gate, and to say what speech is quiet"
    )
    parser.add_argument(
        "--int8-max-loss",
        type=float,
        default=INT8_MAX_LOSS,
        help="absolute WER that int8 may cost (default %(default)s)",
    )
    args = parser.parse_args(argv)
    if not is_free(args.output, MANIFEST):
        parser.exit(1, f"loquent export: {args.output} exists and is no bundle; choose another\n")
    if args.weights and not is_free(args.weights, "config.json"):
        parser.exit(
            1, f"loquent export: {args.weights} exists and is no checkpoint; choose another\n"
        )
    torch.manual_seed(0)
    try:
        _export(args)
    except (CheckpointError, DataError, ExportRefused, LoquentError, OSError) as error:
        print(f"loquent export: {error}", file=sys.stderr)
        return 1
    return 0
