"""``loquent measure stability``: how much partials flicker, and how soon words are committed.

For every partial the next state of its segment is looked at, be it a partial or the final. Words of
the partial behind what the two have in common are unstable: they were taken back or changed. The
unstable partial word ratio is their number over that of the words in the finals (arXiv 2006.01416,
UPWR). A last word that merely grows ("walk", "walking") is counted apart: so subwords come.

A word's commit lag is the audio that had been recognised when it first was committed or final, less
the word's end; it holds what the chunk costs, not the look-ahead or the computation. Committed
words that change are mistakes of ours, and there must be none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from loquent.engine.audio import load_audio
from loquent.engine.events import Event, Final, Partial
from loquent.engine.recognizer import Recognizer
from loquent.models.data import Utterance
from loquent.models.scoring import Score


@dataclass(frozen=True, kw_only=True)
class Stability:
    """What one setting shows; lags in seconds."""

    decoder: str
    stability: float
    upwr: float
    growth: float
    median_lag: float
    p90_lag: float
    broken: int
    wer: float


def unstable(shown: Sequence[str], after: Sequence[str]) -> tuple[int, int]:
    """Words of a partial that the next state takes back or changes, and whether the last grew."""
    same = 0
    while same < min(len(shown), len(after)) and shown[same] == after[same]:
        same += 1
    grew = same == len(shown) - 1 and same < len(after) and after[same].startswith(shown[same])
    return (0, 1) if grew else (len(shown) - same, 0)


class Watch:
    """Follows the events of one stream."""

    def __init__(self) -> None:
        self.unstable = self.grown = self.words = self.broken = 0
        self.lags: list[float] = []
        self.text: list[str] = []
        self._shown: list[str] = []
        self._committed: list[str] = []

    def see(self, event: Event, processed: float) -> None:
        """One event, and how much audio had been recognised by then, in seconds."""
        if not isinstance(event, Partial | Final):
            return
        words = [word.text for word in event.words]
        changed, grew = unstable(self._shown, words)
        self.unstable += changed
        self.grown += grew
        committed = words if isinstance(event, Final) else event.committed.split()
        self.broken += committed[: len(self._committed)] != self._committed
        for word in event.words[len(self._committed) : len(committed)]:
            self.lags.append(processed - word.end)
        self._shown, self._committed = words, committed
        if isinstance(event, Final):
            self.words += len(words)
            self.text += words
            self._shown, self._committed = [], []


def measure(
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    *,
    decoder: str,
    chunk_ms: float,
    stability: float,
) -> Stability:
    """Stream every clip at the pace of its chunks and watch."""
    rate = recognizer.bundle.sample_rate
    watches = []
    score = Score()
    for utterance in tqdm(utterances, unit="clip", leave=False, desc=f"{decoder} {stability:g} s"):
        pcm = load_audio(utterance.audio, sample_rate=rate)
        stream = recognizer.stream(
            sample_rate=rate, decoder=decoder, chunk_ms=chunk_ms, stability=stability
        )
        watch = Watch()
        for at in range(0, len(pcm) + 1, rate // 10):
            stream.accept(pcm[at : at + rate // 10])
            if at + rate // 10 > len(pcm):
                stream.finish()
            while stream.ready:
                recognizer.step([stream])
                for event in stream.events():
                    watch.see(event, stream.processed)
        watches.append(watch)
        score += Score.of(utterance.text, " ".join(watch.text))
    words = max(1, sum(watch.words for watch in watches))
    lags = [lag for watch in watches for lag in watch.lags] or [0.0]
    return Stability(
        decoder=decoder,
        stability=stability,
        upwr=sum(watch.unstable for watch in watches) / words,
        growth=sum(watch.grown for watch in watches) / words,
        median_lag=float(np.median(lags)),
        p90_lag=float(np.quantile(lags, 0.9)),
        broken=sum(watch.broken for watch in watches),
        wer=score.wer,
    )


def table(rows: Sequence[Stability]) -> str:
    """Markdown."""
    lines = [
        "| decoder | stability s | UPWR | growing | commit lag median / p90 s | changed | WER % |",
        "|---" * 7 + "|",
    ]
    lines += [
        f"| {r.decoder} | {r.stability:g} | {r.upwr:.3f} | {r.growth:.3f} | {r.median_lag:.2f} / "
        f"{r.p90_lag:.2f} | {r.broken} | {100 * r.wer:.1f} |"
        for r in rows
    ]
    return "\n".join(lines)
