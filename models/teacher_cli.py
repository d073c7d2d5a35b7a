"""``loquent train teacher``: a pretrained speech encoder learns to write this data's text."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loquent.engine.features import whisper_spec
from loquent.models.data import DataError, FeatureCache, read_manifest
from loquent.models.loop import Freezing, LoopConfig
from loquent.models.options import (
    RESUMES,
    about,
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
from loquent.models.pretrained import (
    Pretrained,
    PretrainedTrainer,
    load_encoder,
)
from loquent.models.teacher import (
    freezing_policy,
    is_whisper,
    replay_share,
    source_name,
    whisper_teacher,
)
from loquent.models.training import WHOLE, TrainConfig, Trainer
from loquent.models.whisper import load_whisper


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loquent train teacher", description=__doc__, epilog=RESUMES
    )
    parser.add_argument(
        "--teacher",
        required=True,
        metavar="SOURCE",
        help="hub id or folder of a Whisper, wav2vec 2.0, XLS-R, MMS, HuBERT or WavLM model, or a "
        "Whisper's CTranslate2 model.bin",
    )
    add_data_options(parser)
    add_token_options(parser)
    parser.add_argument(
        "--replay",
        action="append",
        default=[],
        type=Path,
        metavar="MANIFEST",
        help="labelled speech of the languages that the encoder must not forget",
    )
    parser.add_argument(
        "--replay-part", type=float, default=0.1, help="of what is heard (default %(default)s)"
    )
    parser.add_argument(
        "--language-adapter",
        metavar="LANG",
        help="of an MMS model: the adapter to start from, or `new`; then only adapters and head "
        "learn",
    )
    add_loop_options(parser, steps=6000, batch_seconds=60.0, lr=1e-4, head_lr=1e-3)
    group = parser.add_argument_group("freezing", "by default it follows from the hours of --data")
    group.add_argument(
        "--freeze-encoder", type=int, metavar="STEPS", help="the head learns alone until then"
    )
    add_front_option(group)
    group.add_argument(
        "--freeze-layers", type=int, metavar="N", help="the lowest N layers never learn"
    )
    return parser


def _freezing(args: argparse.Namespace, hours: float, layers: int) -> Freezing:
    chosen = freezing_policy(hours, layers, args.steps)
    changes: dict[str, Any] = {}
    if args.freeze_encoder is not None:
        changes["encoder"] = args.freeze_encoder
    if args.freeze_layers is not None:
        changes["layers"] = args.freeze_layers
    if args.freeze_front is not None:
        changes["front"] = front_frozen_until(args.freeze_front)
    return dataclasses.replace(chosen, **changes)


def _run(args: argparse.Namespace) -> None:
    start_torch(args)
    utterances, weights, names = read_shares(args.data, args.exclude_licence)
    dev_rows = read_manifest(args.dev)
    if not utterances or not dev_rows:
        raise DataError("no usable utterance is left to train on, or none in --dev")
    hours = sum(u.duration * w for u, w in zip(utterances, weights, strict=True)) / 3600
    replayed = {
        path: read_manifest(path, exclude_licences=args.exclude_licence) for path in args.replay
    }
    replay_hours = sum(u.duration for rows in replayed.values() for u in rows) / 3600
    share = replay_share(hours, replay_hours, args.replay_part)
    for path, rows in replayed.items():
        utterances += rows
        weights += [share] * len(rows)
        names.append(f"replay {about(path, rows, share)}")
    print("\n".join(names))
    tokenizer = subwords(args, [u.text for u in utterances])
    origin = {
        "data": names,
        "excluded_licences": args.exclude_licence,
        "start": source_name(args.teacher),
    }
    trainer: Trainer | PretrainedTrainer
    if is_whisper(args.teacher):
        if args.language_adapter:
            raise DataError("--language-adapter: a Whisper has none")
        teacher = whisper_teacher(load_whisper(args.teacher), tokenizer.size)
        freezing = _freezing(args, hours, teacher.config.encoder.emformer.layers)
        spec = whisper_spec()
        cache = args.features or args.run / "features"
        noise = read_manifest(args.noise, labelled=False) if args.noise else []
        trainer = Trainer(
            args.run,
            teacher,
            tokenizer,
            FeatureCache(utterances, spec, cache),
            FeatureCache(dev_rows, spec, cache),
            weights,
            TrainConfig(
                **loop_settings(args),
                freezing=freezing,
                segments=((WHOLE, 1.0),),
                right_contexts=((0, 1.0),),
                watch=(WHOLE, 0),
                drop_above=1e6,  # a new head finds every label far off
            ),
            origin,
            noise=FeatureCache(noise, spec, cache) if noise else None,
        )
    else:
        if args.noise:
            raise DataError("--noise: is added to Whisper's features only")
        model, normalise = load_encoder(args.teacher, adapter=args.language_adapter)
        freezing = _freezing(args, hours, model.config.num_hidden_layers)
        if args.language_adapter:
            freezing = dataclasses.replace(freezing, adapters_only=True)
        trainer = PretrainedTrainer(
            args.run,
            Pretrained(model, tokenizer.size, normalise=normalise),
            tokenizer,
            utterances,
            dev_rows,
            weights,
            LoopConfig(**loop_settings(args), freezing=freezing),
            origin,
        )
    print(f"{hours:.2f} h a pass; {freezing}")
    trainer.fit()
    print(json.dumps({"run": str(args.run), **vars(trainer.progress)}))


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    return guarded(parser, lambda: _run(args))
