"""``loquent tune``: finds the weights of the beam searches on labelled recordings.

The encoder runs once; then each search decodes its output again and again with other weights, by
the cross-entropy method (Rubinstein, 1999): draw, keep the best fifth, draw around those. The
result is the mean of the last survivors, the middle of what works and not the luckiest draw.

Every other clip is tuned on; the table shows both halves, and the difference between them is what
tuning flatters itself by.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from loquent.engine.audio import load_audio
from loquent.engine.bundle import Bundle, DecoderName
from loquent.engine.decode.decoder import Job, Settings
from loquent.engine.decode.fusion import BEAM_WEIGHTS, BeamRules
from loquent.engine.decoders import DEFAULTS, Decoders
from loquent.engine.endpoint import Endpointer
from loquent.engine.errors import LoquentError
from loquent.engine.recognizer import DEFAULT_CHUNK_MS, Recognizer
from loquent.engine.stream import Stream
from loquent.engine.text import join_pieces
from loquent.export.bundle import update_manifest
from loquent.models.data import DataError, Utterance, read_manifest
from loquent.models.scoring import Score

Float32 = NDArray[np.float32]

BEAMS: tuple[DecoderName, ...] = ("joint", "rnnt-beam", "ctc-beam")
_BATCH = 16
_KEEP = 0.2
# Lowest, highest, and how far the first draws spread.
_RANGES: Mapping[str, tuple[float, float, float]] = {
    "ctc": (0.1, 0.9, 0.12),
    "lm_weight": (0.05, 1.2, 0.1),
    "own_weight": (0.0, 0.6, 0.08),
    "word_bonus": (-1.0, 4.0, 0.5),
    "unknown": (-16.0, -3.0, 1.5),
    "unknown_letter": (-4.0, 0.0, 0.7),
    "blank_penalty": (-1.0, 3.0, 0.4),
}
_UNUSED: Mapping[DecoderName, frozenset[str]] = {
    "joint": frozenset(),
    "rnnt-beam": frozenset({"ctc"}),
    "ctc-beam": frozenset({"ctc", "own_weight"}),
}


@dataclass(frozen=True, eq=False)
class Encoded:
    """A clip after the encoder: (K, ...) frames by head."""

    utterance: Utterance
    frames: Mapping[str, Float32]


def encode(recognizer: Recognizer, utterances: Sequence[Utterance]) -> list[Encoded]:
    """Run the encoder over clips as streams of the default chunk size would."""
    found = []
    for utterance in tqdm(utterances, unit="clip", desc="encoding", disable=None):
        stream = recognizer.stream(endpoint=None, decoder=recognizer.bundle.decoders[-1])
        pcm = load_audio(utterance.audio, sample_rate=recognizer.bundle.sample_rate)
        found.append(Encoded(utterance, _encode(recognizer, stream, pcm)))
    return found


def _encode(recognizer: Recognizer, stream: Stream, pcm: Float32) -> dict[str, Float32]:
    parts: list[dict[str, Float32]] = []
    sent, size = 0, stream.sample_rate
    while not stream.done:
        if sent < len(pcm):
            stream.accept(pcm[sent : sent + size])
            sent += size
        else:
            stream.finish()
        while stream.ready:
            if frames := recognizer.encode(stream):
                parts.append(frames)
    return {head: np.concatenate([part[head] for part in parts]) for head in parts[0]}


class Trials:
    """Decodes the same clips with one rule after the other.

    Args:
        bundle: for its language model and joiner.
        name: which search.
        clips: encoded.
        frames: of one chunk.
    """

    def __init__(
        self, bundle: Bundle, name: DecoderName, clips: Sequence[Encoded], frames: int
    ) -> None:
        self._decoders = Decoders(bundle, threads=1)
        self._bundle = bundle
        self._name = name
        self._clips = clips
        self._frames = frames

    def score(self, rules: BeamRules) -> Score:
        """Errors over all clips."""
        return sum(
            (
                Score.of(clip.utterance.text, text)
                for clip, text in zip(self._clips, self.texts(rules), strict=True)
            ),
            Score(),
        )

    def texts(self, rules: BeamRules) -> list[str]:
        """What is heard in each clip."""
        decoder = self._decoders.beam(self._name, rules)
        texts: list[str] = []
        for start in range(0, len(self._clips), _BATCH):
            clips = self._clips[start : start + _BATCH]
            searches = [decoder.start(Settings()) for _ in clips]
            ids: list[list[int]] = [[] for _ in clips]
            lengths = [len(next(iter(clip.frames.values()))) for clip in clips]
            for first in range(0, max(lengths), self._frames):
                rows = [i for i, length in enumerate(lengths) if first < length]
                span = slice(first, first + self._frames)
                jobs = [
                    Job(
                        searches[i],
                        {head: frames[span] for head, frames in clips[i].frames.items()},
                        first,
                        Endpointer(None, self._bundle.frame_seconds),
                    )
                    for i in rows
                ]
                for i, (said, search) in zip(rows, decoder.decode(jobs), strict=True):
                    searches[i] = search
                    ids[i] += [token.id for frame in said for token in frame.tokens]
            for tokens, search in zip(ids, searches, strict=True):
                tokens += [token.id for token in search.flush()]
                text = join_pieces([self._bundle.tokens[token] for token in tokens])
                texts.append(self._spelt(text))
        return texts

    def _spelt(self, text: str) -> str:
        """As a stream puts its words right: what it would not show is not to be judged."""
        if (speller := self._decoders.speller) is None:
            return text
        words: list[str] = []
        for word in text.split():
            words.append(speller.fix(word, tuple(words[-2:]), ()))
        return " ".join(words)


def tune(
    trials: Trials, start: BeamRules, names: Sequence[str], *, rounds: int, draws: int, seed: int
) -> BeamRules:
    """Weights near ``start`` that make few errors; see the module's head."""
    rng = np.random.default_rng(seed)
    low, high, spread = np.array([_RANGES[name] for name in names]).T
    mean = np.array([getattr(start, name) for name in names], float)
    survivors = mean[None]
    with tqdm(total=rounds * draws, unit="trial", desc="tuning", disable=None) as bar:
        for _ in range(rounds):
            points = np.clip(rng.normal(mean, spread, (draws, len(names))), low, high)
            points[0] = mean
            costs = []
            for point in points:
                score = trials.score(_rules(start, names, point))
                # Characters tell apart what makes the same errors in words.
                costs.append(score.wer + score.cer / 2)
                bar.update()
            best = np.argsort(costs)[: max(2, round(_KEEP * draws))]
            survivors = points[best]
            bar.set_postfix(best=f"{min(costs):.4f}")
            mean, spread = survivors.mean(axis=0), survivors.std(axis=0) + 0.4 * spread
    return _rules(start, names, survivors.mean(axis=0))


def _rules(start: BeamRules, names: Sequence[str], point: NDArray[np.float64]) -> BeamRules:
    return replace(start, **dict(zip(names, np.round(point, 3).tolist(), strict=True)))


def as_fields(rules: BeamRules) -> dict[str, float]:
    """What a manifest holds of them."""
    values = asdict(rules)
    return {name: values[name] for name in ("beam", *BEAM_WEIGHTS)}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="loquent tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("manifest", type=Path, help="JSONL with audio, text, duration, source")
    parser.add_argument("--bundle", default="en", help="name or folder (default %(default)s)")
    parser.add_argument("--decoder", choices=BEAMS, action="append", help="default: all it has")
    parser.add_argument("--beam", type=int, help="hypotheses (default: as the bundle says)")
    parser.add_argument("--rounds", type=int, default=4, help="(default %(default)s)")
    parser.add_argument("--draws", type=int, default=15, help="in a round (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "-o", "--output", type=Path, help="write the weights here, for `loquent export --beams`"
    )
    parser.add_argument(
        "--write", action="store_true", help="write the weights into the bundle's manifest"
    )
    parser.add_argument("--default", choices=BEAMS, help="with --write: the bundle's new default")
    args = parser.parse_args(argv)
    try:
        _run(args)
    except (LoquentError, DataError, OSError) as error:
        parser.exit(1, f"loquent tune: {error}\n")
    return 0


def _run(args: argparse.Namespace) -> None:
    recognizer = Recognizer.load(args.bundle)
    bundle = recognizer.bundle
    if args.write and not Path(args.bundle).is_dir():
        raise DataError(f"got --write with {args.bundle}, expected a bundle's folder to write to")
    utterances = read_manifest(args.manifest)
    if len(utterances) < 2:
        raise DataError(f"{args.manifest}: got {len(utterances)} clips, expected two or more")
    clips = encode(recognizer, utterances)
    frames = bundle.segment_for(DEFAULT_CHUNK_MS) // bundle.encoder.subsampling
    beams = {name: as_fields(rules) for name, rules in bundle.beams.items()}
    print("| decoder | weights | WER / CER %, clips tuned on | others |")
    print("|---|---|---|---|")
    for name in args.decoder or [name for name in BEAMS if name in bundle.decoders]:
        start = bundle.beams.get(name, DEFAULTS[name])
        if args.beam:
            start = replace(start, beam=args.beam)
        names = [key for key in _RANGES if key not in _UNUSED[name]]
        tuned, others = (Trials(bundle, name, clips[half::2], frames) for half in (0, 1))
        rules = tune(tuned, start, names, rounds=args.rounds, draws=args.draws, seed=args.seed)
        for label, setting in (("before", start), ("after", rules)):
            values = ", ".join(f"{key} {getattr(setting, key):g}" for key in names)
            cells = [trials.score(setting) for trials in (tuned, others)]
            rates = " | ".join(f"{100 * s.wer:.1f} / {100 * s.cer:.1f}" for s in cells)
            print(f"| {name} | {label}: {values} | {rates} |")
        beams[name] = as_fields(rules)
        # At once, so that a run that is stopped keeps what it has found.
        if args.output:
            args.output.write_text(json.dumps(beams, indent=1) + "\n")
        if args.write:
            update_manifest(Path(args.bundle), beams=beams)
        sys.stdout.flush()
    if args.write and args.default:
        update_manifest(Path(args.bundle), default_decoder=args.default)
