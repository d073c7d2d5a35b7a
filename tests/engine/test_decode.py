"""Both greedy decoders on hand-written posteriors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loquent.engine.decode import Frame, Token
from loquent.engine.decode.ctc import CtcGreedy, CtcState
from loquent.engine.decode.decoder import Job, Settings
from loquent.engine.decode.rnnt import RnntGreedy, RnntState
from loquent.engine.decode.transducer import Transducer
from loquent.engine.endpoint import Endpointer, EndpointRules

BLANK, A, B, C = range(4)


def log_probs(best: list[int], confidence: float = 0.7) -> NDArray[np.float32]:
    """One row per frame with `best` at `confidence` and the rest spread over the others."""
    probs = np.full((len(best), 4), (1 - confidence) / 3, np.float32)
    probs[np.arange(len(best)), best] = confidence
    return np.log(probs)


def endless() -> Endpointer:
    return Endpointer(None, 0.04)


# CTC


def ctc(state: CtcState, rows: NDArray[np.float32], first: int = 0) -> tuple[list[Frame], CtcState]:
    return CtcGreedy(blank=BLANK).decode([Job(state, {"ctc": rows}, first, endless())])[0]


def begin(penalty: float | None = None) -> CtcState:
    return CtcGreedy(blank=BLANK).start(Settings(blank_penalty=penalty))


def test_ctc_merges_repeats_and_drops_blanks() -> None:
    frames, _ = ctc(begin(), log_probs([BLANK, A, A, BLANK, A, B, B, BLANK]), 10)
    assert [token.id for frame in frames for token in frame.tokens] == [A, A, B]
    assert [token.frame for frame in frames for token in frame.tokens] == [11, 14, 15]
    assert [frame.number for frame in frames] == list(range(10, 18))
    assert [frame.speech for frame in frames] == [False, True, True, False, True, True, True, False]
    assert frames[1].tokens[0].logp == pytest.approx(np.log(0.7))


@given(best=st.lists(st.integers(0, 3), max_size=30), cuts=st.lists(st.integers(0, 30)))
def test_ctc_in_pieces_is_ctc_at_once(best: list[int], cuts: list[int]) -> None:
    rows = log_probs(best)
    whole, _ = ctc(begin(), rows)
    edges = sorted({0, len(best), *(cut for cut in cuts if cut < len(best))})
    pieces: list[Frame] = []
    state = begin()
    for start, stop in itertools.pairwise(edges):
        frames, state = ctc(state, rows[start:stop], start)
        pieces += frames
    assert pieces == whole


def test_ctc_keeps_its_last_symbol_over_a_chunk_edge() -> None:
    first, state = ctc(begin(), log_probs([A, A]))
    second, _ = ctc(state, log_probs([A, BLANK, A]), 2)
    assert [f.tokens != () for f in first + second] == [True, False, False, False, True]


@pytest.mark.parametrize("cut", range(1, 12))
def test_ctc_says_the_same_token_again_after_an_endpoint(cut: int) -> None:
    rows = log_probs([A, A, *[BLANK] * 8, A, A, B])
    decoder, state, heard = CtcGreedy(blank=BLANK), begin(), []
    for first, part in ((0, rows[:cut]), (cut, rows[cut:])):
        rules = Endpointer(EndpointRules(trailing_silence=0.2), 0.04)
        ((frames, state),) = decoder.decode([Job(state, {"ctc": part}, first, rules)])
        heard += [token.id for frame in frames for token in frame.tokens]
    assert heard == [A, A, B]


def test_ctc_blank_penalty_brings_tokens() -> None:
    rows = log_probs([BLANK, A])
    for penalty, said in ((None, [A]), (2.5, [B, A]), (-10.0, [])):
        rows[0, B] = np.log(0.11)
        frames, _ = ctc(begin(penalty), rows)
        assert [token.id for frame in frames for token in frame.tokens] == said


# RNN-T


class Script:
    """A transducer whose encoder frames list, as digits, what to emit: one vector entry per place.

    enc (B, 3) holds up to three token ids; the prediction's only entry counts the tokens since the
    last different frame, so that place n of the frame is due. State "n" (B,) is that count and
    "sum" (B, 2) is history, to see rows mixed up.
    """

    def __init__(self, *, endless: bool = False) -> None:
        self.initial: dict[str, NDArray[Any]] = {
            "said": np.zeros((1,), np.int64),
            "history": np.zeros((1, 2), np.float32),
        }
        self.rows: list[int] = []
        self.endless = endless

    def step(
        self, token: NDArray[np.int64], state: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        assert token.dtype == np.int64
        history = np.stack([state["history"][:, 1], token.astype(np.float32)], axis=1)
        said = state["said"] + (token != BLANK)
        return history.astype(np.float32), {"said": said, "history": history}

    def join(self, enc: NDArray[np.float32], pred: NDArray[np.float32]) -> NDArray[np.float32]:
        """Says the first of the frame's tokens that comes after the last token said."""
        assert len(enc) == len(pred)
        self.rows.append(len(enc))
        logits = np.zeros((len(enc), 4), np.float32)
        for row, (frame, history) in enumerate(zip(enc, pred, strict=True)):
            due = [int(x) for x in frame if self.endless or x > history[1]]
            logits[row, due[0] if due else BLANK] = 2.0
        return logits


def frame(*tokens: int) -> list[float]:
    return [float(x) for x in (*tokens, 0, 0, 0)[:3]]


def rnnt(script: Script, max_symbols: int = 3) -> RnntGreedy:
    return RnntGreedy(Transducer(script, blank=BLANK), blank=BLANK, max_symbols=max_symbols)


def job(
    state: RnntState, lines: list[list[float]], first: int = 0, rules: EndpointRules | None = None
) -> Job:
    frames = {"joiner": np.array(lines, np.float32).reshape(-1, 3)}
    return Job(state, frames, first, Endpointer(rules, 0.04))


def said(frames: list[Frame]) -> list[list[int]]:
    return [[token.id for token in frame.tokens] for frame in frames]


def test_rnnt_emits_several_tokens_in_a_frame_and_remembers() -> None:
    greedy = rnnt(Script())
    lines = [frame(A, B), frame(), frame(B), frame(C), frame(A)]
    ((frames, _),) = greedy.decode([job(greedy.start(Settings()), lines)])
    # The second B and the last A are not after what was said last.
    assert said(frames) == [[A, B], [], [], [C], []]


def test_rnnt_scores_are_log_probabilities() -> None:
    greedy = rnnt(Script())
    ((frames, _),) = greedy.decode([job(greedy.start(Settings()), [frame(A)], 7)])
    (token,) = frames[0].tokens
    assert token.frame == 7
    assert token.logp == pytest.approx(2 - np.log(np.exp(2) + 3))


def test_rnnt_stops_after_max_symbols() -> None:
    greedy = rnnt(Script(endless=True))
    ((frames, _),) = greedy.decode([job(greedy.start(Settings()), [frame(B)])])
    assert said(frames) == [[B, B, B]]


def test_rnnt_loops_only_over_streams_that_emitted() -> None:
    script = Script()
    greedy = rnnt(script)
    lines = [frame(), frame(A), frame(A, B), frame()]
    decoded = greedy.decode([job(greedy.start(Settings()), [line]) for line in lines])
    assert [said(frames)[0] for frames, _ in decoded] == [[], [A], [A, B], []]
    assert script.rows == [4, 2, 1]


def test_rnnt_predicts_once_for_the_same_tokens() -> None:
    class Counting(Script):
        steps = 0

        def step(
            self, token: NDArray[np.int64], state: Mapping[str, NDArray[Any]]
        ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
            self.steps += len(token)
            # Whole numbers only: the two tokens before, as a stateless predictor has them.
            pred, after = super().step(token, {"said": state["n"], "history": state["last"]})
            return pred, {"n": state["n"], "last": after["history"].astype(np.int64)}

    script = Counting()
    script.initial = {"n": np.zeros((1,), np.int64), "last": np.zeros((1, 2), np.int64)}
    greedy = rnnt(script)
    for _ in range(3):
        starts = [greedy.start(Settings()) for _ in range(4)]
        decoded = greedy.decode([job(state, [frame(A), frame(B)]) for state in starts])
        assert [said(frames) for frames, _ in decoded] == [[[A], [B]]] * 4
    assert script.steps == 3  # the start, after A, after A B


def test_rnnt_starts_anew_after_a_silence() -> None:
    greedy = rnnt(Script())
    lines = [frame(A), frame(), frame(), frame(A)]
    for rules, expected in (
        (None, [[A], [], [], []]),
        (EndpointRules(trailing_silence=0.08), [[A], [], [], [A]]),
    ):
        ((frames, _),) = greedy.decode([job(greedy.start(Settings()), lines, 0, rules)])
        assert said(frames) == expected


def test_rnnt_blank_penalty_brings_tokens() -> None:
    greedy = rnnt(Script())
    for penalty, expected in ((None, [[]]), (2.5, [[A, A, A]]), (-3.0, [[]])):
        start = greedy.start(Settings(blank_penalty=penalty))
        ((frames, _),) = greedy.decode([job(start, [frame()])])
        assert said(frames) == expected
    assert said(greedy.decode([job(greedy.start(Settings()), [frame(A)])])[0][0]) == [[A]]


@given(
    lines=st.lists(
        st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=8), min_size=1, max_size=5
    ),
    cut=st.integers(0, 8),
)
def test_rnnt_batched_is_single(lines: list[list[list[int]]], cut: int) -> None:
    greedy = rnnt(Script())

    def together(
        rows: list[int], states: list[RnntState], start: int, stop: int
    ) -> tuple[dict[int, list[Token]], list[RnntState]]:
        jobs = [
            job(state, [frame(*tokens) for tokens in lines[row][start:stop]], start)
            for row, state in zip(rows, states, strict=True)
        ]
        decoded = greedy.decode(jobs)
        tokens = {
            row: [token for frame in frames for token in frame.tokens]
            for row, (frames, _) in zip(rows, decoded, strict=True)
        }
        return tokens, [state for _, state in decoded]

    alone = {}
    for row in range(len(lines)):
        alone.update(together([row], [greedy.start(Settings())], 0, 8)[0])
    everybody = list(range(len(lines)))
    starts = [greedy.start(Settings()) for _ in lines]
    first, states = together(everybody, starts, 0, cut)
    # The second half in the opposite order: state belongs to the stream, not to the row.
    second, _ = together(everybody[::-1], states[::-1], cut, 8)
    assert {row: first[row] + second[row] for row in everybody} == alone
