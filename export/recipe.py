"""``loquent recipe``: from a folder of speech to an evaluated bundle, by the public commands.

A recipe is a Python function that gives the steps; each is a command that could be typed as well
(it is printed). What a step has finished is noted in RUN/steps, so a recipe that was killed goes on
where it was, and inside a step the command itself does.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loquent.export import cli as export_cli
from loquent.export import evaluate, neural, tune
from loquent.models import cli as train_cli
from loquent.models import datacli, distill, ngram

# `loquent NAME` -> what it runs; `lm neural` is the one name of two words.
PROGRAMS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "data": datacli.main,
    "train": train_cli.main,
    "distill": distill.main,
    "lm": lambda words: neural.main(words[1:]) if words[0] == "neural" else ngram.main(words),
    "export": export_cli.main,
    "tune": tune.main,
    "evaluate": evaluate.main,
}


@dataclass(frozen=True)
class Step:
    """A step of a recipe.

    Attributes:
        name: unique in the recipe.
        command: words behind ``loquent``.
        made: what it makes; a step whose result is gone is done again.
        may_fail: its exit status is a verdict that the user may overrule.
    """

    name: str
    command: tuple[str, ...]
    made: Path
    may_fail: bool = False


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything.

    Attributes:
        vocab: subwords.
        teacher_steps, student_steps: optimiser steps.
        batch_seconds: audio a batch.
        every: steps between evaluations and checkpoints.
        decay: last steps, in which the learning rate falls.
        words, least: of the word n-gram, see `loquent lm`.
        neural: steps of the recurrent word model and of its learning rate's fall, words that have
            a row in it, and its size.
        int8_max_loss: absolute WER that int8 may cost.
        tuning: rounds and draws of `loquent tune`.
        units: hidden units that the student keeps of each feed-forward module of its teacher
            (Whisper base has 2,048); 0: all.
        chunks_ms: chunk sizes that are evaluated.
        decoders: decoders that are evaluated; none: all.
    """

    vocab: int
    teacher_steps: int
    student_steps: int
    batch_seconds: float
    every: int
    decay: int
    words: int
    least: tuple[int, int]
    neural: tuple[int, int, int, int]
    int8_max_loss: float
    tuning: tuple[int, int]
    chunks_ms: tuple[int, ...]
    units: int = 0
    decoders: tuple[str, ...] = ()


SCALES = {
    "full": Scale(
        vocab=256,
        teacher_steps=6000,
        student_steps=12000,
        batch_seconds=60,
        every=500,
        decay=1500,
        words=30_000,
        least=(2, 3),
        neural=(8000, 4800, 20_000, 512),
        int8_max_loss=0.01,
        tuning=(4, 15),
        chunks_ms=(40, 80, 160, 320, 640, 1280),
        units=1024,
    ),
    # An evening of a laptop.
    "small": Scale(
        vocab=256,
        teacher_steps=400,
        student_steps=1000,
        batch_seconds=40,
        every=200,
        decay=300,
        words=30_000,
        least=(2, 3),
        neural=(2000, 1500, 20_000, 512),
        int8_max_loss=0.02,
        tuning=(1, 6),
        chunks_ms=(160, 320, 1280),
        units=1024,
        decoders=("joint",),
    ),
    "tiny": Scale(
        vocab=12,
        teacher_steps=3,
        student_steps=4,
        batch_seconds=8,
        every=2,
        decay=2,
        words=100,
        least=(1, 1),
        neural=(3, 2, 50, 16),
        int8_max_loss=1.0,
        tuning=(1, 5),
        chunks_ms=(320,),
        units=40,
        decoders=("joint",),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a recipe starts.

    Attributes:
        data: folder with ``LANG.train.jsonl``, ``LANG.dev.jsonl`` and, if there are such,
            ``LANG.synthetic.jsonl``, ``LANG.unlabelled.jsonl``, ``noise.jsonl``, ``text/LANG.*``.
        run: folder for everything that is made.
        teacher: pretrained encoder, see `loquent train teacher`.
        student: Whisper weights that the student starts from; None: layers of the teacher.
        exclude: parts of licences to leave out.
    """

    data: Path
    run: Path
    teacher: str = "openai/whisper-base"
    student: str | None = None
    exclude: tuple[str, ...] = ()


def _words(*plain: object, **options: object) -> tuple[str, ...]:
    """A command line: a list repeats its option, a tuple gives it several values, None omits it."""
    words = [str(word) for word in plain]
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                words += [option, *map(str, one if isinstance(one, tuple) else (one,))]
    return tuple(words)


def small(language: str, sources: Sources, scale: Scale) -> list[Step]:
    """A small streaming student with a word model, taught by a fine-tuned Whisper base."""
    data, run = sources.data, sources.run

    def given(name: str) -> Path | None:
        return data / name if (data / name).exists() else None

    train, dev = data / f"{language}.train.jsonl", data / f"{language}.dev.jsonl"
    synthetic = given(f"{language}.synthetic.jsonl")
    unlabelled = given(f"{language}.unlabelled.jsonl")
    texts = sorted((data / "text").glob(f"{language}.*"))
    teacher, student = run / "teacher", run / "student"
    heard, pseudo = run / "heard", run / "pseudo"
    guessed = pseudo / f"{language}.unlabelled.pseudo.jsonl" if unlabelled else None
    lm, bundle, beams = run / f"{language}.lm.npz", run / "bundle", run / "beams.json"
    corpus = [train, f"{synthetic}=0.5" if synthetic else None]
    common: dict[str, object] = {
        "features": run / "features",
        "exclude_licence": list(sources.exclude),
    }
    training: dict[str, object] = {
        "dev": dev,
        "noise": given("noise.jsonl"),
        "batch_seconds": scale.batch_seconds,
        "decay": scale.decay,
        "eval_every": scale.every,
        "save_every": scale.every,
        **common,
    }
    return [
        Step(
            "check",
            _words("data", "check", train=train, dev=dev, html=run / "data.html"),
            run / "data.html",
            may_fail=True,
        ),
        Step(
            "teacher",
            _words(
                *("train", "teacher"),
                teacher=sources.teacher,
                data=corpus,
                run=teacher,
                vocab=scale.vocab,
                steps=scale.teacher_steps,
                **training,
            ),
            teacher / "best",
        ),
        Step(
            "distill",
            _words(
                *("distill", teacher / "best"),
                output=heard,
                data=[train, synthetic],
                unlabelled=unlabelled,
                pseudo=pseudo if unlabelled else None,
                **common,
            ),
            guessed or heard / "index.jsonl",
        ),
        Step(
            "student",
            _words(
                *("train", "student"),
                whisper=sources.student,
                from_teacher=None if sources.student else teacher / "best",
                ffn=None if sources.student else scale.units or None,
                data=[*corpus, guessed],
                distil=heard,
                run=student,
                steps=scale.student_steps,
                **training,
            ),
            student / "last",
        ),
        Step(
            "lm",
            _words(
                *("lm", *texts, train),
                output=lm,
                words=scale.words,
                least=scale.least,
                exclude_licence=list(sources.exclude),
            ),
            lm,
        ),
        Step(
            "export",
            _words(
                *("export", student / "last", "--int8"),
                output=bundle,
                name=language,
                language=language,
                dev=dev,
                lm=lm,
                decoder="joint",
                # Longer than in training, and better for it: models/README.md.
                right_context_ms=240,
                int8_max_loss=scale.int8_max_loss,
            ),
            bundle / "manifest.json",
        ),
        Step(
            "neural",
            _words(
                *("lm", "neural", *texts, train, "--write"),
                bundle=bundle,
                dev=dev,
                run=run / "wordlm",
                exclude_licence=list(sources.exclude),
                steps=scale.neural[0],
                decay=scale.neural[1],
                words=scale.neural[2],
                hidden=scale.neural[3],
            ),
            run / "bundle" / neural.GRAPH,
        ),
        Step(
            "tune",
            _words(
                *("tune", dev, "--write"),
                bundle=bundle,
                decoder="joint",
                output=beams,
                rounds=scale.tuning[0],
                draws=scale.tuning[1],
            ),
            beams,
        ),
        Step(
            "evaluate",
            _words(
                *("evaluate", dev),
                bundle=bundle,
                card=bundle,
                chunk_ms=list(scale.chunks_ms),
                decoder=list(scale.decoders),
            ),
            bundle / "README.md",
        ),
    ]


def en_small(sources: Sources, scale: Scale) -> list[Step]:
    """The recipe of the English model."""
    return small("en", sources, scale)


RECIPES: Mapping[str, Callable[[Sources, Scale], list[Step]]] = {"en-small": en_small}


def follow(
    steps: Sequence[Step],
    notes: Path,
    *,
    overrule: bool = False,
    programs: Mapping[str, Callable[[Sequence[str]], int]] = PROGRAMS,
) -> int:
    """Do what is not done yet, in order; returns the exit status of the last command.

    Args:
        steps: of the recipe.
        notes: folder where it is noted what is done.
        overrule: go on where a step's verdict is no.
        programs: what each command runs.
    """
    notes.mkdir(parents=True, exist_ok=True)
    redo = False
    for number, step in enumerate(steps, 1):
        note = notes / f"{step.name}.json"
        head = f"[{number}/{len(steps)}] {step.name}"
        if not redo and _is_done(step, note):
            print(f"{head}: done")
            continue
        redo = True  # what follows was made from an older result
        note.unlink(missing_ok=True)
        print(f"{head}: loquent {shlex.join(step.command)}", flush=True)
        begun = time.monotonic()
        name, *words = step.command
        status = programs[name](words)
        if status and not (step.may_fail and overrule):
            said = "; --accept-data goes on all the same" if step.may_fail else ""
            print(f"loquent recipe: {step.name} ended with status {status}{said}", file=sys.stderr)
            return status
        took = round(time.monotonic() - begun, 1)
        partial = note.with_suffix(".part")
        partial.write_text(json.dumps({"command": step.command, "seconds": took}))
        partial.replace(note)
    return 0


def _is_done(step: Step, note: Path) -> bool:
    try:
        written = json.loads(note.read_text())
    except (OSError, ValueError):
        return False
    return written.get("command") == list(step.command) and step.made.exists()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="loquent recipe",
        description=__doc__,
        epilog="A killed recipe goes on where it was: give the same command again.",
    )
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--data", type=Path, required=True, help="folder of manifests")
    parser.add_argument("--run", type=Path, help="folder of the run (default: runs/RECIPE)")
    parser.add_argument("--scale", choices=SCALES, default="full", help="how much: %(choices)s")
    parser.add_argument(
        "--teacher", default=Sources.teacher, help="pretrained encoder (default %(default)s)"
    )
    parser.add_argument(
        "--student",
        help="Whisper weights that the student starts from (default: the teacher)",
    )
    parser.add_argument("--exclude-licence", action="append", default=[], metavar="TEXT")
    parser.add_argument(
        "--accept-data", action="store_true", help="go on even if `loquent data check` says no"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    args = parser.parse_args(argv)
    run = args.run or Path("runs") / args.recipe
    sources = Sources(
        data=args.data,
        run=run,
        teacher=args.teacher,
        student=args.student,
        exclude=tuple(args.exclude_licence),
    )
    steps = RECIPES[args.recipe](sources, SCALES[args.scale])
    if args.dry_run:
        for step in steps:
            print(f"loquent {shlex.join(step.command)}")
        return 0
    return follow(steps, run / "steps", overrule=args.accept_data)
