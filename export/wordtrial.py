"""A set of clips through the engine, with the tokens that each of its words was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from loquent.engine.audio import load_audio
from loquent.engine.bundle import Bundle
from loquent.engine.decode import Token
from loquent.engine.events import Final, Word
from loquent.engine.recognizer import Recognizer
from loquent.engine.stream import Stream
from loquent.engine.words import WordRules
from loquent.models.data import Utterance
from loquent.models.text import normalise

_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe(WordRules):
    """Rules that number the words, so that the tokens behind each can be looked up."""

    seen: list[tuple[Token, ...]] = field(default_factory=list)

    def confidence(self, tokens: Sequence[Token]) -> float:
        self.seen.append(tuple(tokens))
        return float(len(self.seen) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A word of a final.

    Attributes:
        tokens: that it was made of.
        following: frame of the next word's first token, None for the last word.
        right: whether the transcript has the word there.
        reference: index of that word in the transcript, None if it is wrong.
    """

    text: str
    tokens: tuple[Token, ...]
    following: int | None
    right: bool
    reference: int | None


class Probe:
    """A recogniser whose words tell their tokens."""

    def __init__(self, source: str, *, threads: int = 1) -> None:
        bundle = Bundle.load(source)
        self._seen: list[tuple[Token, ...]] = []
        probe = _Probe(seen=self._seen)
        rules: dict[str, WordRules] = dict.fromkeys(bundle.decoders, probe)
        self.bundle = bundle
        self._recognizer = Recognizer(replace(bundle, words=rules), threads=threads)

    def hear(
        self, utterances: Sequence[Utterance], *, decoder: str, chunk_ms: float
    ) -> list[list[Heard]]:
        """The words of each clip."""
        found = []
        for utterance, words in zip(
            utterances,
            finals(
                self._recognizer,
                utterances,
                lambda _: self._recognizer.stream(decoder=decoder, chunk_ms=chunk_ms),
                label=f"{decoder} {chunk_ms:g} ms",
            ),
            strict=True,
        ):
            tokens = [self._seen[round(word.confidence)] for word in words]
            # A word of the engine has no spaces, but its normalised text may be empty.
            right = dict(matches([normalise(word.text) for word in words], utterance.text.split()))
            found.append(
                [
                    Heard(
                        text=word.text,
                        tokens=tokens[i],
                        following=tokens[i + 1][0].frame if i + 1 < len(words) else None,
                        right=i in right,
                        reference=right.get(i),
                    )
                    for i, word in enumerate(words)
                ]
            )
        return found


def finals(
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    open_stream: Callable[[int], Stream],
    *,
    label: str,
    batch: int = _BATCH,
) -> list[list[Word]]:
    """The final words of each clip, ``batch`` clips side by side.

    Args:
        open_stream: makes the stream of the i-th clip, for audio of the bundle's rate.
        label: of the progress bar.
    """
    rate = recognizer.bundle.sample_rate
    words: list[list[Word]] = [[] for _ in utterances]
    waiting = iter(range(len(utterances)))
    running: list[tuple[int, Stream, Iterator[NDArray[np.float32]]]] = []
    with tqdm(total=len(utterances), unit="clip", leave=False, disable=None, desc=label) as bar:
        while True:
            while len(running) < batch and (i := next(waiting, None)) is not None:
                pcm = load_audio(utterances[i].audio, sample_rate=rate)
                blocks = iter(np.split(pcm, range(rate, len(pcm), rate)))
                running.append((i, open_stream(i), blocks))
            if not running:
                return words
            for _, stream, blocks in running:
                while stream.wants_audio:
                    block = next(blocks, None)
                    if block is None:
                        stream.finish()
                        break
                    stream.accept(block)
            recognizer.step([stream for _, stream, _ in running])
            for i, stream, _ in running:
                for event in stream.events():
                    if isinstance(event, Final):
                        words[i] += event.words
            bar.update(sum(stream.done for _, stream, _ in running))
            running = [clip for clip in running if not clip[1].done]


def matches(heard: Sequence[str], expected: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of indices of equal words, in order."""
    blocks = SequenceMatcher(None, heard, expected, autojunk=False).get_matching_blocks()
    for block in blocks:
        for k in range(block.size):
            yield block.a + k, block.b + k


def half(utterance: Utterance) -> int:
    """Which half of a set a clip is in, 0 or 1: by its file's name, so in any order the same."""
    return hashlib.sha256(utterance.audio.name.encode()).digest()[0] % 2
