"""``loquent train [student]``: train the student from manifests."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from loquent.engine.features import Fbank, whisper_spec
from loquent.models.checkpoint import load_checkpoint
from loquent.models.data import (
    Augment,
    DataError,
    FeatureCache,
    FeatureSource,
    Utterance,
    collate,
    epoch_batches,
    read_manifest,
)
from loquent.models.distillation import Distillation
from loquent.models.heads import learn_heads
from loquent.models.loop import Freezing
from loquent.models.narrow import narrow_shape, narrowed
from loquent.models.noise import RecordedNoise
from loquent.models.options import (
    RESUMES,
    add_data_options,
    add_front_option,
    add_loop_options,
    add_token_options,
    front_frozen_until,
    guarded,
    loop_settings,
    read_shares,
    start_torch,
    subwords,
)
from loquent.models.posteriors import Posteriors
from loquent.models.presets import whisper_student
from loquent.models.student import Student
from loquent.models.teacher import student_of
from loquent.models.tokens import Tokenizer
from loquent.models.training import TrainConfig, Trainer
from loquent.models.waveform import MASKS, WaveAugment, WaveformSource
from loquent.models.whisper import initialise_from_whisper, load_whisper, whisper_shape

_CALIBRATION = 240  # utterances that hidden units are chosen by


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loquent train",
        description=f"{__doc__} `loquent train teacher --help` is about teachers.",
        epilog=RESUMES,
    )
    add_data_options(parser)
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--whisper",
        metavar="WEIGHTS",
        help="start from Whisper's encoder: hub id, folder, or CTranslate2 model.bin",
    )
    start.add_argument(
        "--from-teacher",
        type=Path,
        metavar="CHECKPOINT",
        help="start from the encoder, CTC head and subwords of a Whisper teacher",
    )
    start.add_argument(
        "--start", type=Path, help="start from this checkpoint: its shape, weights and subwords"
    )
    parser.add_argument(
        "--layers",
        help="which layers of --whisper or --from-teacher to take, 0,2,3 for example (all)",
    )
    parser.add_argument(
        "--ffn",
        type=int,
        default=0,
        metavar="UNITS",
        help="how many units of their feed-forward modules to keep (all)",
    )
    add_token_options(parser)
    add_loop_options(parser, steps=6000, batch_seconds=60.0, lr=3e-4, head_lr=2e-3)
    add_front_option(parser)
    parser.add_argument("--rnnt-from", type=int, default=500)
    parser.add_argument(
        "--long-until", type=int, default=0, help="up to this step train on long chunks only"
    )
    parser.add_argument(
        "--longest-until", type=int, default=0, help="up to this step on chunks of 1.28 s and more"
    )
    parser.add_argument(
        "--predictor-from",
        type=Path,
        metavar="CHECKPOINT",
        help="take predictor and joiner of another student with the same subwords",
    )
    parser.add_argument(
        "--heads-first",
        type=int,
        default=0,
        metavar="STEPS",
        help="new heads learn alone at first, for so many steps, on the encoder output that "
        "--distil has kept; some minutes' work (try 2000 for a student that begins as its teacher)",
    )
    parser.add_argument(
        "--delay-penalty",
        type=float,
        default=0.0,
        help="makes the transducer speak earlier; try 0.005 (default: off)",
    )
    parser.add_argument(
        "--waveforms",
        action="store_true",
        help="decode and change the recordings each time (speed, rooms, noise, codecs, vocal-tract "
        "length) instead of cached features: more variety, more work",
    )
    group = parser.add_argument_group("distillation", "what to learn from a teacher, by weight")
    group.add_argument("--distil", type=Path, help="folder that `loquent distill` wrote")
    group.add_argument(
        "--kd-ctc", type=float, help="of its CTC posteriors (default: 1, if it has any)"
    )
    group.add_argument(
        "--kd-delay", type=int, default=4, help="output frames the student may lag (%(default)s)"
    )
    group.add_argument("--kd-text", type=float, default=0.0, help="of its score of the text")
    group.add_argument("--kd-features", type=float, default=0.0, help="of its encoder's output")
    group.add_argument("--kd-metric", choices=("cosine", "l2"), default="cosine")
    group.add_argument(
        "--kd-beside", type=Path, help="checkpoint of a student that hears the same batches"
    )
    group.add_argument(
        "--kd-beside-ctc", type=float, default=0.0, help="of its CTC posteriors, frame by frame"
    )
    group.add_argument("--kd-lattice", type=float, default=0.0, help="of its transducer's lattice")
    return parser


def _layers(args: argparse.Namespace) -> list[int] | None:
    if args.layers is None:
        return None
    try:
        chosen = [int(layer) for layer in args.layers.split(",")]
    except ValueError:
        chosen = []
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0:
        raise DataError(f"--layers: got {args.layers!r}, expected rising numbers such as 0,2,3")
    return chosen


def _initial(args: argparse.Namespace, texts: list[str]) -> tuple[Student, Tokenizer]:
    """The student before its first step, and the subwords, which a run keeps for good."""
    if (args.layers or args.ffn) and not (args.whisper or args.from_teacher):
        raise DataError("--layers and --ffn need --whisper or --from-teacher to take them from")
    layers = _layers(args)
    if args.start or args.from_teacher:
        # Its heads are tied to its subwords, so both come along.
        checkpoint = load_checkpoint(args.start or args.from_teacher)
        if args.start:
            return checkpoint.student, checkpoint.tokenizer
        return student_of(checkpoint.student, layers), checkpoint.tokenizer
    if args.distil and not args.tokens:
        args.tokens = args.distil / "tokens.spm"
    tokenizer = subwords(args, texts)
    if not args.whisper:
        return Student(whisper_student(tokenizer.size)), tokenizer
    tensors = load_whisper(args.whisper)
    dim, count = whisper_shape(tensors)
    chosen = list(range(count)) if layers is None else layers
    student = Student(whisper_student(tokenizer.size, dim=dim, layers=len(chosen)))
    initialise_from_whisper(student.encoder, tensors, chosen)
    return student, tokenizer


def _take_predictor(student: Student, tokenizer: Tokenizer, folder: Path) -> None:
    """Predictor and joiner of another student, which know the subwords whatever the encoder."""
    other = load_checkpoint(folder)
    if other.tokenizer.model != tokenizer.model:
        raise DataError(
            f"--predictor-from {folder}: it has other subwords than this student; give both the "
            "same with --tokens"
        )
    own = student.state_dict()
    theirs = other.student.state_dict()
    names = [name for name in own if name.startswith(("predictor.", "joiner."))]
    for name in names:
        if name not in theirs or theirs[name].shape != own[name].shape:
            raise DataError(
                f"--predictor-from {folder}: its {name} is "
                f"{tuple(theirs[name].shape) if name in theirs else 'missing'}, expected "
                f"{tuple(own[name].shape)}"
            )
    student.load_state_dict({name: theirs[name] for name in names}, strict=False)


def _narrowed(student: Student, units: int, train: FeatureSource, run: Path) -> Student:
    """With fewer hidden units, chosen by what they do on some of the utterances."""
    try:
        shape = narrow_shape(student.config, units)
    except ValueError as error:
        raise DataError(f"--ffn: {error}") from error
    if (run / "last").exists():  # whose weights it will have
        return Student(shape)
    rng = np.random.default_rng(0)
    some = rng.permutation(len(train))[:_CALIBRATION].tolist()
    encoder = student.config.encoder
    silence = torch.from_numpy(Fbank(train.spec).pad_frame)
    batches = []
    for places in epoch_batches([train.frames(i) for i in some], [1.0] * len(some), 6000, seed=0):
        indices = [some[place] for place in places]
        batches.append(
            collate(
                [torch.from_numpy(train.features(i, rng)) for i in indices],
                [[] for _ in indices],
                indices,
                silence,
                multiple=encoder.subsampling,
                room=encoder.lookahead,
            )
        )
    return narrowed(student, units, batches)


def _origin(args: argparse.Namespace) -> str:
    """What the weights started from, for the model card: a name, never a path of this machine."""
    if args.from_teacher:
        origin = load_checkpoint(args.from_teacher).state.get("origin", {})
        source, what = origin.get("start", "an unknown encoder"), "a teacher fine-tuned from "
    else:
        source, what = args.start or args.whisper, ""
    if source is None:
        return "random weights"
    name = Path(source).name if Path(source).exists() else str(source)
    layers = f", layers {args.layers}" if args.layers else ""
    return f"{what}{name}{layers}" + (f", {args.ffn} units" if args.ffn else "")


def _check_terms(args: argparse.Namespace) -> None:
    """Before anything long."""
    if args.distil is None and (args.kd_text or args.kd_features or args.heads_first):
        raise DataError("--kd-text, --kd-features and --heads-first need --distil FOLDER")
    if (args.kd_beside is None) != (args.kd_lattice == 0 and args.kd_beside_ctc == 0):
        raise DataError(
            "--kd-beside CHECKPOINT goes with --kd-beside-ctc WEIGHT, --kd-lattice WEIGHT or both"
        )


def _distillation(args: argparse.Namespace, teacher: Posteriors | None) -> Distillation:
    """The weights, of which those of the folder are 0 without one."""
    spoken = teacher is not None and teacher.kept > 0
    if teacher is not None and not spoken and (args.kd_ctc or args.kd_text):
        raise DataError(
            f"{args.distil}: holds only what a published encoder gives out; leave --kd-ctc and "
            "--kd-text away"
        )
    return Distillation(
        ctc=(1.0 if args.kd_ctc is None else args.kd_ctc) if spoken else 0.0,
        delay=args.kd_delay,
        full_sum=args.kd_text,
        features=args.kd_features,
        metric=args.kd_metric,
        beside=args.kd_beside_ctc,
        lattice=args.kd_lattice,
    )


def _teachers(
    args: argparse.Namespace, tokenizer: Tokenizer, utterances: list[Utterance]
) -> tuple[Posteriors | None, Student | None]:
    """What `loquent distill` wrote, and the student beside; both with our vocabulary."""
    posteriors = beside = None
    other = None
    if args.distil:
        posteriors = Posteriors(args.distil)
        other = posteriors.tokenizer
        known = sum(posteriors.get(u) is not None for u in utterances)
        print(f"{args.distil.name}: the teacher has heard {known} of {len(utterances)} utterances")
        if not known:
            raise DataError(f"{args.distil}: has none of the utterances of --data")
        if args.kd_features and not posteriors.width:
            raise DataError(f"{args.distil}: without features; run `loquent distill --encoder`")
    if args.kd_beside:
        checkpoint = load_checkpoint(args.kd_beside)
        beside, other = checkpoint.student, checkpoint.tokenizer
        if args.kd_lattice and not beside.config.joiner_dim:
            raise DataError(f"{args.kd_beside}: has no transducer")
    if other is not None and other.model != tokenizer.model:
        raise DataError(
            "teacher and student have different subwords; give the student the teacher's: "
            "--tokens FOLDER/tokens.spm"
        )
    return posteriors, beside


def _run(args: argparse.Namespace) -> None:
    start_torch(args)
    _check_terms(args)
    utterances, weights, names = read_shares(args.data, args.exclude_licence)
    dev_rows = read_manifest(args.dev)
    if not utterances or not dev_rows:
        raise DataError("no usable utterance is left to train on, or none in --dev")
    print("\n".join(names))
    student, tokenizer = _initial(args, [u.text for u in utterances])
    teacher, beside = _teachers(args, tokenizer, utterances)
    distil = _distillation(args, teacher)
    spec = whisper_spec()
    cache = args.features or args.run / "features"
    config = TrainConfig(
        **loop_settings(args),
        rnnt_from=args.rnnt_from,
        longest_until=args.longest_until,
        long_until=args.long_until,
        delay_penalty=args.delay_penalty,
        distil=distil,
        freezing=Freezing(front=front_frozen_until(args.freeze_front or "0")),
        augment=MASKS if args.waveforms else Augment(),
    )
    train: FeatureSource
    if args.waveforms:
        noises = [RecordedNoise(args.noise, spec.sample_rate)] if args.noise else []
        train = WaveformSource(utterances, spec, WaveAugment(), noises)
    else:
        train = FeatureCache(utterances, spec, cache)
    if args.ffn:
        student = _narrowed(student, args.ffn, train, args.run)
    if not (args.run / "last").exists():  # whose weights it will have
        if args.predictor_from:
            _take_predictor(student, tokenizer, args.predictor_from)
        if args.heads_first and teacher is not None:
            learn_heads(
                student,
                teacher,
                utterances,
                [tokenizer.encode(u.text) for u in utterances],
                steps=args.heads_first,
                seed=args.seed,
                trained_predictor=args.predictor_from is not None,
                bf16=not args.fp32,
            )
    trainer = Trainer(
        args.run,
        student,
        tokenizer,
        train,
        FeatureCache(dev_rows, spec, cache),
        weights,
        config,
        {
            "data": names,
            "excluded_licences": args.exclude_licence,
            "start": _origin(args),
            **({"teacher": teacher.about} if teacher else {}),
        },
        noise=FeatureCache(read_manifest(args.noise, labelled=False), spec, cache)
        if args.noise and not args.waveforms
        else None,
        teacher=teacher,
        beside=beside,
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
