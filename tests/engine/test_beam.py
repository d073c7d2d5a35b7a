"""Beam search on hand-written posteriors, held against all alignments there are."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loquent.engine.decode import Frame, Token
from loquent.engine.decode.beam import BeamSearch, BeamState
from loquent.engine.decode.decoder import Job, Settings
from loquent.engine.decode.fusion import BeamRules, Fusion
from loquent.engine.decode.rnnt import RnntGreedy
from loquent.engine.decode.transducer import Transducer
from loquent.engine.endpoint import Endpointer, EndpointRules
from loquent.engine.errors import ConfigError
from loquent.engine.ngram import Ngram, Table

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
PIECES = ["<blank>", "▁a", "b", "▁c"]
BLANK, A, B, C = range(4)
V = 4
WIDE = BeamRules(beam=1000, margin=1000.0, horizon=1000)
SHARES = [0.0, 0.4, 1.0]  # of CTC: rnnt-beam, joint, ctc-beam
TABLE = np.random.default_rng(5).normal(0, 1.5, (2, V, V)).astype(np.float32)


class Tables:
    """Predictor: a row for the last token and one for the token before. Joiner: the sum."""

    initial: Mapping[str, NDArray[Any]] = {"context": np.zeros((1, 1), np.int64)}

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def step(
        self, token: NDArray[np.int64], state: Mapping[str, NDArray[Any]]
    ) -> tuple[Float32, dict[str, NDArray[Any]]]:
        self.calls.append(("step", len(token)))
        pred = TABLE[0, token] + TABLE[1, state["context"][:, 0]]
        return pred, {"context": token[:, None]}

    def join(self, enc: Float32, pred: Float32) -> Float32:
        self.calls.append(("join", len(enc)))
        assert enc.shape == pred.shape
        return enc + pred


def beam(
    share: float = 1.0,
    rules: BeamRules = WIDE,
    ngram: Ngram | None = None,
    model: Tables | None = None,
) -> BeamSearch:
    return BeamSearch(
        Fusion(PIECES, ngram, rules),
        blank=BLANK,
        share=share,
        model=Transducer(model or Tables(), blank=BLANK),
    )


class Runner:
    """One stream of a decoder."""

    def __init__(self, decoder: BeamSearch, **settings: float) -> None:
        self.decoder = decoder
        self.state: BeamState = decoder.start(Settings(**settings))
        self.at = 0

    def job(self, rows: NDArray[Any], rules: EndpointRules | None = None) -> Job:
        rows = rows.astype(np.float32)
        first, self.at = self.at, self.at + len(rows)
        # One posterior serves both: as it stands for CTC, and as what the joiner adds to.
        return Job(self.state, {"ctc": rows, "joiner": rows}, first, Endpointer(rules, 0.04))

    def accept(self, rows: NDArray[Any], rules: EndpointRules | None = None) -> list[Frame]:
        ((frames, self.state),) = self.decoder.decode([self.job(rows, rules)])
        return frames

    def said(self, rows: NDArray[Any]) -> list[int]:
        return settled(self.accept(rows)) + ids(self.state.flush())


def ids(tokens: tuple[Token, ...]) -> list[int]:
    return [token.id for token in tokens]


def settled(frames: list[Frame]) -> list[int]:
    return [token.id for frame in frames for token in frame.tokens]


def rows(best: list[int], confidence: float = 0.9) -> Float32:
    probs = np.full((len(best), V), (1 - confidence) / 3, np.float32)
    probs[np.arange(len(best)), best] = confidence
    return np.log(probs)


posteriors = st.integers(0, 2**31).flatmap(
    lambda seed: st.integers(1, 6).map(
        lambda length: np.log(np.random.default_rng(seed).dirichlet([0.5] * V, length) + 1e-4)
    )
)
shares = st.sampled_from(SHARES)


def by_ctc(log_probs: Float64) -> dict[tuple[int, ...], float]:
    """Probability of every labelling, summed over all its alignments."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(V), repeat=len(log_probs)):
        labels = tuple(token for token, _ in itertools.groupby(path) if token != BLANK)
        found[labels] += math.exp(sum(log_probs[k, token] for k, token in enumerate(path)))
    return found


def after(tokens: tuple[int, ...], row: Float64) -> Float64:
    """RNN-T's log-probabilities of the next token."""
    before, last = (BLANK, BLANK, *tokens)[-2:]
    logits = row + TABLE[0, last] + TABLE[1, before]
    return np.asarray(logits - np.log(np.exp(logits).sum()))


def by_rnnt(log_probs: Float64) -> dict[tuple[int, ...], float]:
    """The same for a transducer that emits at most one token a frame."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(V), repeat=len(log_probs)):
        labels: tuple[int, ...] = ()
        total = 0.0
        for row, token in zip(log_probs, path, strict=True):
            total += after(labels, row)[token]
            labels += (token,) * (token != BLANK)
        found[labels] += math.exp(total)
    return found


@settings(max_examples=30)
@given(log_probs=posteriors, share=shares)
def test_a_wide_beam_finds_the_best_labelling_there_is(log_probs: Float64, share: float) -> None:
    said = tuple(Runner(beam(share)).said(log_probs))
    ctc, rnnt = by_ctc(log_probs), by_rnnt(log_probs)
    scores = {
        labels: share * math.log(ctc.get(labels, 0) or 1e-300)
        + (1 - share) * math.log(rnnt.get(labels, 0) or 1e-300)
        for labels in ctc.keys() | rnnt.keys()
    }
    # A frame that CTC is as good as certain is blank is taken for it by both.
    slack = 0.01 if share in (0, 1) or log_probs[:, BLANK].max() < math.log(0.995) else 8.0
    # CTC cannot have said a token twice before there was a frame for the blank in between; such a
    # prefix is dropped by a search of both, and what RNN-T had in it too.
    exact = [
        score
        for labels, score in scores.items()
        if share in (0, 1) or all(a != b for a, b in itertools.pairwise(labels))
    ]
    assert scores[said] >= max(exact) - slack


@settings(max_examples=30)
@given(log_probs=posteriors, cut=st.integers(0, 6), share=shares)
def test_in_pieces_is_at_once(log_probs: Float64, cut: int, share: float) -> None:
    parts = Runner(beam(share))
    said = settled(parts.accept(log_probs[:cut])) + parts.said(log_probs[cut:])
    assert said == Runner(beam(share)).said(log_probs)


@settings(max_examples=30)
@given(log_probs=posteriors)
def test_a_beam_of_one_without_words_is_greedy_with_one_token_a_frame(log_probs: Float64) -> None:
    single = log_probs.astype(np.float32)
    greedy = RnntGreedy(Transducer(Tables(), blank=BLANK), blank=BLANK, max_symbols=1)
    job = Job(greedy.start(Settings()), {"joiner": single}, 0, Endpointer(None, 0.04))
    ((frames, _),) = greedy.decode([job])
    found = Runner(beam(0.0, BeamRules(beam=1)))
    tokens = [t for f in found.accept(single) for t in f.tokens] + list(found.state.flush())
    expected = [token for frame in frames for token in frame.tokens]
    assert [t[:2] for t in tokens] == [t[:2] for t in expected]
    assert [t.logp for t in tokens] == pytest.approx([t.logp for t in expected], abs=1e-5)


@settings(max_examples=20)
@given(
    lines=st.lists(posteriors, min_size=2, max_size=5),
    cut=st.integers(0, 6),
    share=shares,
    penalties=st.lists(st.sampled_from([0.0, 1.0]), min_size=5, max_size=5),
)
def test_batched_is_single(
    lines: list[Float64], cut: int, share: float, penalties: list[float]
) -> None:
    rules = BeamRules(beam=3, margin=6.0)
    decoder = beam(share, rules)
    alone = [
        Runner(beam(share, rules), blank_penalty=penalty).said(line)
        for line, penalty in zip(lines, penalties, strict=False)
    ]
    runners = [Runner(decoder, blank_penalty=p) for _, p in zip(lines, penalties, strict=False)]
    said: list[list[int]] = [[] for _ in lines]
    for start, stop, order in ((0, cut, 1), (cut, 6, -1)):
        members = list(range(len(lines)))[::order]
        jobs = [runners[i].job(lines[i][start:stop]) for i in members]
        for i, (frames, state) in zip(members, decoder.decode(jobs), strict=True):
            runners[i].state = state
            said[i] += settled(frames)
    assert [s + ids(r.state.flush()) for s, r in zip(said, runners, strict=True)] == alone


@pytest.mark.parametrize("share", SHARES)
def test_a_search_is_a_value(share: float) -> None:
    decoder = beam(share, BeamRules())
    random = np.random.default_rng(1)
    first, *others = (np.log(random.dirichlet([0.5] * V, 8) + 1e-4) for _ in range(4))
    ((_, state),) = decoder.decode([Runner(decoder).job(first)])

    def go_on(rows: NDArray[Any]) -> tuple[list[Frame], tuple[Token, ...]]:
        runner = Runner(decoder)
        runner.state, runner.at = state, 8
        return runner.accept(rows), runner.state.flush()

    once = [go_on(rows) for rows in others]
    assert [go_on(rows) for rows in others] == once
    assert len({str(result) for result in once}) == len(others)


def test_one_call_a_frame_for_all_hypotheses_and_streams() -> None:
    model = Tables()
    decoder = beam(0.0, BeamRules(beam=4), model=model)
    random = np.random.default_rng(0)
    runners = [Runner(decoder) for _ in range(3)]
    for _ in range(3):
        jobs = [r.job(np.log(random.dirichlet([0.5] * V, 8) + 1e-4)) for r in runners]
        for runner, (_, state) in zip(runners, decoder.decode(jobs), strict=True):
            runner.state = state
    model.calls.clear()
    jobs = [r.job(np.log(random.dirichlet([0.5] * V, 8) + 1e-4)) for r in runners]
    decoder.decode(jobs)
    joins = [rows for name, rows in model.calls if name == "join"]
    assert len(joins) == 8
    assert all(3 <= rows <= 12 for rows in joins)
    # Sixteen contexts of two tokens there are, and all have been seen.
    assert sum(rows for name, rows in model.calls if name == "step") <= 2


def test_what_all_agree_on_is_settled_and_the_rest_is_pending() -> None:
    stream = Runner(beam(1.0, BeamRules(margin=3.0)))
    assert settled(stream.accept(rows([A, A, BLANK, B], 0.99))) == [A, B]
    unsure = rows([C])
    unsure[0, [B, C]] = np.log([0.45, 0.53])
    stream.accept(rows([BLANK], 0.99))
    assert settled(stream.accept(unsure)) == []
    assert ids(stream.state.pending) == [C]
    assert stream.state.pending[0].frame == 5
    assert ids(stream.state.flush()) == [C]


@pytest.mark.parametrize("share", SHARES)
def test_a_doubt_that_lasts_is_settled_at_the_horizon(share: float) -> None:
    stream = Runner(beam(share, BeamRules(horizon=10, margin=20.0)))
    unsure = rows([C])
    unsure[0, [A, C]] = np.log([0.4, 0.55])
    assert settled(stream.accept(unsure)) == []
    assert settled(stream.accept(rows([BLANK] * 5, 0.9))) == []
    assert stream.state.pending
    assert settled(stream.accept(rows([BLANK] * 5, 0.9)))


@pytest.mark.parametrize("share", SHARES)
def test_the_same_token_again_after_an_endpoint(share: float) -> None:
    stream = Runner(beam(share))
    pause = EndpointRules(trailing_silence=0.2)
    frames = stream.accept(6 * rows([A] + [BLANK] * 6 + [A, BLANK], 0.9), pause)
    assert next((f.number, ids(f.tokens)) for f in frames if f.tokens) == (5, [A])
    assert [f.speech for f in frames] == [True, *[False] * 6, True, False]
    again = settled(frames)[1:] + ids(stream.state.flush())
    assert again == [A]


@pytest.mark.parametrize("share", SHARES)
def test_memory_is_flat(share: float) -> None:
    stream = Runner(beam(share, BeamRules(beam=8, horizon=20, margin=1000.0)))
    random = np.random.default_rng(0)
    for _ in range(150):
        stream.accept(np.log(random.dirichlet([0.3] * V, 8) + 1e-4))
        assert len(stream.state.hypotheses) <= 8
        assert max(len(h.tokens) for h in stream.state.hypotheses) <= 28
    assert all(math.isfinite(h.acoustic(share)) for h in stream.state.hypotheses)


# Words


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
    decoder = beam(1.0, BeamRules(word_bonus=0.0), unigrams(**{known: -1.0}))
    assert Runner(decoder).said(doubtful) == said


def test_a_session_without_language_model() -> None:
    doubtful = rows([A, B])
    doubtful[1, [BLANK, B]] = np.log([0.40, 0.55])
    decoder = beam(1.0, BeamRules(word_bonus=0.0), unigrams(a=-1.0))
    assert Runner(decoder).said(doubtful) == [A]
    assert Runner(decoder, lm_weight=0.0).said(doubtful) == [A, B]
    assert Runner(decoder, lm_weight=0.01).said(doubtful) == [A]  # "ab" is still no word


def test_an_unknown_word_costs_more_the_longer_it_is() -> None:
    rules = BeamRules(unknown=-5.0, unknown_letter=-2.0, word_bonus=0.5)
    fusion = Fusion(["", "▁abcd", "efgh", "i"], unigrams(a=-1.0), rules)
    words = fusion.start()
    for token, score in ((1, -5.0), (2, -5.0), (3, -7.0), (3, -9.0)):
        words = fusion.extend(words, token, 0.0)
        assert words.score == score
    assert fusion.finished(words) == -8.5
    # Now that it is over, nothing else is charged for it.
    assert fusion.extend(words, 1, 0.0).score == -8.5 - 5.0


def test_a_boundary_that_was_hardly_heard() -> None:
    """Of two words run together nothing is known but that they are too long for one."""
    pieces = ["", "▁leaders", "▁arrive", "arrive"]
    doubtful = np.log([[0.01, 0.97, 0.01, 0.01], [0.001, 0.009, 0.05, 0.94]])
    for letter, said in ((0.0, [1, 3]), (-1.0, [1, 2])):
        rules = BeamRules(word_bonus=0.0, unknown=-3.0, unknown_letter=letter)
        fusion = Fusion(pieces, unigrams(leaders=-2.0, arrive=-2.0), rules)
        decoder = BeamSearch(fusion, blank=BLANK, share=1.0)
        assert Runner(decoder).said(doubtful) == said


def test_word_bonus_brings_words() -> None:
    doubtful = rows([A, BLANK, C])
    doubtful[2, [BLANK, C]] = np.log([0.55, 0.41])
    model = unigrams(a=-2.0, c=-2.0)
    for bonus, said in ((0.0, [A]), (3.0, [A, C])):
        assert Runner(beam(1.0, BeamRules(word_bonus=bonus), model)).said(doubtful) == said


@pytest.mark.parametrize("share", SHARES)
def test_blank_penalty_brings_words(share: float) -> None:
    # Less sure than the predictor's table is opinionated.
    doubtful = 3 * rows([A, BLANK, C], 0.8)
    doubtful[2] = np.log([0.9, 0.01, 0.01, 0.08])
    lengths = [
        len(Runner(beam(share), blank_penalty=penalty).said(doubtful))
        for penalty in (-20.0, 0.0, 20.0)
    ]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_the_transducers_own_language_model_is_taken_off() -> None:
    model = unigrams(a=-1.0, c=-1.0)
    start = TABLE[0, BLANK] + TABLE[1, BLANK]
    likely, other = (A, C) if start[A] > start[C] else (C, A)
    # To the ear both are the same, so that the predictor decides.
    heard = np.full((1, V), -9.0)
    heard[0, [A, C]] = 0.0
    for weight, said in ((0.0, likely), (2.0, other)):
        rules = BeamRules(own_weight=weight, word_bonus=0.0)
        assert Runner(beam(0.0, rules, model)).said(heard) == [said]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beam": 0}, "got beam 0, expected 1 or more"),
        ({"ctc": 1.5}, r"got ctc 1\.5, expected a share from 0 to 1"),
        ({"lm_weight": -1.0}, r"got lm_weight -1\.0, expected a number, 0 or above"),
        ({"unknown": math.nan}, "got unknown nan, expected a number"),
    ],
)
def test_rules_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BeamRules(**wrong)
