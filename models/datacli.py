"""``loquent data``: look at training data, convert it, and find labels that are wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from loquent.engine.bundle import Bundle
from loquent.engine.errors import LoquentError
from loquent.models.align import AlignmentError, load_ctc
from loquent.models.checkpoint import CheckpointError
from loquent.models.data import DataError, refuse_overwriting
from loquent.models.datacheck import check
from loquent.models.datareport import as_html, as_text
from loquent.models.labels import keep_best, score_manifest, summary
from loquent.models.tokens import Tokenizer

_USAGE = """\
usage: loquent data COMMAND ...

  check    what is wrong with a training set; exit status 1 if it should not be used
  score    how well each recording fits its transcript, by a model's alignment
  prepare  Kaldi, Common Voice, LibriSpeech or lhotse manifests to JSONL, and back

`loquent data COMMAND --help` has the options.
"""


def _check(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="loquent data check",
        description="Look at a training set: text, lengths, levels, and what train and dev share.",
        epilog="Exit status: 0 nothing wrong, 1 it should not be trained on as it is.",
    )
    parser.add_argument(
        "--train", type=Path, action="append", required=True, metavar="MANIFEST", help="JSONL"
    )
    parser.add_argument(
        "--dev", type=Path, action="append", required=True, metavar="MANIFEST", help="JSONL"
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="bundle, checkpoint or tokens.spm whose vocabulary must have every character",
    )
    parser.add_argument(
        "--hours",
        action="append",
        default=[],
        metavar="LANG=H",
        help="least hours of a language to train on; may be repeated",
    )
    parser.add_argument("--no-audio", action="store_true", help="do not open the recordings")
    parser.add_argument("--workers", type=int, default=2, help="processes (default %(default)s)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    args = parser.parse_args(argv)
    report = check(
        args.train,
        args.dev,
        vocabulary=_vocabulary(args.model) if args.model else None,
        hours=dict(_hours(item) for item in args.hours),
        audio=not args.no_audio,
        workers=args.workers,
    )
    print(as_text(report))
    if args.html:
        names = ", ".join(path.name for path in (*args.train, *args.dev))
        args.html.write_text(as_html(report, f"Training data: {names}"), "utf-8")
    return 0 if report.passed else 1


def _hours(item: str) -> tuple[str, float]:
    language, _, hours = item.partition("=")
    try:
        return language, float(hours)
    except ValueError as error:
        raise DataError(f"--hours: got {item!r}, expected LANG=H, for example en=10") from error


def _vocabulary(source: str) -> list[str]:
    """Pieces of a model, without those in angle brackets (<blank>, <unk>, bytes)."""
    path = Path(source)
    try:
        if path.is_file() and path.suffix != ".tar":
            pieces = Tokenizer.load(path).pieces()
        elif (path / "tokens.spm").is_file() and (path / "config.json").is_file():
            pieces = Tokenizer.load(path / "tokens.spm").pieces()
        else:
            pieces = list(Bundle.load(source).tokens)
    except ValueError as error:
        raise DataError(f"--model {source}: {error}") from error
    return [p for p in pieces if not (p.startswith("<") and p.endswith(">"))]


def _score(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="loquent data score",
        description="Score each label by a model's own forced alignment: nats per token, near 0 "
        "where the recording says what the text says.",
        epilog="A killed call goes on where it was: give the same command again.",
    )
    parser.add_argument("manifest", type=Path, help="JSONL")
    parser.add_argument("--model", default="en", help="bundle or checkpoint with a CTC head")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="JSONL: the rows with their scores"
    )
    parser.add_argument(
        "--least", type=float, metavar="SCORE", help="with --keep: leave out what scores less"
    )
    parser.add_argument("--keep", type=Path, metavar="FILE", help="manifest of the rows that stay")
    args = parser.parse_args(argv)
    if (args.least is None) != (args.keep is None):
        parser.error("--least and --keep go together")
    refuse_overwriting(args.output, [args.manifest])
    if args.keep:
        refuse_overwriting(args.keep, [args.manifest, args.output])
    rows = score_manifest(load_ctc(args.model), args.manifest, args.output)
    print(summary(rows))
    if args.keep:
        if args.keep.parent.resolve() != args.output.parent.resolve():
            raise DataError(
                f"--keep {args.keep}: expected a file beside {args.output}, as paths of audio are "
                "relative to the manifest"
            )
        kept = keep_best(rows, args.keep, least=args.least)
        print(f"\n{args.keep}: {kept} of {len(rows)} rows", file=sys.stderr)
    return 0


def _prepare(argv: Sequence[str]) -> int:
    # lhotse takes seconds to import, which the others need not wait for.
    run: Callable[[Sequence[str]], int] = import_module("loquent.models.prepare").main
    return run(argv)


_COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "check": _check,
    "score": _score,
    "prepare": _prepare,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if name not in _COMMANDS:
        print(_USAGE, end="", file=sys.stderr)
        return 2
    try:
        return _COMMANDS[name](arguments[1:])
    except (AlignmentError, CheckpointError, DataError, LoquentError) as error:
        print(f"loquent data {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"loquent data {name}: stopped", file=sys.stderr)
        return 130
