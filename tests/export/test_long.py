"""Long recordings: how they are joined, and how the ends of clips are scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from loquent.export.long import Recording, Tally, join, table
from loquent.models.data import Utterance


def recording(*clips: str) -> Recording:
    return Recording(
        pcm=np.zeros(0, np.float32), clips=tuple(tuple(clip.split()) for clip in clips)
    )


def test_first_and_last_words_are_counted_apart() -> None:
    one = recording("a b c", "d e", "f")
    perfect = Tally.of(one, "a b c d e f", 3)
    assert (perfect.errors, perfect.first, perfect.last, perfect.clips) == (0, 0, 0, 3)
    # The first word of the second clip and the last of the first are gone, one is made up.
    worse = Tally.of(one, "a b e f oh", 2)
    assert (worse.words, worse.errors, worse.deletions, worse.insertions) == (6, 3, 2, 1)
    assert (worse.first, worse.last) == (1, 1)
    nothing = Tally.of(one, "", 0)
    assert (nothing.errors, nothing.first, nothing.last) == (6, 3, 3)
    both = worse + nothing
    assert (both.words, both.errors, both.segments) == (12, 9, 2)
    assert "| x | 75.0 |" in table([("x", both)])


def test_pauses_are_as_drawn_and_the_same_for_a_seed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    utterances = []
    for k in range(5):
        file = tmp_path / f"{k}.wav"
        pcm = rng.normal(0, 0.1, 16000 + 1600 * k)
        pcm[:4000] *= 0.01  # the quiet part sets the level of the pause
        soundfile.write(file, pcm, 16000)
        utterances.append(
            Utterance(audio=file, text=f"Clip {k}!", duration=1.0 + k / 10, source="s")
        )
    first, second = (join(utterances, sample_rate=16000, clips=3, seed=1) for _ in range(2))
    assert [len(r.clips) for r in first] == [3, 2]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.pcm, b.pcm)
        assert a.clips == b.clips
    words = sorted(clip for r in first for clip in r.clips)
    assert words == [("clip", str(k)) for k in range(5)]
    seconds = sum(len(r.pcm) for r in first) / 16000
    assert 6.0 + 5 * 0.2 <= seconds <= 6.0 + 5 * 10
    assert 0 < float(np.abs(first[0].pcm[-1600:]).mean()) < 0.01
