"""``loquent train``: train the student from manifests."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from loquent.engine.errors import LoquentError
from loquent.engine.features import whisper_spec
from loquent.models.checkpoint import CheckpointError, load_checkpoint
from loquent.models.data import DataError, FeatureCache, Utterance, read_manifest
from loquent.models.presets import whisper_tiny
from loquent.models.student import Student
from loquent.models.tokens import Tokenizer
from loquent.models.training import TrainConfig, Trainer
from loquent.models.whisper import WhisperWeightsError, initialise_from_whisper, load_whisper


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loquent train",
        description=__doc__,
        epilog="A killed run goes on from its last checkpoint: give the same command again.",
    )
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="MANIFEST[=SHARE]",
        help="JSONL manifest to train on; SHARE is the part drawn per epoch (default 1)",
    )
    parser.add_argument(
        "--noise",
        type=Path,
        metavar="MANIFEST",
        help="JSONL manifest of recorded noise to add to the speech (audio and duration)",
    )
    parser.add_argument("--dev", required=True, type=Path, help="JSONL manifest to watch")
    parser.add_argument("--run", required=True, type=Path, help="folder of the run")
    parser.add_argument("--features", type=Path, help="folder of the feature cache (RUN/features)")
    parser.add_argument(
        "--exclude-licence",
        action="append",
        default=[],
        metavar="TEXT",
        help="leave out rows whose licence contains TEXT (for example NC)",
    )
    parser.add_argument(
        "--whisper",
        metavar="WEIGHTS",
        help="start from Whisper's encoder: hub id, folder, or CTranslate2 model.bin",
    )
    parser.add_argument(
        "--start", type=Path, help="start from this checkpoint: its shape, weights and subwords"
    )
    parser.add_argument("--vocab", type=int, default=256, help="subwords (default %(default)s)")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument(
        "--decay", type=int, default=1500, help="last steps, in which the learning rate falls"
    )
    parser.add_argument("--batch-seconds", type=float, default=60.0)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--head-lr", type=float, default=2e-3)
    parser.add_argument("--rnnt-from", type=int, default=500)
    parser.add_argument(
        "--long-until", type=int, default=0, help="up to this step train on long chunks only"
    )
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: all)")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def _read_all(
    shares: list[str], exclude: list[str]
) -> tuple[list[Utterance], list[float], list[str]]:
    utterances: list[Utterance] = []
    weights: list[float] = []
    names: list[str] = []
    for item in shares:
        name, _, share = item.partition("=")
        try:
            weight = float(share) if share else 1.0
        except ValueError as error:
            raise DataError(f"--data {item}: {share!r} is not a number") from error
        if not weight > 0:
            raise DataError(f"--data {item}: got a share of {weight:g}, expected more than 0")
        rows = read_manifest(Path(name), exclude_licences=exclude)
        utterances += rows
        weights += [weight] * len(rows)
        hours = sum(u.duration for u in rows) / 3600
        names.append(f"{Path(name).name}: {len(rows)} utterances, {hours:.2f} h, share {weight:g}")
    return utterances, weights, names


def _initial(args: argparse.Namespace, texts: list[str]) -> tuple[Student, Tokenizer]:
    """The student before its first step, and the subwords, which a run keeps for good."""
    if args.start:
        # Its heads are tied to its subwords, so both come along.
        checkpoint = load_checkpoint(args.start)
        return checkpoint.student, checkpoint.tokenizer
    tokens = args.run / "tokens.spm"
    if not tokens.exists():
        try:
            model = Tokenizer.train(texts, args.vocab).model
        except ValueError as error:
            raise DataError(f"{error}; choose another --vocab") from error
        tokens.parent.mkdir(parents=True, exist_ok=True)
        tokens.write_bytes(model)
    try:
        tokenizer = Tokenizer.load(tokens)
    except ValueError as error:
        raise DataError(f"{tokens}: {error}; remove it to learn subwords anew") from error
    student = Student(whisper_tiny(tokenizer.size))
    if args.whisper:
        initialise_from_whisper(student.encoder, load_whisper(args.whisper))
    return student, tokenizer


def _origin(args: argparse.Namespace) -> str:
    """What the weights started from, for the model card: a name, never a path of this machine."""
    source = args.start or args.whisper
    if source is None:
        return "random weights"
    return Path(source).name if Path(source).exists() else str(source)


def _run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    utterances, weights, names = _read_all(args.data, args.exclude_licence)
    dev_rows = read_manifest(args.dev)
    if not utterances or not dev_rows:
        raise DataError("no usable utterance is left to train on, or none in --dev")
    print("\n".join(names))
    student, tokenizer = _initial(args, [u.text for u in utterances])
    spec = whisper_spec()
    cache = args.features or args.run / "features"
    config = TrainConfig(
        steps=args.steps,
        decay=args.decay,
        seed=args.seed,
        batch_seconds=args.batch_seconds,
        lr=args.lr,
        head_lr=args.head_lr,
        rnnt_from=args.rnnt_from,
        long_until=args.long_until,
        save_every=args.save_every,
        eval_every=args.eval_every,
    )
    trainer = Trainer(
        args.run,
        student,
        tokenizer,
        FeatureCache(utterances, spec, cache),
        FeatureCache(dev_rows, spec, cache),
        weights,
        config,
        {
            "data": names,
            "excluded_licences": args.exclude_licence,
            "start": _origin(args),
        },
        noise=FeatureCache(read_manifest(args.noise, labelled=False), spec, cache)
        if args.noise
        else None,
    )
    trainer.fit()
    print(json.dumps({"run": str(args.run), **vars(trainer.progress)}))


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _run(args)
    except (
        DataError,
        LoquentError,
        CheckpointError,
        WhisperWeightsError,
        FloatingPointError,
    ) as error:
        parser.exit(1, f"loquent train: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "loquent train: stopped; the same command resumes\n")
    return 0
