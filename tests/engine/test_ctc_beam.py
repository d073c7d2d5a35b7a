"""Prefix beam search on hand-written posteriors, held against all alignments there are."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loquent.engine.decode import Frame, Token
from loquent.engine.decode.ctc_beam import BeamRules, CtcBeam, Fusion
from loquent.engine.endpoint import Endpointer, EndpointRules
from loquent.engine.ngram import Ngram, Table

Float32 = NDArray[np.float32]
PIECES = ["<blank>", "▁a", "b", "▁c"]
BLANK, A, B, C = range(4)
WIDE = BeamRules(beam=1000, margin=1000.0, tokens=4, horizon=1000)


def beam(rules: BeamRules = WIDE, ngram: Ngram | None = None) -> CtcBeam:
    return CtcBeam(Fusion(PIECES, ngram, rules), BLANK)


def endless() -> Endpointer:
    return Endpointer(None, 0.04)


def ids(tokens: tuple[Token, ...]) -> list[int]:
    return [token.id for token in tokens]


def settled(frames: list[Frame]) -> list[int]:
    return [token.id for frame in frames for token in frame.tokens]


def rows(best: list[int], confidence: float = 0.9) -> Float32:
    probs = np.full((len(best), 4), (1 - confidence) / 3, np.float32)
    probs[np.arange(len(best)), best] = confidence
    return np.log(probs)


posteriors = st.integers(0, 2**31).flatmap(
    lambda seed: st.integers(1, 6).map(
        lambda length: np.log(np.random.default_rng(seed).dirichlet([0.5] * 4, length) + 1e-4)
    )
)


def likelihoods(log_probs: NDArray[np.float64]) -> dict[tuple[int, ...], float]:
    """Probability of every labelling, summed over all its alignments."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(4), repeat=len(log_probs)):
        labels = tuple(token for token, _ in itertools.groupby(path) if token != BLANK)
        found[labels] += math.exp(sum(log_probs[k, token] for k, token in enumerate(path)))
    return found


@settings(deadline=None, max_examples=60)
@given(log_probs=posteriors)
def test_a_wide_beam_finds_the_most_likely_labelling(log_probs: NDArray[np.float64]) -> None:
    decoder = beam()
    out = settled(decoder.accept(log_probs.astype(np.float32), 0, endless()))
    out += ids(decoder.flush())
    every = likelihoods(log_probs)
    # A frame that is as good as certainly blank is taken for it, which costs half a percent.
    assert every[tuple(out)] >= 0.99 * max(every.values())


@given(log_probs=posteriors, cut=st.integers(0, 6))
def test_in_pieces_is_at_once(log_probs: NDArray[np.float64], cut: int) -> None:
    whole, parts = beam(), beam()
    single = log_probs.astype(np.float32)
    a = settled(whole.accept(single, 0, endless())) + ids(whole.flush())
    b = settled(parts.accept(single[:cut], 0, endless()))
    b += settled(parts.accept(single[cut:], cut, endless()))
    assert a == b + ids(parts.flush())


def test_what_all_agree_on_is_settled_and_the_rest_is_pending() -> None:
    decoder = beam(BeamRules(margin=3.0))
    first = decoder.accept(rows([A, A, BLANK, B], 0.99), 0, endless())
    assert settled(first) == [A, B]
    unsure = rows([C])
    unsure[0, [B, C]] = np.log([0.45, 0.53])
    decoder.accept(rows([BLANK], 0.99), 4, endless())
    assert settled(decoder.accept(unsure, 5, endless())) == []
    assert ids(decoder.pending) == [C]
    assert decoder.pending[0].frame == 5
    assert ids(decoder.flush()) == [C]
    assert decoder.pending == ()


def test_a_doubt_that_lasts_is_settled_at_the_horizon() -> None:
    decoder = beam(BeamRules(horizon=10, margin=20.0))
    unsure = rows([C])
    unsure[0, [A, C]] = np.log([0.4, 0.55])
    assert settled(decoder.accept(unsure, 0, endless())) == []
    assert settled(decoder.accept(rows([BLANK] * 5, 0.9), 1, endless())) == []
    assert settled(decoder.accept(rows([BLANK] * 5, 0.9), 6, endless()))[0] == C


def test_the_same_token_again_after_an_endpoint() -> None:
    decoder = beam()
    rules = Endpointer(EndpointRules(trailing_silence=0.2), 0.04)
    frames = decoder.accept(rows([A] + [BLANK] * 6 + [A, A], 0.999), 0, rules)
    assert [(f.number, ids(f.tokens)) for f in frames if f.tokens] == [(5, [A])]
    assert [(token.id, token.frame) for token in decoder.pending] == [(A, 7)]
    assert [f.speech for f in frames] == [True, *[False] * 6, True, True]


def test_memory_is_flat() -> None:
    decoder = beam(BeamRules(horizon=20))
    random = np.random.default_rng(0)
    for chunk in range(200):
        log_probs = np.log(random.dirichlet([0.3] * 4, 8) + 1e-4).astype(np.float32)
        decoder.accept(log_probs, chunk * 8, endless())
        assert len(decoder.pending) <= 28
        todo, count = [decoder._root], 0
        while todo:
            count += 1
            todo += todo.pop().children.values()
        assert count <= 16 * 30
    assert all(math.isfinite(max(pair)) for pair in decoder._beam.values())


def no_pairs(words: int) -> Table:
    empty = np.zeros(0, np.float16)
    return Table(np.zeros(words + 1, np.uint32), np.zeros(0, np.uint16), empty, empty)


def unigrams(**logp: float) -> Ngram:
    words = ["<unk>", "<s>", *logp]
    values = np.array([-20, -20, *logp.values()], np.float16)
    return Ngram(words, values, np.zeros(len(words), np.float16), (no_pairs(len(words)),))


@pytest.mark.parametrize(("known", "said"), [("ab", [A, B]), ("a", [A])])
def test_the_language_model_decides_what_the_ear_cannot(known: str, said: list[int]) -> None:
    doubtful = rows([A, B])
    doubtful[1, [BLANK, B]] = np.log([0.48, 0.48])
    decoder = beam(BeamRules(word_bonus=0.0), unigrams(**{known: -1.0}))
    out = settled(decoder.accept(doubtful, 0, endless())) + ids(decoder.flush())
    assert out == said


def test_word_bonus_brings_words() -> None:
    doubtful = rows([A, BLANK, C])
    doubtful[2, [BLANK, C]] = np.log([0.55, 0.41])
    model = unigrams(a=-2.0, c=-2.0)
    for bonus, said in ((0.0, [A]), (3.0, [A, C])):
        decoder = beam(BeamRules(word_bonus=bonus), model)
        assert settled(decoder.accept(doubtful, 0, endless())) + ids(decoder.flush()) == said
