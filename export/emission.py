"""How long after a word was said its caption is there.

The end of a word comes from forced alignment of the transcript, the caption's time from the stream:
seconds of audio that it had used, so the time to compute is not in it (``loquent bench`` has that).
"""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

from loquent.engine.audio import load_audio
from loquent.export.streaming import Said
from loquent.models.align import AlignedWord, AlignmentError, align, load_ctc
from loquent.models.data import Utterance
from loquent.models.text import normalise


class DelayMeter:
    """Aligned transcripts of a set of clips.

    Clips that cannot be aligned (the text is longer than the audio can hold) do not count.

    Args:
        model: bundle or checkpoint whose CTC head aligns.
        utterances: the clips.

    Raises:
        AlignmentError: the model has no CTC head.
    """

    def __init__(self, model: str, utterances: Sequence[Utterance]) -> None:
        ctc = load_ctc(model)
        self._words: list[tuple[AlignedWord, ...]] = []
        for u in tqdm(utterances, unit="clip", leave=False, disable=None, desc="alignment"):
            try:
                found = align(ctc, load_audio(u.audio, sample_rate=ctc.sample_rate), u.text).words
            except AlignmentError:
                found = ()
            self._words.append(found)

    def measure(self, said: Sequence[Sequence[Said]]) -> tuple[tuple[float, float], ...]:
        """Delays (shown, committed) in seconds of every word that was heard right."""
        return tuple(
            delay
            for words, heard in zip(self._words, said, strict=True)
            for delay in delays(words, heard)
        )


def delays(words: Sequence[AlignedWord], said: Sequence[Said]) -> list[tuple[float, float]]:
    """Delays (shown, committed) in seconds of the words of one clip that were heard right."""
    expected, got = [w.text for w in words], [normalise(s.text) for s in said]
    return [
        (caption.shown - word.end, caption.settled - word.end)
        for block in Levenshtein.opcodes(expected, got).as_matching_blocks()
        for word, caption in zip(
            words[block.a : block.a + block.size], said[block.b :], strict=False
        )
    ]
