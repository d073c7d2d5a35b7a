"""Both decoders on hand-written posteriors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loquent.engine.decode import Token
from loquent.engine.decode.ctc import CtcGreedy
from loquent.engine.decode.rnnt import RnntGreedy, RnntState

BLANK, A, B, C = range(4)


def log_probs(best: list[int], confidence: float = 0.7) -> NDArray[np.float32]:
    """One row per frame with `best` at `confidence` and the rest spread over the others."""
    probs = np.full((len(best), 4), (1 - confidence) / 3, np.float32)
    probs[np.arange(len(best)), best] = confidence
    return np.log(probs)


# CTC


def test_ctc_merges_repeats_and_drops_blanks() -> None:
    frames = CtcGreedy(BLANK).accept(log_probs([BLANK, A, A, BLANK, A, B, B, BLANK]), 10)
    assert [token.id for frame in frames for token in frame.tokens] == [A, A, B]
    assert [token.frame for frame in frames for token in frame.tokens] == [11, 14, 15]
    assert [frame.number for frame in frames] == list(range(10, 18))
    assert [frame.speech for frame in frames] == [False, True, True, False, True, True, True, False]
    assert frames[1].tokens[0].logp == pytest.approx(np.log(0.7))


@given(best=st.lists(st.integers(0, 3), max_size=30), cuts=st.lists(st.integers(0, 30)))
def test_ctc_in_pieces_is_ctc_at_once(best: list[int], cuts: list[int]) -> None:
    rows = log_probs(best)
    whole = CtcGreedy(BLANK).accept(rows, 0)
    decoder = CtcGreedy(BLANK)
    edges = sorted({0, len(best), *(cut for cut in cuts if cut < len(best))})
    pieces = [
        frame
        for start, stop in itertools.pairwise(edges)
        for frame in decoder.accept(rows[start:stop], start)
    ]
    assert pieces == whole


def test_ctc_keeps_its_last_symbol_over_a_chunk_edge() -> None:
    decoder = CtcGreedy(BLANK)
    first = decoder.accept(log_probs([A, A]), 0)
    second = decoder.accept(log_probs([A, BLANK, A]), 2)
    assert [f.tokens != () for f in first + second] == [True, False, False, False, True]


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


def test_rnnt_emits_several_tokens_in_a_frame_and_remembers() -> None:
    greedy = RnntGreedy(Script(), blank=BLANK)
    batch = greedy.begin([greedy.start])
    said = [
        [token for token, _ in batch.frame(np.array([x], np.float32), [0])[0]]
        for x in (frame(A, B), frame(), frame(B), frame(C), frame(A))
    ]
    # The second B and the last A are not after what was said last.
    assert said == [[A, B], [], [], [C], []]


def test_rnnt_scores_are_log_probabilities() -> None:
    greedy = RnntGreedy(Script(), blank=BLANK)
    ((_, score),) = greedy.begin([greedy.start]).frame(np.array([frame(A)], np.float32), [0])[0]
    assert score == pytest.approx(2 - np.log(np.exp(2) + 3))


def test_rnnt_stops_after_max_symbols() -> None:
    greedy = RnntGreedy(Script(endless=True), blank=BLANK, max_symbols=3)
    batch = greedy.begin([greedy.start])
    found = batch.frame(np.array([frame(B)], np.float32), [0])
    assert [token for token, _ in found[0]] == [B, B, B]


def test_rnnt_loops_only_over_streams_that_emitted() -> None:
    script = Script()
    greedy = RnntGreedy(script, blank=BLANK)
    batch = greedy.begin([greedy.start] * 4)
    enc = np.array([frame(), frame(A), frame(A, B), frame()], np.float32)
    found = batch.frame(enc, [0, 1, 2, 3])
    assert [[token for token, _ in row] for row in found] == [[], [A], [A, B], []]
    assert script.rows == [4, 2, 1]


def test_rnnt_reset_lets_the_same_token_come_again() -> None:
    greedy = RnntGreedy(Script(), blank=BLANK)
    batch = greedy.begin([greedy.start, greedy.start])
    enc = np.array([frame(A), frame(A)], np.float32)
    batch.frame(enc, [0, 1])
    batch.reset(1)
    assert [len(row) for row in batch.frame(enc, [0, 1])] == [0, 1]
    # The start is shared by all streams that ever begin: nobody may have written to it.
    assert [len(row) for row in greedy.begin([greedy.start]).frame(enc[:1], [0])] == [1]


@given(
    lines=st.lists(
        st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=8), min_size=1, max_size=5
    ),
    cut=st.integers(0, 8),
)
def test_rnnt_batched_is_single(lines: list[list[list[int]]], cut: int) -> None:
    greedy = RnntGreedy(Script(), blank=BLANK)

    def together(
        rows: list[int], states: list[RnntState], start: int, stop: int
    ) -> tuple[dict[int, list[Token]], list[RnntState]]:
        batch = greedy.begin(states)
        said: dict[int, list[Token]] = {row: [] for row in rows}
        for k in range(start, stop):
            here = [i for i, row in enumerate(rows) if k < len(lines[row])]
            if not here:
                break
            enc = np.array([frame(*lines[rows[i]][k]) for i in here], np.float32)
            for i, tokens in zip(here, batch.frame(enc, here), strict=True):
                said[rows[i]] += [Token(token, k, score) for token, score in tokens]
        return said, batch.states()

    alone = {}
    for row in range(len(lines)):
        alone.update(together([row], [greedy.start], 0, 8)[0])
    everybody = list(range(len(lines)))
    first, states = together(everybody, [greedy.start] * len(lines), 0, cut)
    # The second half in the opposite order: state belongs to the stream, not to the row.
    second, _ = together(everybody[::-1], states[::-1], cut, 8)
    assert {row: first[row] + second[row] for row in everybody} == alone
