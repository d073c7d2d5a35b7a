"""``loquent evaluate``: error rates with confidence intervals, measured by streaming.

Every clip goes chunk by chunk through the ONNX engine, exactly as a server would do it. Noise can
be mixed in, the delay of words measured, and other recognisers run on the same clips.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from loquent.engine.audio import load_audio
from loquent.engine.bundle import DECODERS
from loquent.engine.errors import LoquentError
from loquent.engine.recognizer import Recognizer
from loquent.export.bench import time_decoders
from loquent.export.card import write_card
from loquent.export.channel import CHANNELS, through
from loquent.export.emission import DelayMeter
from loquent.export.kept import Kept, identity
from loquent.export.peers import Peer, open_peers
from loquent.export.results import (
    CLEAN,
    Line,
    Result,
    as_dicts,
    cost_table,
    delay_table,
    entity_table,
    speed_table,
    table,
    write_lines,
)
from loquent.export.streaming import BATCH, Said, stream_all
from loquent.models.align import AlignmentError
from loquent.models.checkpoint import CheckpointError
from loquent.models.data import DataError, Utterance, read_manifest, refuse_overwriting
from loquent.models.noise import Noise, mix, open_noise

Float32 = NDArray[np.float32]
# Measured steps by number of streams.
SPEED_STEPS = {1: 100, 16: 30}
_SCORED = "expected text without digits (it does not say how they are read) and at most 30 s"


class Clips:
    """The audio of a set of utterances, read once, with or without noise.

    Args:
        utterances: the clips.
        noise: where noise comes from, if any is mixed in.
        snr_db: how far it is below the speech. The same clip gets the same noise every time.
        quieter_db: by which the clips are quieter, as 16-bit samples.
        lead: seconds of silence in front of them, as a stream has before somebody speaks.
        channel: of :mod:`loquent.export.channel`, which they have gone through.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        noise: Noise | None = None,
        snr_db: float = 0.0,
        *,
        quieter_db: float = 0.0,
        lead: float = 0.0,
        channel: str = "",
    ) -> None:
        self.utterances = utterances
        self.noise, self.snr_db, self.quieter_db = noise, snr_db, quieter_db
        self.lead, self.channel = lead, channel
        self.label = channel or (CLEAN if noise is None else f"{snr_db:g} dB")
        if quieter_db:
            self.label = f"{quieter_db:g} dB quieter"
        if lead:
            self.label = f"{lead:g} s later"
        self.seconds = sum(u.duration + lead for u in utterances)
        self.reading = 0.0  # processor seconds spent here, which are not the recogniser's

    def get(self, i: int, sample_rate: int = 16000) -> Float32:
        """Samples of clip ``i``."""
        before = time.process_time()
        pcm = load_audio(self.utterances[i].audio, sample_rate=sample_rate)
        if self.noise is not None:
            name = self.utterances[i].audio.name.encode()
            pcm = mix(
                pcm, self.noise.draw(len(pcm), np.random.default_rng(zlib.crc32(name))), self.snr_db
            )
        if self.channel:
            pcm = through(self.channel, pcm, sample_rate)
        if self.quieter_db:
            pcm = (np.round(32768 * 10 ** (-self.quieter_db / 20) * pcm) / 32768).astype(np.float32)
        if self.lead:
            pcm = np.pad(pcm, (round(self.lead * sample_rate), 0))
        self.reading += time.process_time() - before
        return pcm


def transcribe_all(
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    *,
    decoder: str,
    chunk_ms: float,
    batch: int = BATCH,
) -> list[str]:
    """Transcripts of clips, streamed ``batch`` at a time."""
    clips = Clips(utterances)
    said = _stream(recognizer, clips, decoder=decoder, chunk_ms=chunk_ms, batch=batch)
    return [" ".join(word.text for word in words) for words in said]


def _stream(
    recognizer: Recognizer,
    clips: Clips,
    *,
    decoder: str,
    chunk_ms: float,
    right_context_ms: float | None = None,
    batch: int,
) -> list[list[Said]]:
    rate = recognizer.bundle.sample_rate

    def reader(i: int) -> Callable[[], Float32]:
        return lambda: clips.get(i, rate)

    audio = [reader(i) for i in range(len(clips.utterances))]
    return stream_all(
        recognizer,
        audio,
        decoder=decoder,
        chunk_ms=chunk_ms,
        right_context_ms=right_context_ms,
        batch=batch,
    )


def evaluate(
    recognizer: Recognizer,
    clips: Sequence[Utterance] | Clips,
    *,
    decoder: str,
    chunk_ms: float,
    right_context_ms: float | None = None,
    batch: int = BATCH,
    delays: DelayMeter | None = None,
) -> Result:
    """Score one bundle with one decoder at one chunk size."""
    if not isinstance(clips, Clips):
        clips = Clips(clips)
    before, reading = time.process_time(), clips.reading
    said = _stream(
        recognizer,
        clips,
        decoder=decoder,
        chunk_ms=chunk_ms,
        right_context_ms=right_context_ms,
        batch=batch,
    )
    cpu = time.process_time() - before - (clips.reading - reading)
    bundle = recognizer.bundle
    return Result(
        bundle=bundle.name,
        precision=bundle.precision,
        decoder=decoder,
        chunk_ms=chunk_ms,
        noise=clips.label,
        lines=tuple(
            Line.of(utterance, " ".join(word.text for word in words))
            for utterance, words in zip(clips.utterances, said, strict=True)
        ),
        cpu_seconds=cpu,
        audio_seconds=clips.seconds,
        # The words of clips that begin later are later than the transcript's alignment.
        delays=delays.measure(said) if delays and not clips.lead else (),
    )


def evaluate_peer(name: str, peer: Peer, clips: Clips) -> Result:
    """Score another recogniser, one clip at a time."""
    lines: list[Line] = []
    before, reading = time.process_time(), clips.reading
    for i, utterance in enumerate(
        tqdm(clips.utterances, unit="clip", leave=False, disable=None, desc=name)
    ):
        lines.append(Line.of(utterance, peer(clips.get(i))))
    return Result(
        bundle=name,
        noise=clips.label,
        lines=tuple(lines),
        cpu_seconds=time.process_time() - before - (clips.reading - reading),
        audio_seconds=clips.seconds,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loquent evaluate",
        description=__doc__,
        epilog="Examples: `loquent evaluate dev.jsonl --chunk-ms 320`; `... --snr 20 --snr 5 "
        "--noise babble`; `... --peers pocketsphinx,whisper-tiny --whisper-tiny DIR`; "
        "`... --quieter 30`; `... --delay --card BUNDLE`.",
    )
    parser.add_argument("manifest", type=Path, help="JSONL with audio, text, duration, source")
    parser.add_argument(
        "--bundle", action="append", metavar="BUNDLE", help="name, folder or tar; may be repeated"
    )
    parser.add_argument(
        "--chunk-ms", type=float, action="append", help="may be repeated (default: all it offers)"
    )
    parser.add_argument(
        "--right-context-ms", type=float, metavar="N", help="default: as the bundle says"
    )
    parser.add_argument("--decoder", choices=DECODERS, action="append", help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--batch",
        type=int,
        help=f"clips side by side (default {BATCH}; 1 with --peers, who take one at a time)",
    )
    parser.add_argument(
        "--by",
        action="append",
        metavar="FIELD",
        help="a table by this field of the manifest: speaker, accent (default: source)",
    )
    noise = parser.add_argument_group("noise")
    noise.add_argument(
        "--snr",
        type=float,
        action="append",
        default=[],
        metavar="DB",
        help="also with noise this far below the speech; may be repeated",
    )
    noise.add_argument(
        "--noise",
        default="babble",
        metavar="KIND|PATH",
        help="babble, white, pink, brown, or a folder or JSONL manifest of recordings "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--quieter",
        type=float,
        action="append",
        default=[],
        metavar="DB",
        help="also with the clips so much quieter, as a microphone at a low gain gives them; may "
        "be repeated",
    )
    parser.add_argument(
        "--lead",
        type=float,
        action="append",
        default=[],
        metavar="SECONDS",
        help="also with so much silence in front of each clip, as a stream has before somebody "
        "speaks; may be repeated",
    )
    parser.add_argument(
        "--channel",
        choices=tuple(CHANNELS),
        action="append",
        default=[],
        help="also with the clips through a telephone, or a bright or dull microphone; may be "
        "repeated",
    )
    parser.add_argument(
        "--speed",
        action="store_true",
        help="time a chunk of 1 and 16 streams with each decoder, which take turns",
    )
    delay = parser.add_argument_group("delay of words")
    delay.add_argument(
        "--delay", action="store_true", help="measure it against forced alignment of the transcript"
    )
    delay.add_argument(
        "--aligner",
        metavar="MODEL",
        help="bundle or checkpoint that aligns (default: the bundle itself)",
    )
    peers = parser.add_argument_group("other recognisers on the same clips")
    peers.add_argument(
        "--peers",
        default="",
        metavar="NAMES",
        help="separated by commas: pocketsphinx, whisper-tiny, whisper-base, whisper-tiny-int8, "
        "whisper-base-int8",
    )
    peers.add_argument(
        "--peers-in-noise",
        action="store_true",
        help="they hear the clips with noise, too (default: the clean ones only)",
    )
    for size in ("tiny", "base"):
        peers.add_argument(
            f"--whisper-{size}", metavar="DIR", help="CTranslate2 model with tokenizer.json"
        )
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print one line of JSON and no tables")
    out.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="keep every finished setting here: the same command goes on where it was killed, and "
        "other recognisers need not hear the same clips twice",
    )
    out.add_argument(
        "--lines", type=Path, metavar="FILE", help="what was heard in each clip, JSONL"
    )
    out.add_argument(
        "--card",
        type=Path,
        metavar="PATH",
        help="write a model card: a Markdown file, or a bundle's folder, which gets a README.md "
        "and the scores in its manifest",
    )
    out.add_argument(
        "--about", type=Path, metavar="FILE", help="Markdown to stand at the head of the card"
    )
    return parser


def _run(args: argparse.Namespace) -> tuple[list[Result], list[str]]:
    if args.lines:
        refuse_overwriting(args.lines, [args.manifest])
    utterances = read_manifest(args.manifest)
    rows = sum(bool(line.strip()) for line in args.manifest.read_text("utf-8").split("\n"))
    if not utterances:
        raise DataError(f"{args.manifest}: no usable row of {rows}; {_SCORED}")
    if left_out := rows - len(utterances):
        print(f"{args.manifest}: {left_out} of {rows} rows left out: {_SCORED}", file=sys.stderr)
    folders = {"whisper-tiny": args.whisper_tiny, "whisper-base": args.whisper_base}
    peers = open_peers(args.peers, {name: path for name, path in folders.items() if path})
    conditions = [Clips(utterances)]
    if args.snr:
        noise = open_noise(args.noise)
        conditions += [Clips(utterances, noise, snr) for snr in args.snr]
    for level in args.quieter:
        if not 0 < level <= 100:
            raise DataError(f"got --quieter {level:g}, expected more than 0 and at most 100 dB")
        conditions.append(Clips(utterances, quieter_db=level))
    for lead in args.lead:
        if not 0 < lead <= 60:
            raise DataError(f"got --lead {lead:g}, expected more than 0 and at most 60 seconds")
        conditions.append(Clips(utterances, lead=lead))
    conditions += [Clips(utterances, channel=name) for name in args.channel]
    batch = args.batch or (1 if peers else BATCH)
    kept = Kept(args.resume)
    sources = args.bundle or ["en"]
    results: list[Result] = []

    def note(result: Result) -> None:
        results.append(result)
        setting = " ".join(
            part
            for part in (
                result.bundle,
                result.precision,
                result.decoder,
                f"{result.chunk_ms:g} ms" if result.chunk_ms else "",
                result.noise if result.noise != CLEAN else "",
            )
            if part
        )
        print(f"{setting}: WER {100 * result.total.wer:.1f} %", file=sys.stderr)

    for source in sources:
        recognizer = Recognizer.load(source, threads=args.threads)
        bundle = recognizer.bundle
        meter = DelayMeter(args.aligner or source, utterances) if args.delay else None
        decoders, chunks = args.decoder or bundle.decoders, args.chunk_ms or bundle.chunks_ms
        speeds = _speeds(recognizer, decoders, chunks) if args.speed else {}
        for clips in conditions:
            for decoder, chunk_ms in itertools.product(decoders, chunks):
                key = {
                    **_condition(clips, args),
                    "bundle": identity(bundle),
                    "decoder": decoder,
                    "chunk_ms": chunk_ms,
                    "right_context_ms": args.right_context_ms,
                    "batch": batch,
                    "delays": args.aligner or args.delay,
                }
                measure = partial(
                    evaluate,
                    recognizer,
                    clips,
                    decoder=decoder,
                    chunk_ms=chunk_ms,
                    right_context_ms=args.right_context_ms,
                    batch=batch,
                    delays=meter,
                )
                found = kept.result(key, utterances, measure)
                steps_ms = speeds.get((decoder, chunk_ms), {})
                note(dataclasses.replace(found, steps_ms=steps_ms))
    for name, peer in peers.items():
        for clips in conditions if args.peers_in_noise else conditions[:1]:
            key = {**_condition(clips, args), "peer": name, "model": folders.get(name)}
            note(kept.result(key, utterances, partial(evaluate_peer, name, peer, clips)))
    return results, sources


def _condition(clips: Clips, args: argparse.Namespace) -> dict[str, object]:
    return {"noise": clips.label, "from": "" if clips.noise is None else str(args.noise)}


def _speeds(
    recognizer: Recognizer, decoders: Sequence[str], chunks_ms: Sequence[float]
) -> dict[tuple[str, float], dict[int, float]]:
    """Processor milliseconds of a step by decoder and chunk size, and by number of streams."""
    found: dict[tuple[str, float], dict[int, float]] = {}
    for chunk_ms in chunks_ms:
        for batch, steps in SPEED_STEPS.items():
            times = time_decoders(
                recognizer, decoders=decoders, chunk_ms=chunk_ms, batch=batch, steps=steps
            )
            for decoder, ms in times.items():
                found.setdefault((decoder, chunk_ms), {})[batch] = ms
    return found


def _tables(results: Sequence[Result], by: Sequence[str], *, costs: bool) -> str:
    parts = ["WER ± half of its 95 % interval / CER, percent:"]
    for name in by:
        parts += [f"by {name}:"] if len(by) > 1 else []
        parts.append(table(results, name))
    if entities := entity_table(results):
        parts.append(entities)
    if costs:
        parts.append(cost_table(results))
    if speeds := speed_table(results):
        parts += ["Processor time of a chunk, and beside that of greedy RNN-T:", speeds]
    if delays := delay_table(results):
        parts += ["From the end of a word, by forced alignment, to its caption:", delays]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    by = args.by or ["source"]
    try:
        results, sources = _run(args)
        if args.card:
            write_card(args.card, results, sources[0], args.manifest.name, args.about)
        if args.lines:
            write_lines(results, args.lines)
    except (AlignmentError, CheckpointError, LoquentError, DataError, OSError) as error:
        parser.exit(1, f"loquent evaluate: {error}\n")
    if not args.json:
        print(_tables(results, by, costs=bool(args.peers)))
        print()
    print(json.dumps({"results": as_dicts(results, by)}, ensure_ascii=False))
    return 0
