"""``loquent evaluate``: word and character error rates, measured by streaming.

Every clip goes chunk by chunk through the ONNX engine, exactly as a server would do it; clips run
side by side as a batch of streams of different ages.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from loquent.engine.audio import load_audio
from loquent.engine.bundle import DECODERS, Bundle
from loquent.engine.errors import LoquentError
from loquent.engine.events import Final
from loquent.engine.recognizer import Recognizer
from loquent.engine.stream import Stream
from loquent.models.data import DataError, Utterance, read_manifest
from loquent.models.scoring import Score

_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Result:
    """Scores of one bundle, decoder and chunk size, by source."""

    bundle: str
    precision: str
    decoder: str
    chunk_ms: float
    scores: dict[str, Score]

    @property
    def total(self) -> Score:
        """All sources together."""
        return sum(self.scores.values(), Score())


class _Clip:
    """A recording on its way through a stream."""

    def __init__(self, index: int, stream: Stream, pcm: NDArray[np.float32]) -> None:
        self.index, self.stream, self.pcm = index, stream, pcm
        self.sent = 0

    def feed(self) -> None:
        """Give the stream as much as it wants."""
        while self.stream.wants_audio and self.sent < len(self.pcm):
            self.stream.accept(self.pcm[self.sent : self.sent + self.stream.sample_rate])
            self.sent += self.stream.sample_rate
        if self.sent >= len(self.pcm):
            self.stream.finish()


def transcribe_all(
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    *,
    decoder: str,
    chunk_ms: float,
    batch: int = _BATCH,
) -> list[str]:
    """Transcripts of clips, streamed ``batch`` at a time; a free place is filled at once."""
    texts = [""] * len(utterances)
    waiting = iter(range(len(utterances)))
    running: list[_Clip] = []
    with tqdm(total=len(utterances), unit="clip", leave=False) as bar:
        bar.set_description(f"{decoder} {chunk_ms:g} ms")
        while True:
            while len(running) < batch and (i := next(waiting, None)) is not None:
                stream = recognizer.stream(decoder=decoder, chunk_ms=chunk_ms)
                pcm = load_audio(utterances[i].audio, sample_rate=recognizer.bundle.sample_rate)
                running.append(_Clip(i, stream, pcm))
            if not running:
                return texts
            for clip in running:
                clip.feed()
            recognizer.step([clip.stream for clip in running])
            for clip in running:
                finals = [e.text for e in clip.stream.events() if isinstance(e, Final)]
                texts[clip.index] = " ".join([texts[clip.index], *finals]).strip()
            bar.update(sum(clip.stream.done for clip in running))
            running = [clip for clip in running if not clip.stream.done]


def evaluate(
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    *,
    decoder: str,
    chunk_ms: float,
    batch: int = _BATCH,
) -> Result:
    """Score one bundle with one decoder at one chunk size."""
    texts = transcribe_all(recognizer, utterances, decoder=decoder, chunk_ms=chunk_ms, batch=batch)
    scores: dict[str, Score] = {}
    for utterance, text in zip(utterances, texts, strict=True):
        score = Score.of(utterance.text, text)
        scores[utterance.source] = scores.get(utterance.source, Score()) + score
    bundle = recognizer.bundle
    return Result(
        bundle=bundle.name,
        precision=bundle.precision,
        decoder=decoder,
        chunk_ms=chunk_ms,
        scores=scores,
    )


def table(results: Sequence[Result]) -> str:
    """Markdown: a row per setting, WER / CER in percent per source."""
    sources = sorted({s for r in results for s in r.scores})
    lines = [
        "| precision | decoder | chunk ms | " + " | ".join(sources) + " | all |",
        "|---" * (len(sources) + 4) + "|",
    ]
    for r in results:
        cells = [r.scores[s] for s in sources] + [r.total]
        numbers = " | ".join(f"{100 * c.wer:.1f} / {100 * c.cer:.1f}" for c in cells)
        lines.append(f"| {r.precision} | {r.decoder} | {r.chunk_ms:g} | {numbers} |")
    return "\n".join(lines)


def as_json(results: Sequence[Result]) -> str:
    """One JSON line with every number of :func:`table`."""
    rows = [
        {
            "precision": r.precision,
            "decoder": r.decoder,
            "chunk_ms": r.chunk_ms,
            "wer": round(r.total.wer, 5),
            "cer": round(r.total.cer, 5),
            "sources": {
                name: {"wer": round(s.wer, 5), "cer": round(s.cer, 5), "words": s.words}
                for name, s in sorted(r.scores.items())
            },
        }
        for r in results
    ]
    return json.dumps({"results": rows})


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="loquent evaluate", description=__doc__)
    parser.add_argument("manifest", type=Path, help="JSONL with audio, text, duration, source")
    parser.add_argument(
        "--bundle", action="append", metavar="BUNDLE", help="name, folder or tar; may be repeated"
    )
    parser.add_argument(
        "--chunk-ms", type=float, action="append", help="may be repeated (default: all it offers)"
    )
    parser.add_argument("--decoder", choices=DECODERS, action="append", help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=_BATCH, help="clips side by side")
    args = parser.parse_args(argv)
    try:
        utterances = read_manifest(args.manifest)
        if not utterances:
            raise DataError(f"{args.manifest}: no usable row")
        results: list[Result] = []
        for source in args.bundle or ["en"]:
            recognizer = Recognizer.load(source, threads=args.threads)
            bundle: Bundle = recognizer.bundle
            for decoder in args.decoder or bundle.decoders:
                for chunk_ms in args.chunk_ms or bundle.chunks_ms:
                    result = evaluate(
                        recognizer,
                        utterances,
                        decoder=decoder,
                        chunk_ms=chunk_ms,
                        batch=args.batch,
                    )
                    results.append(result)
                    print(
                        f"{bundle.precision} {decoder} {chunk_ms:g} ms: "
                        f"WER {100 * result.total.wer:.1f} %",
                        file=sys.stderr,
                    )
    except (LoquentError, DataError) as error:
        parser.exit(1, f"loquent evaluate: {error}\n")
    print(table(results))
    print(as_json(results))
    return 0
