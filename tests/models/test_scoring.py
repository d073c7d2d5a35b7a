"""Error rates against jiwer's, and the greedy CTC path."""

from __future__ import annotations

import itertools

import jiwer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loquent.models.scoring import Score, ctc_greedy

words = st.lists(st.sampled_from(["a", "b", "ab", "cab", "don't"]), max_size=8).map(" ".join)
pairs = st.tuples(words.filter(bool), words)


@given(pairs)
def test_one_pair_is_scored_as_jiwer_does(pair: tuple[str, str]) -> None:
    reference, hypothesis = pair
    score = Score.of(reference, hypothesis)
    assert score.wer == pytest.approx(jiwer.wer(reference, hypothesis))
    assert score.cer == pytest.approx(jiwer.cer(reference, hypothesis))
    assert score.utterances == 1


@given(st.lists(pairs, min_size=1, max_size=5))
def test_sums_are_scored_as_jiwer_does(rows: list[tuple[str, str]]) -> None:
    total = sum((Score.of(*row) for row in rows), Score())
    references, hypotheses = (list(column) for column in zip(*rows, strict=True))
    assert total.wer == pytest.approx(jiwer.wer(references, hypotheses))
    assert total.cer == pytest.approx(jiwer.cer(references, hypotheses))
    assert total.utterances == len(rows)


def test_both_sides_are_normalised() -> None:
    assert Score.of("Hello, world!", "hello WORLD").wer == 0


def test_nothing_said_and_something_heard() -> None:
    score = Score.of("", "hello you")
    assert (score.word_errors, score.words) == (2, 0)
    assert score.wer == 2
    assert Score().wer == Score().cer == 0


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([], []),
        ([0, 0, 0], []),
        ([3, 3, 0, 3, 4, 4], [3, 3, 4]),
        ([1, 0, 2, 2, 1, 1, 0], [1, 2, 1]),
    ],
)
def test_ctc_greedy(labels: list[int], expected: list[int]) -> None:
    assert ctc_greedy(labels, blank=0) == expected


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 3))
def test_ctc_greedy_groups_then_drops_blanks(labels: list[int], blank: int) -> None:
    runs = [label for label, _ in itertools.groupby(labels)]
    assert ctc_greedy(labels, blank) == [label for label in runs if label != blank]
