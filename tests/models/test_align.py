"""Forced alignment: exact paths by brute force, and words where the corpus says them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loquent.engine.audio import load_audio
from loquent.engine.bundle import Bundle
from loquent.models.align import AlignmentError, BundleCtc, align, align_tokens
from loquent.models.scoring import ctc_greedy


def random_log_probs(frames: int, vocab: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(0, 3, (frames, vocab))
    return (x - np.log(np.exp(x).sum(1, keepdims=True))).astype(np.float32)


@settings(max_examples=40)
@given(
    st.integers(1, 6),
    st.lists(st.integers(0, 2), max_size=3).filter(lambda ids: 1 not in ids),
    st.integers(0, 10**6),
)
def test_the_path_is_the_best_of_all(frames: int, tokens: list[int], seed: int) -> None:
    blank = 1
    log_probs = random_log_probs(frames, 3, seed)
    every = [
        (sum(log_probs[i, k] for i, k in enumerate(path)), path)
        for path in itertools.product(range(3), repeat=frames)
        if ctc_greedy(path, blank) == tokens
    ]
    if not every:
        with pytest.raises(AlignmentError, match="longer than what the audio can hold"):
            align_tokens(log_probs, tokens, blank)
        return
    best, _ = max(every)
    spans = align_tokens(log_probs, tokens, blank)
    assert [s.id for s in spans] == tokens
    path = [blank] * frames
    for span in spans:
        path[span.start : span.end] = [span.id] * (span.end - span.start)
        own = log_probs[span.start : span.end, span.id]
        assert span.logp == pytest.approx(float(own.mean()), abs=1e-4)
    assert sum(log_probs[i, k] for i, k in enumerate(path)) == pytest.approx(best, abs=1e-3)


@pytest.fixture(scope="module")
def english() -> BundleCtc:
    return BundleCtc(Bundle.load("en"))


def test_words_of_the_bundled_clip(english: BundleCtc) -> None:
    from importlib.resources import as_file, files

    with as_file(files("loquent.engine") / "samples" / "morning.flac") as path:
        pcm = load_audio(path)
    log_probs = english.log_probs(pcm)
    text = english.decode(ctc_greedy(log_probs.argmax(1).tolist(), english.blank))
    right = align(english, pcm, text)
    assert [w.text for w in right.words] == text.split()
    starts = [w.start for w in right.words]
    assert starts == sorted(starts)
    assert 0 <= starts[0] < right.words[-1].end <= len(pcm) / 16000 + 0.1
    # Silence in front moves every word by as much.
    later = align(english, np.concatenate([np.zeros(32000, np.float32), pcm]), text)
    shift = np.median([b.start - a.start for a, b in zip(right.words, later.words, strict=True)])
    assert shift == pytest.approx(2.0, abs=0.1)
    # A text that is not what is said scores far worse; a text with words left out shows in the
    # blank.
    wrong = align(english, pcm, " ".join(reversed(text.split())))
    assert wrong.logp < right.logp - 2
    half = align(english, pcm, " ".join(text.split()[: len(text.split()) // 2]))
    assert half.blank_logp < 3 * right.blank_logp
    nothing = align(english, pcm, "")
    assert nothing.words == ()
    assert math.isnan(nothing.logp)
