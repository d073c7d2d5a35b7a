"""What hotwords do: rare words found, and what a list costs sentences that have none of its words.

The test set is made of a manifest: a word of a transcript is rare if the training transcripts have
it seldom or never. Every clip gets its own rare words as hotwords, and distractors: rare words of
other clips and of the training transcripts, which it does not say (after arXiv 1808.02480).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loquent.engine.hotwords import DEFAULT_BOOST, Hotword
from loquent.engine.recognizer import Recognizer
from loquent.export.wordtrial import finals, matches
from loquent.models.data import Utterance
from loquent.models.scoring import Score
from loquent.models.text import normalise

RARE = 2


@dataclass(frozen=True, kw_only=True)
class BiasSet:
    """Rare words of every clip, and words to distract with."""

    utterances: tuple[Utterance, ...]
    rare: tuple[tuple[str, ...], ...]
    distractors: tuple[str, ...]

    def hotwords(self, clip: int, count: int, boost: float) -> list[Hotword]:
        """The clip's rare words and ``count`` distractors, drawn anew for every clip."""
        said = set(self.utterances[clip].text.split())
        order = np.random.default_rng([clip, count]).permutation(len(self.distractors))
        found = (self.distractors[i] for i in order if self.distractors[i] not in said)
        words = [*self.rare[clip], *(word for word, _ in zip(found, range(count), strict=False))]
        return [Hotword(phrase=word, boost=boost) for word in dict.fromkeys(words)]


def make_set(
    utterances: Sequence[Utterance],
    training: Sequence[Utterance],
    spellable: Recognizer,
    *,
    most: int = RARE,
) -> BiasSet:
    """The test set of these clips.

    Args:
        most: how often the training transcripts may have a rare word.
        spellable: a model; words that it has no letters for are left out.
    """
    known = Counter(word for utterance in training for word in utterance.text.split())
    letters = set("".join(spellable.bundle.tokens).lower())
    rare = tuple(
        tuple(
            word
            for word in dict.fromkeys(utterance.text.split())
            if known[word] <= most and set(word) <= letters
        )
        for utterance in utterances
    )
    others = {word for word, count in known.items() if count <= most and set(word) <= letters}
    words = sorted(others.union(*rare))
    return BiasSet(utterances=tuple(utterances), rare=rare, distractors=tuple(words))


@dataclass(frozen=True, kw_only=True)
class BiasResult:
    """One decoder with one kind of list.

    Attributes:
        distractors: words in each list that are not said; None for no hotwords at all.
        found, rare: rare words that were heard right, and all of them.
        false: rare words heard where they are not said, of all clips' lists.
        with_words, without: scores of the clips that have rare words, and of those that have none.
    """

    decoder: str
    distractors: int | None
    boost: float
    found: int
    rare: int
    false: int
    with_words: Score
    without: Score

    @property
    def recall(self) -> float:
        """Share of rare words that were heard right."""
        return self.found / max(1, self.rare)


def run(
    recognizer: Recognizer,
    bias: BiasSet,
    *,
    decoder: str,
    chunk_ms: float,
    distractors: int | None,
    boost: float = DEFAULT_BOOST,
) -> BiasResult:
    """Recognise the set with such lists."""
    lists = [
        [] if distractors is None else bias.hotwords(i, distractors, boost)
        for i in range(len(bias.utterances))
    ]
    kind = "no hotwords" if distractors is None else f"{distractors} distractors"
    heard = finals(
        recognizer,
        bias.utterances,
        lambda i: recognizer.stream(decoder=decoder, chunk_ms=chunk_ms, hotwords=lists[i]),
        label=f"{decoder}, {kind}",
    )
    found = rare = false = 0
    scores = {True: Score(), False: Score()}
    for utterance, words, own, listed in zip(bias.utterances, heard, bias.rare, lists, strict=True):
        expected = utterance.text.split()
        got = [normalise(word.text) for word in words]
        right = {j for _, j in matches(got, expected)}
        rare += sum(word in own for word in expected)
        found += sum(expected[j] in own for j in right)
        hot = {hotword.phrase for hotword in listed}
        false += sum(word in hot and word not in expected for word in got)
        scores[bool(own)] += Score.of(utterance.text, " ".join(got))
    return BiasResult(
        decoder=decoder,
        distractors=distractors,
        boost=boost,
        found=found,
        rare=rare,
        false=false,
        with_words=scores[True],
        without=scores[False],
    )


def table(results: Sequence[BiasResult]) -> str:
    """Markdown: a row for each decoder and kind of list."""
    plain = {r.decoder: r for r in results if r.distractors is None}
    lines = [
        "| decoder | list | rare words found | not said | WER with rare words | WER without |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        kind = "none" if r.distractors is None else f"own + {r.distractors}"
        base = plain.get(r.decoder, r)
        change = 100 * (r.without.wer - base.without.wer)
        lines.append(
            f"| {r.decoder} | {kind} | {r.found} of {r.rare}, **{100 * r.recall:.0f} %** | "
            f"{r.false} | {100 * r.with_words.wer:.1f} | {100 * r.without.wer:.1f} "
            f"({change:+.1f}) |"
        )
    return "\n".join(lines)


def as_rows(results: Sequence[BiasResult]) -> list[Mapping[str, Any]]:
    """The numbers of :func:`table`, for JSON."""
    return [
        {
            "decoder": r.decoder,
            "distractors": r.distractors,
            "boost": r.boost,
            "found": r.found,
            "rare": r.rare,
            "false": r.false,
            "wer_with": round(r.with_words.wer, 5),
            "wer_without": round(r.without.wer, 5),
        }
        for r in results
    ]
