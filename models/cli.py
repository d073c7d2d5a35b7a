"""``loquent train [student]``: train the student from manifests."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from loquent.engine.features import whisper_spec
from loquent.models.checkpoint import load_checkpoint
from loquent.models.data import DataError, FeatureCache, read_manifest
from loquent.models.options import (
    RESUMES,
    add_data_options,
    add_loop_options,
    add_token_options,
    guarded,
    loop_settings,
    read_shares,
    start_torch,
    subwords,
)
from loquent.models.presets import whisper_tiny
from loquent.models.student import Student
from loquent.models.tokens import Tokenizer
from loquent.models.training import TrainConfig, Trainer
from loquent.models.whisper import initialise_from_whisper, load_whisper


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loquent train",
        description=f"{__doc__} `loquent train teacher --help` is about teachers.",
        epilog=RESUMES,
    )
    add_data_options(parser)
    parser.add_argument(
        "--whisper",
        metavar="WEIGHTS",
        help="start from Whisper's encoder: hub id, folder, or CTranslate2 model.bin",
    )
    parser.add_argument(
        "--start", type=Path, help="start from this checkpoint: its shape, weights and subwords"
    )
    add_token_options(parser)
    add_loop_options(parser, steps=6000, batch_seconds=60.0, lr=3e-4, head_lr=2e-3)
    parser.add_argument("--rnnt-from", type=int, default=500)
    parser.add_argument(
        "--long-until", type=int, default=0, help="up to this step train on long chunks only"
    )
    return parser


def _initial(args: argparse.Namespace, texts: list[str]) -> tuple[Student, Tokenizer]:
    """The student before its first step, and the subwords, which a run keeps for good."""
    if args.start:
        # Its heads are tied to its subwords, so both come along.
        checkpoint = load_checkpoint(args.start)
        return checkpoint.student, checkpoint.tokenizer
    tokenizer = subwords(args, texts)
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
    start_torch(args)
    utterances, weights, names = read_shares(args.data, args.exclude_licence)
    dev_rows = read_manifest(args.dev)
    if not utterances or not dev_rows:
        raise DataError("no usable utterance is left to train on, or none in --dev")
    print("\n".join(names))
    student, tokenizer = _initial(args, [u.text for u in utterances])
    spec = whisper_spec()
    cache = args.features or args.run / "features"
    config = TrainConfig(
        **loop_settings(args), rnnt_from=args.rnnt_from, long_until=args.long_until
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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = list(argv or [])
    if arguments[:1] == ["teacher"]:
        from loquent.models import teacher_cli

        return teacher_cli.main(arguments[1:])
    if arguments[:1] == ["student"]:
        del arguments[0]
    parser = _parser()
    args = parser.parse_args(arguments)
    return guarded(parser, lambda: _run(args))
