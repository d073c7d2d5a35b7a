"""The network beside the n-gram in a beam search, held against adding it up by hand."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loquent.engine.decode import Token
from loquent.engine.decode.beam import BeamSearch, BeamState
from loquent.engine.decode.decoder import Job, Settings
from loquent.engine.decode.fusion import BeamRules, Fusion
from loquent.engine.decode.neural import Neural, Said
from loquent.engine.endpoint import Endpointer, EndpointRules
from loquent.engine.ngram import Ngram, Table

Float64 = NDArray[np.float64]
PIECES = ["<blank>", "▁a", "b", "▁c"]
BLANK, A, B, C = range(4)
WIDE = BeamRules(beam=1000, margin=1000.0, horizon=1000, word_bonus=0.3, unknown=-3.0)
KNOWN = {"a": -1.0, "ab": -2.0, "c": -0.7, "cb": -2.5}
SHARE = 0.6
START = 1


def ngram() -> Ngram:
    words = ["<unk>", "<s>", *KNOWN]
    empty = np.zeros(0, np.float16)
    pairs = Table(np.zeros(len(words) + 1, np.uint32), np.zeros(0, np.uint16), empty, empty)
    logp = np.array([-4, -20, *KNOWN.values()], np.float16)
    return Ngram(words, logp, np.zeros(len(words), np.float16), (pairs,))


class Counting:
    """What comes next depends on all words before: their sum, with weights."""

    initial: Mapping[str, NDArray[Any]] = {"sum": np.zeros((1, 1), np.float32)}

    def __init__(self) -> None:
        self.calls: list[int] = []

    def step(
        self, word: NDArray[np.int64], state: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        self.calls.append(len(word))
        before = state["sum"][:, 0]
        logp = -1.5 + np.cos(1.7 * word + 3.1 * before)
        after = 0.5 * before + word
        return logp.astype(np.float32), {"sum": after[:, None].astype(np.float32)}


def by_hand(words: Sequence[str], lm_weight: float, *, share: float = SHARE) -> float:
    """Score of words by both models."""
    ids = ngram().ids
    total, before = 0.0, 0.5 * 0.0 + START
    for word in words:
        index = ids.get(word, 0)
        if index:
            own = math.exp(-1.5 + math.cos(1.7 * index + 3.1 * before))
            both = (1 - share) * math.exp(np.float16(KNOWN[word])) + share * own
            total += lm_weight * math.log(both) + WIDE.word_bonus
        else:
            total += WIDE.unknown + WIDE.word_bonus
        before = 0.5 * before + index
    return total


def text(tokens: Sequence[int]) -> list[str]:
    return "".join(PIECES[token] for token in tokens).replace("▁", " ").split()


def beam(model: Counting, rules: BeamRules = WIDE) -> BeamSearch:
    neural = Neural(model, share=SHARE, start=START)
    return BeamSearch(Fusion(PIECES, ngram(), rules, neural), blank=BLANK, share=1.0)


class Runner:
    def __init__(self, decoder: BeamSearch, **options: float) -> None:
        self.decoder = decoder
        self.state: BeamState = decoder.start(Settings(**options))
        self.at = 0

    def job(self, rows: NDArray[Any], rules: EndpointRules | None = None) -> Job:
        first, self.at = self.at, self.at + len(rows)
        return Job(self.state, {"ctc": rows.astype(np.float32)}, first, Endpointer(rules, 0.04))

    def accept(self, rows: NDArray[Any], rules: EndpointRules | None = None) -> list[int]:
        ((frames, self.state),) = self.decoder.decode([self.job(rows, rules)])
        return [token.id for frame in frames for token in frame.tokens]

    def said(self, rows: NDArray[Any]) -> list[int]:
        return self.accept(rows) + ids(self.state.flush())


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


posteriors = st.tuples(st.integers(0, 2**31), st.integers(1, 6)).map(
    lambda drawn: np.log(np.random.default_rng(drawn[0]).dirichlet([0.7] * 4, drawn[1]) + 1e-4)
)


def acoustics(log_probs: Float64) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(4), repeat=len(log_probs)):
        labels = tuple(token for token, _ in itertools.groupby(path) if token != BLANK)
        found[labels] += math.exp(sum(log_probs[k, token] for k, token in enumerate(path)))
    return found


@settings(max_examples=40)
@given(log_probs=posteriors, cuts=st.lists(st.integers(0, 6), max_size=3))
def test_the_best_of_all_labellings_by_both_models(log_probs: Float64, cuts: list[int]) -> None:
    # What CTC is as good as certain is blank is taken for it.
    if log_probs[:, BLANK].max() > math.log(0.97):
        return
    scores = {
        labels: math.log(p) + by_hand(text(labels), WIDE.lm_weight)
        for labels, p in acoustics(log_probs).items()
        if not labels or labels[0] != B  # a piece that begins no word, at the very beginning
    }
    runner = Runner(beam(Counting()))
    said: list[int] = []
    ends = sorted({min(cut, len(log_probs)) for cut in cuts} | {len(log_probs)})
    for start, end in itertools.pairwise([0, *ends]):
        if end > start:
            said += runner.accept(log_probs[start:end])
    state = runner.state
    for h in state.hypotheses:
        labels = (*said, *h.ids)
        if labels in scores:
            assert h.acoustic(1.0) + state.fusion.finished(h.words) == pytest.approx(
                scores[labels], abs=1e-3
            )
    best = tuple(said + ids(state.flush()))
    if best in scores and not said:
        assert scores[best] >= max(scores.values()) - 1e-3


@settings(max_examples=20)
@given(lines=st.lists(posteriors, min_size=2, max_size=4), cut=st.integers(1, 5))
def test_batched_is_single(lines: list[Float64], cut: int) -> None:
    weights = [0.2, 0.4, 0.9, 0.0]
    rules = BeamRules(beam=4, margin=8.0)
    alone = []
    for line, weight in zip(lines, weights, strict=False):
        runner = Runner(beam(Counting(), rules), lm_weight=weight)
        said = runner.accept(line[:cut])
        said += runner.accept(line[cut:]) if len(line) > cut else []
        alone.append(said + ids(runner.state.flush()))
    decoder = beam(Counting(), rules)
    runners = [Runner(decoder, lm_weight=w) for _, w in zip(lines, weights, strict=False)]
    together: list[list[int]] = [[] for _ in lines]
    for part in (slice(0, cut), slice(cut, None)):
        members = [i for i, line in enumerate(lines) if len(line[part])]
        jobs = [runners[i].job(lines[i][part]) for i in members]
        for i, (frames, state) in zip(members, decoder.decode(jobs) if jobs else [], strict=True):
            runners[i].state = state
            together[i] += [token.id for frame in frames for token in frame.tokens]
    assert [s + ids(r.state.flush()) for s, r in zip(together, runners, strict=True)] == alone


def doubtful(seed: int, frames: int = 8) -> Float64:
    return np.log(np.random.default_rng(seed).dirichlet([0.7] * 4, frames) + 1e-4)


def test_a_chunk_costs_a_call_for_each_word_in_a_row_whatever_the_streams() -> None:
    model = Counting()
    decoder = beam(model, BeamRules(beam=6, margin=20.0))
    runners = [Runner(decoder) for _ in range(5)]
    for chunk in range(6):
        model.calls.clear()
        jobs = [r.job(doubtful(10 * chunk + i)) for i, r in enumerate(runners)]
        for runner, (_, state) in zip(runners, decoder.decode(jobs), strict=True):
            runner.state = state
        # In eight frames seven words can end behind one that was begun before, and one may go on.
        assert len(model.calls) <= 9
        assert max(model.calls) <= 5 * 6
    assert max(model.calls) > 6  # of several streams in one call


def test_without_weight_it_is_never_asked() -> None:
    model = Counting()
    runner = Runner(beam(model), lm_weight=0.0)
    model.calls.clear()
    runner.said(doubtful(3))
    assert model.calls == []
    assert runner.state.hypotheses[0].words.said is None


class Fond(Counting):
    """Expects one word, whatever came before."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = ngram().ids[word]

    def step(
        self, word: NDArray[np.int64], state: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        return np.where(word == self.word, -0.1, -6.0).astype(np.float32), dict(state)


@pytest.mark.parametrize("last", [[], [A, BLANK]])
def test_it_decides_what_n_gram_and_ear_cannot(last: list[int]) -> None:
    heard = [A, BLANK, C, B, BLANK, *last]
    rows = np.log(np.full((len(heard), 4), 0.02))
    rows[np.arange(len(heard)), heard] = math.log(0.94)
    rows[3, [BLANK, B]] = np.log([0.5, 0.5])
    more = ["a"] if last else []
    assert text(Runner(beam(Fond("c"))).said(rows)) == ["a", "c", *more]
    assert text(Runner(beam(Fond("cb"))).said(rows)) == ["a", "cb", *more]


def test_words_of_the_past_are_let_go() -> None:
    runner = Runner(beam(Counting(), BeamRules(beam=6, margin=20.0, horizon=10)))
    for chunk in range(40):
        runner.accept(doubtful(chunk))
        for h in runner.state.hypotheses:
            assert h.words.said is not None
            assert h.words.said.before is None
            assert h.words.said.state is not None


def test_a_sentence_begins_anew_after_an_endpoint() -> None:
    model = Counting()
    decoder = beam(model)
    runner = Runner(decoder)
    pause = EndpointRules(trailing_silence=0.2)
    quiet = np.log(np.array([[0.97, 0.01, 0.01, 0.01]] * 9))
    speech = np.log(np.full((3, 4), 0.02))
    speech[[0, 1, 2], [A, BLANK, C]] = math.log(0.94)
    said = runner.accept(np.concatenate([speech, quiet, speech, quiet]), pause)
    assert text(said) == ["a", "c", "a", "c"]
    assert runner.state.best().words.said is decoder.start(Settings()).best().words.said


def test_equal_words_are_computed_once() -> None:
    model = Counting()
    neural = Neural(model, share=SHARE, start=START)
    first = [Said(neural.start, 2, -1.0) for _ in range(3)]
    second = [Said(said, 3, None) for said in first]
    model.calls.clear()
    neural.compute(second)
    # The copies of the first word are one row; those of the second have different objects before.
    assert model.calls == [1, 3]
    assert len({said.gain for said in second}) == 1
    neural.compute(second)
    assert len(model.calls) == 2


@pytest.mark.parametrize(("share", "own"), [(1.0, -3.0), (0.5, -200.0), (0.5, -1.0)])
def test_gain_is_the_logarithm_of_the_mixture(share: float, own: float) -> None:
    class Fixed(Counting):
        def step(
            self, word: NDArray[np.int64], state: Mapping[str, NDArray[Any]]
        ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
            return np.full(len(word), own, np.float32), dict(state)

    neural = Neural(Fixed(), share=share, start=START)
    (gain, none) = neural.gains([(neural.start, 2, -2.0), (neural.start, 0, None)])
    mixture = (1 - share) * math.exp(-2.0) + share * math.exp(own)
    assert gain == pytest.approx(math.log(mixture) + 2.0)
    assert none == 0.0
