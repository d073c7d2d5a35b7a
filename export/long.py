"""``loquent measure endpoints``: what endpoints cost or gain on long recordings.

Clips are joined in a random order with pauses of 0.2 to 10 s, drawn evenly on a logarithmic scale,
that hold noise as loud as the quietest tenth of the clips beside them. The same recordings go
through every variant. Words are aligned over the whole recording; the first and the last word of
every clip are counted apart, as an endpoint's mistakes are made there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field

import jiwer
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from loquent.engine.audio import load_audio
from loquent.engine.endpoint import EndpointRules
from loquent.engine.events import Event, Final
from loquent.engine.recognizer import Recognizer
from loquent.engine.vad import Vad
from loquent.models.data import Utterance
from loquent.models.text import normalise

Float32 = NDArray[np.float32]
PAUSES = (0.2, 10.0)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Clips in a row: samples (N,), and the words of each clip."""

    pcm: Float32
    clips: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to treat the ends of segments."""

    name: str
    rules: EndpointRules | None = field(default_factory=EndpointRules)
    vad: Vad | None = None


VARIANTS = (
    Variant(name="no endpoints", rules=None),
    Variant(name="default"),
    Variant(name="encoder kept", rules=EndpointRules(reset_encoder=False)),
    Variant(name="predictor kept", rules=EndpointRules(reset_decoder=False)),
    Variant(name="both kept", rules=EndpointRules(reset_decoder=False, reset_encoder=False)),
    Variant(name="rule 1 after 5 s", rules=EndpointRules(leading_silence=5.0)),
    Variant(name="rule 2 after 0.4 s", rules=EndpointRules(trailing_silence=0.4)),
    Variant(name="rule 2 after 2 s", rules=EndpointRules(trailing_silence=2.0)),
)
VAD_VARIANTS = (
    Variant(name="vad", vad="silero"),
    Variant(
        name="vad, rule 2 after 0.4 s", rules=EndpointRules(trailing_silence=0.4), vad="silero"
    ),
)


@dataclass(frozen=True)
class Tally:
    """Counts over recordings; ``first`` and ``last`` are errors at those words of the clips."""

    words: int = 0
    errors: int = 0
    deletions: int = 0
    insertions: int = 0
    clips: int = 0
    first: int = 0
    last: int = 0
    segments: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def of(cls, recording: Recording, hypothesis: str, segments: int) -> Tally:
        """Score one recording."""
        reference = [word for clip in recording.clips for word in clip]
        said = normalise(hypothesis)
        if not said:
            right = [False] * len(reference)
            deletions, insertions = len(reference), 0
        else:
            found = jiwer.process_words(" ".join(reference), said)
            right = [False] * len(reference)
            for chunk in found.alignments[0]:
                if chunk.type == "equal":
                    for at in range(chunk.ref_start_idx, chunk.ref_end_idx):
                        right[at] = True
            deletions, insertions = found.deletions, found.insertions
        ends = np.cumsum([len(clip) for clip in recording.clips])
        starts = ends - [len(clip) for clip in recording.clips]
        return cls(
            words=len(reference),
            errors=right.count(False) + insertions,
            deletions=deletions,
            insertions=insertions,
            clips=len(recording.clips),
            first=sum(not right[at] for at in starts),
            last=sum(not right[at - 1] for at in ends),
            segments=segments,
        )


def join(
    utterances: Sequence[Utterance], *, sample_rate: int, clips: int = 12, seed: int = 0
) -> list[Recording]:
    """Recordings of ``clips`` clips each, the same for the same seed."""
    rng = np.random.default_rng(seed)
    usable = [u for u in utterances if normalise(u.text)]
    order = rng.permutation(len(usable))
    recordings = []
    for at in range(0, len(order), clips):
        parts: list[Float32] = []
        words = []
        for index in order[at : at + clips]:
            utterance = usable[index]
            pcm = load_audio(utterance.audio, sample_rate=sample_rate)
            seconds = np.exp(rng.uniform(*np.log(PAUSES)))
            hiss = rng.normal(0, _quiet(pcm, sample_rate), round(seconds * sample_rate))
            parts += [pcm, hiss.astype(np.float32)]
            words.append(tuple(normalise(utterance.text).split()))
        recordings.append(Recording(pcm=np.concatenate(parts), clips=tuple(words)))
    return recordings


def _quiet(pcm: Float32, sample_rate: int) -> float:
    """RMS of the quietest tenth of the clip's 20 ms frames."""
    size = sample_rate // 50
    frames = pcm[: len(pcm) // size * size].reshape(-1, size)
    levels = np.sqrt(np.square(frames).mean(axis=1)) if len(frames) else np.zeros(1)
    return float(np.quantile(levels, 0.1))


def listen(
    recognizer: Recognizer,
    recordings: Sequence[Float32],
    *,
    decoder: str | None,
    chunk_ms: float,
    rules: EndpointRules | None,
    vad: Vad | None = None,
    batch: int = 16,
    label: str = "",
) -> list[list[Event]]:
    """All events of recordings, ``batch`` streams side by side."""
    events: list[list[Event]] = [[] for _ in recordings]
    rate = recognizer.bundle.sample_rate
    waiting = list(range(len(recordings)))[::-1]
    running: dict[int, list[int]] = {}
    streams = {}
    total = round(sum(map(len, recordings)) / rate)
    with tqdm(total=total, unit="s", leave=False, desc=label) as bar:
        while waiting or running:
            while waiting and len(running) < batch:
                index = waiting.pop()
                running[index] = [0]
                streams[index] = recognizer.stream(
                    sample_rate=rate, decoder=decoder, chunk_ms=chunk_ms, endpoint=rules, vad=vad
                )
            for index, sent in running.items():
                pcm, stream = recordings[index], streams[index]
                while stream.wants_audio and sent[0] < len(pcm):
                    stream.accept(pcm[sent[0] : sent[0] + rate])
                    sent[0] += rate
                    bar.update()
                if sent[0] >= len(pcm):
                    stream.finish()
            recognizer.step([streams[index] for index in running])
            for index in list(running):
                events[index] += streams[index].events()
                if streams[index].done:
                    del running[index], streams[index]
    return events


def compare(
    recognizer: Recognizer,
    recordings: Sequence[Recording],
    variants: Sequence[Variant],
    *,
    decoder: str | None,
    chunk_ms: float,
) -> list[tuple[str, Tally]]:
    """The tally of every variant over the same recordings."""
    rows = []
    for variant in variants:
        heard = listen(
            recognizer,
            [recording.pcm for recording in recordings],
            decoder=decoder,
            chunk_ms=chunk_ms,
            rules=variant.rules,
            vad=variant.vad,
            label=variant.name,
        )
        tally = Tally()
        for recording, events in zip(recordings, heard, strict=True):
            finals = [event for event in events if isinstance(event, Final)]
            text = " ".join(word.text for final in finals for word in final.words)
            tally += Tally.of(recording, text, len(finals))
        rows.append((variant.name, tally))
    return rows


def table(rows: Sequence[tuple[str, Tally]]) -> str:
    """Markdown: percent of words, of first words and of last words."""
    lines = [
        "| variant | WER % | deletions | insertions | first wrong % | last wrong % | segments |",
        "|---" * 7 + "|",
    ]
    for name, t in rows:
        words, clips = max(1, t.words), max(1, t.clips)
        lines.append(
            f"| {name} | {100 * t.errors / words:.1f} | {100 * t.deletions / words:.1f} | "
            f"{100 * t.insertions / words:.1f} | {100 * t.first / clips:.1f} | "
            f"{100 * t.last / clips:.1f} | {t.segments} |"
        )
    return "\n".join(lines)
