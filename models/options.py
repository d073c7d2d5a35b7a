"""What the training commands have in common on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from loquent.engine.errors import LoquentError
from loquent.models.checkpoint import CheckpointError
from loquent.models.data import DataError, Utterance, read_manifest
from loquent.models.tokens import Tokenizer
from loquent.models.whisper import WhisperWeightsError

RESUMES = "A killed run goes on from its last checkpoint: give the same command again."


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What to train on, what to watch, and where the run lives."""
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="MANIFEST[=SHARE]",
        help="JSONL manifest to train on; SHARE is the part drawn per epoch (default 1)",
    )
    parser.add_argument("--dev", required=True, type=Path, help="JSONL manifest to watch")
    parser.add_argument("--run", required=True, type=Path, help="folder of the run")
    parser.add_argument("--features", type=Path, help="folder of the feature cache (RUN/features)")
    parser.add_argument(
        "--noise",
        type=Path,
        metavar="MANIFEST",
        help="JSONL manifest of recorded noise to add to the speech (audio and duration)",
    )
    parser.add_argument(
        "--exclude-licence",
        action="append",
        default=[],
        metavar="TEXT",
        help="leave out rows whose licence contains TEXT (for example NC)",
    )


def add_token_options(parser: argparse.ArgumentParser) -> None:
    """The vocabulary."""
    parser.add_argument("--vocab", type=int, default=256, help="subwords (default %(default)s)")
    parser.add_argument(
        "--tokens", type=Path, help="take the subwords of this tokens.spm instead of learning them"
    )


def add_loop_options(
    parser: argparse.ArgumentParser,
    *,
    steps: int,
    batch_seconds: float | None,
    lr: float,
    head_lr: float | None,
) -> None:
    """Steps, rates, evaluation, checkpoints."""
    parser.add_argument("--steps", type=int, default=steps, help="(default %(default)s)")
    parser.add_argument(
        "--decay", type=int, default=1500, help="last steps, in which the learning rate falls"
    )
    if batch_seconds is None:  # it learns from something else than audio
        parser.set_defaults(batch_seconds=0.0)
    else:
        parser.add_argument(
            "--batch-seconds", type=float, default=batch_seconds, help="(default %(default)s)"
        )
    parser.add_argument(
        "--accumulate", type=int, default=1, help="batches per step and process (default 1)"
    )
    if head_lr is None:  # it has no encoder
        parser.add_argument("--lr", type=float, default=lr, dest="head_lr", help="(%(default)s)")
        parser.set_defaults(lr=lr)
    else:
        parser.add_argument("--lr", type=float, default=lr, help="of the encoder (%(default)s)")
        parser.add_argument(
            "--head-lr", type=float, default=head_lr, help="of the rest (%(default)s)"
        )
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument(
        "--patience",
        type=int,
        default=0,
        help="stop after this many evaluations without a new best (default: never)",
    )
    parser.add_argument(
        "--core-hours",
        type=float,
        default=0.0,
        help="stop after so much processor time (default: after --steps)",
    )
    parser.add_argument(
        "--fp32", action="store_true", help="no bf16, not even on devices that are made for it"
    )
    parser.add_argument("--tensorboard", action="store_true", help="log to RUN/tensorboard too")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: all)")
    parser.add_argument("--seed", type=int, default=1)


def add_front_option(parser: argparse._ActionsContainer) -> None:
    """When the front end learns; see :func:`front_frozen_until`."""
    parser.add_argument(
        "--freeze-front", metavar="STEPS", help="the front end learns from then on, or `never`"
    )


def front_frozen_until(value: str) -> int | None:
    """Step from which the front end learns, None: never."""
    if value != "never" and not value.isdecimal():
        raise DataError(f"--freeze-front: got {value!r}, expected a step or `never`")
    return None if value == "never" else int(value)


def loop_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of LoopConfig that :func:`add_loop_options` asks for."""
    names = "steps decay seed batch_seconds accumulate lr head_lr save_every eval_every patience"
    names += " core_hours"
    settings: dict[str, Any] = {name: getattr(args, name) for name in names.split()}
    return settings | {"bf16": not args.fp32, "tensorboard": args.tensorboard}


def start_torch(args: argparse.Namespace) -> None:
    """Threads and seed."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


def read_shares(
    shares: Sequence[str], exclude: Sequence[str], *, option: str = "--data"
) -> tuple[list[Utterance], list[float], list[str]]:
    """Utterances of MANIFEST[=SHARE] options, the share of each, and a line about each manifest."""
    utterances: list[Utterance] = []
    weights: list[float] = []
    names: list[str] = []
    for item in shares:
        name, _, share = item.partition("=")
        try:
            weight = float(share) if share else 1.0
        except ValueError as error:
            raise DataError(f"{option} {item}: {share!r} is not a number") from error
        if not weight > 0:
            raise DataError(f"{option} {item}: got a share of {weight:g}, expected more than 0")
        rows = read_manifest(Path(name), exclude_licences=exclude)
        utterances += rows
        weights += [weight] * len(rows)
        names.append(about(Path(name), rows, weight))
    return utterances, weights, names


def about(path: Path, rows: Sequence[Utterance], share: float) -> str:
    """A line for the screen and the model card, without the path."""
    hours = sum(u.duration for u in rows) / 3600
    return f"{path.name}: {len(rows)} utterances, {hours:.2f} h, share {share:g}"


def subwords(args: argparse.Namespace, texts: Sequence[str]) -> Tokenizer:
    """The subwords of a run, which it keeps for good: given, or learnt from its texts."""
    tokens: Path = args.run / "tokens.spm"
    if not tokens.exists():
        if args.tokens:
            model = args.tokens.read_bytes()
        else:
            try:
                model = Tokenizer.train(texts, args.vocab).model
            except ValueError as error:
                raise DataError(f"{error}; choose another --vocab") from error
        tokens.parent.mkdir(parents=True, exist_ok=True)
        tokens.write_bytes(model)
    try:
        return Tokenizer.load(tokens)
    except ValueError as error:
        raise DataError(f"{tokens}: {error}; remove it to learn subwords anew") from error


def guarded(parser: argparse.ArgumentParser, run: Callable[[], None]) -> int:
    """Run a command; a user's mistake ends in one line. Returns the exit status."""
    try:
        run()
    except (
        DataError,
        LoquentError,
        CheckpointError,
        WhisperWeightsError,
        FloatingPointError,
    ) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped; the same command resumes\n")
    return 0
