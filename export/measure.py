"""``loquent measure``: the tables behind what is said of endpoints, long streams and training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from loquent.engine.errors import LoquentError
from loquent.engine.recognizer import DEFAULT_CHUNK_MS, Recognizer
from loquent.export import hours, long, runs, stability
from loquent.models.checkpoint import CheckpointError
from loquent.models.data import DataError, read_manifest

_STABILITIES = (0.0, 1.0, 0.5, 0.2)


def _endpoints(argv: Sequence[str]) -> None:
    parser = _parser("endpoints", long.__doc__)
    parser.add_argument("--clips", type=int, default=12, help="in one recording (default: 12)")
    args = parser.parse_args(argv)
    recognizer = Recognizer.load(args.bundle)
    utterances = read_manifest(args.manifest)[: args.limit]
    rate = recognizer.bundle.sample_rate
    recordings = long.join(utterances, sample_rate=rate, clips=args.clips, seed=args.seed)
    minutes = sum(len(r.pcm) for r in recordings) / rate / 60
    print(f"{len(utterances)} clips in {len(recordings)} recordings, {minutes:.0f} minutes")
    variants = [*long.VARIANTS, *(long.VAD_VARIANTS if find_spec("silero_vad") else ())]
    # Alone: every clip its own recording, with the same pause behind it.
    apart = long.join(utterances, sample_rate=rate, clips=1, seed=args.seed)
    chunk_ms = args.chunk_ms
    for decoder in args.decoder or [recognizer.bundle.default_decoder]:
        alone = long.compare(
            recognizer, apart, [long.VARIANTS[0]], decoder=decoder, chunk_ms=chunk_ms
        )
        rows = [("every clip apart", alone[0][1])]
        rows += long.compare(recognizer, recordings, variants, decoder=decoder, chunk_ms=chunk_ms)
        print(f"\n{decoder}, chunks of {chunk_ms:g} ms\n\n{long.table(rows)}")
        print(json.dumps({"decoder": decoder, "rows": {name: asdict(t) for name, t in rows}}))


def _hours(argv: Sequence[str]) -> None:
    parser = _parser("hours", hours.__doc__)
    parser.add_argument("--hours", type=float, default=8.0, help="of audio (default: 8)")
    parser.add_argument("--parts", type=int, default=40, help="to hear again (default: 40)")
    parser.add_argument("--vad", choices=["silero"])
    args = parser.parse_args(argv)
    recognizer = Recognizer.load(args.bundle)
    rate = recognizer.bundle.sample_rate
    recordings = long.join(
        read_manifest(args.manifest)[: args.limit], sample_rate=rate, seed=args.seed
    )
    for decoder in args.decoder or [recognizer.bundle.default_decoder]:
        run = hours.listen(
            recognizer,
            [recording.pcm for recording in recordings],
            hours=args.hours,
            decoder=decoder,
            chunk_ms=args.chunk_ms,
            vad=args.vad,
            parts=args.parts,
        )
        print(f"\n{decoder}, chunks of {args.chunk_ms:g} ms\n\n{hours.table(run)}")
        print(json.dumps({"decoder": decoder, "run": asdict(run)}))


def _stability(argv: Sequence[str]) -> None:
    parser = _parser("stability", stability.__doc__)
    parser.add_argument("--stability", type=float, action="append", help="may be repeated")
    args = parser.parse_args(argv)
    recognizer = Recognizer.load(args.bundle)
    utterances = read_manifest(args.manifest)[: args.limit]
    settings = [
        (decoder, seconds)
        for decoder in args.decoder or recognizer.bundle.decoders
        for seconds in ([0.0] if decoder in ("rnnt", "ctc") else args.stability or _STABILITIES)
    ]
    rows = [
        stability.measure(
            recognizer, utterances, decoder=decoder, chunk_ms=args.chunk_ms, stability=seconds
        )
        for decoder, seconds in settings
    ]
    print(f"chunks of {args.chunk_ms:g} ms\n\n{stability.table(rows)}")
    print(json.dumps({"rows": [asdict(row) for row in rows]}))


def _runs(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="loquent measure runs", description=runs.__doc__)
    parser.add_argument("manifest", type=Path, help="JSONL with audio, text, duration, source")
    parser.add_argument("run", type=Path, nargs="+", help="of `loquent train`")
    parser.add_argument("--features", type=Path, required=True, help="folder of the feature cache")
    parser.add_argument(
        "--segment", type=int, default=32, help="feature frames of 10 ms, 0: all (%(default)s)"
    )
    parser.add_argument("--right-context", type=int, default=4, help="(default %(default)s)")
    args = parser.parse_args(argv)
    rows = runs.compare(
        args.run,
        read_manifest(args.manifest),
        args.features,
        segment=args.segment,
        right_context=args.right_context,
    )
    print(runs.table(rows))
    print(json.dumps({"runs": [asdict(row) for row in rows]}))


TABLES: Mapping[str, Callable[[Sequence[str]], None]] = {
    "stability": _stability,
    "endpoints": _endpoints,
    "hours": _hours,
    "runs": _runs,
}


def _parser(name: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"loquent measure {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("manifest", type=Path, help="JSONL with audio, text, duration, source")
    parser.add_argument("--bundle", default="en", help="name, folder or tar (default: en)")
    parser.add_argument("--decoder", action="append", help="may be repeated")
    parser.add_argument("--chunk-ms", type=float, default=DEFAULT_CHUNK_MS)
    parser.add_argument("--limit", type=int, help="use the first so many clips only")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="loquent measure", description=__doc__)
    parser.add_argument("table", choices=TABLES, help="what to measure")
    args = parser.parse_args(argv[:1])
    try:
        TABLES[args.table](argv[1:])
    except (LoquentError, DataError, CheckpointError) as error:
        parser.exit(1, f"loquent measure: {error}\n")
    return 0
