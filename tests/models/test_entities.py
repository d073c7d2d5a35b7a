"""Numbers and names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loquent.models.entities import Tally, name_positions, names_heard, number_errors
from loquent.models.scoring import Score, bootstrap
from loquent.models.text import normalise


@pytest.mark.parametrize(
    ("reference", "heard", "errors", "total"),
    [
        ("twenty-one cats", "twenty one cats", 0, 2),
        ("twenty-one cats", "twenty cats", 1, 2),
        ("seven cats", "eleven dogs", 1, 1),
        ("he won", "he one", 1, 0),
        ("the second", "the sick and", 0, 0),  # a second is mostly a time
        ("at 5", "at five", 1, 1),
        ("no number", "", 0, 0),
    ],
)
def test_numbers(reference: str, heard: str, errors: int, total: int) -> None:
    assert number_errors(reference, heard) == Tally(errors, total)


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        ("Anna met Bob and I'm glad I did.", ["bob"]),
        ("It ended. Then Anna-Lena came.", ["anna"]),
        ('He said "Come here" to Ms. Dlamini', ["ms"]),  # behind a full stop nobody can tell
        ("ALL CAPITALS HERE", []),
        ("no casing at all", []),
        ('Mr "Bob" Marley', ["marley"]),
        ("", []),
    ],
)
def test_names(raw: str, names: list[str]) -> None:
    words = normalise(raw).split()
    assert [words[i] for i in name_positions(raw)] == names


def test_names_heard() -> None:
    raw = "We saw Karabo and Thoko."
    assert names_heard(raw, "we saw karabo and toko") == Tally(1, 2)
    assert names_heard(raw.lower(), "we saw karabo and toko") == Tally()
    assert Tally().rate == 0


@given(st.text("aA.'\"- B\n1é", max_size=30))
def test_positions_are_of_normalised_words(raw: str) -> None:
    words = normalise(raw).split()
    assert all(0 <= i < len(words) for i in name_positions(raw))


def test_bootstrap() -> None:
    same = [Score(1, 4, 2, 16, 1)] * 50
    wer, cer = bootstrap(same)
    assert (wer.low, wer.high, cer.low, cer.high) == (0.25, 0.25, 0.125, 0.125)
    mixed = [Score(i % 2 * 10, 10, 0, 40, 1) for i in range(100)]
    wer, _ = bootstrap(mixed)
    # The standard error of a mean of 100 coins is 0.05.
    assert wer.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert wer.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)
    assert wer.half == pytest.approx(0.098, abs=0.01)
    assert bootstrap(mixed) == bootstrap(mixed)
    assert bootstrap([])[0].high == 0
