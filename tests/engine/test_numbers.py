"""Spoken numbers to digits: examples, and what was spelled out comes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loquent.engine.numbers import format_numbers
from loquent.models.spoken import cardinal, ordinal, spoken, year

SOME = "one two ten twenty hundred thousand million and point oh five a am dollars cents first may"
WORDS = [*SOME.split(), "march", "at", "percent", "of"]


def written(text: str) -> str:
    return " ".join(span.text for span in format_numbers(text.split()))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("i need twenty five dollars", "i need $25"),
        ("it costs ten dollars and fifty cents", "it costs $10.50"),
        ("three point five million dollars", "$3.5 million"),
        ("one dollar", "$1"),
        ("he weighs two hundred pounds", "he weighs 200 pounds"),
        ("fifty cents", "50 cents"),
        ("we meet at ten thirty a m", "we meet at 10:30 am"),
        ("at nine oh five", "at 9:05"),
        ("at five thirty", "at 5:30"),
        ("five o'clock sharp", "5 o'clock sharp"),
        ("at twenty dollars", "at $20"),
        ("five pm", "5 pm"),
        ("march first twenty twenty six", "march 1st 2026"),
        ("the first of march", "the 1st of march"),
        ("the twenty first of june", "the 21st of june"),
        ("june five", "june 5"),
        ("june five hundred people came", "june 500 people came"),
        ("on may first", "on may 1st"),
        ("nineteen eighty four", "1984"),
        ("nineteen oh five", "1905"),
        ("two thousand and six", "2006"),
        ("nineteen hundred", "1900"),
        ("twenty percent", "20%"),
        ("five per cent", "5%"),
        ("zero point five", "0.5"),
        ("two hundred and five people", "205 people"),
        ("twelve thousand five hundred", "12,500"),
        ("six hundred thousand", "600,000"),
        ("two million people", "2 million people"),
        ("five five five one two oh four", "5551204"),
        ("about twenty or thirty", "about 20 or 30"),
        ("june five twenty twenty six", "june 5 2026"),
        ("june nineteen twenty twenty six", "june 19 2026"),
        ("ten eleven twelve thirteen fourteen", "10 11 12 13 14"),
        ("thirteen fourteen fifteen sixteen", "13 14 15 16"),
        ("at seven am", "at 7 am"),
        # Words that stay words.
        ("you may first of all check", "you may first of all check"),
        ("they march second in line", "they march second in line"),
        ("which one am i", "which one am i"),
        ("at one point two men came", "at one point two men came"),
        ("no one knows", "no one knows"),
        ("one of the two", "one of the two"),
        ("he was first", "he was first"),
        ("from two to three", "from two to three"),
        ("a hundred reasons", "a hundred reasons"),
        ("thousands of people", "thousands of people"),
        ("a second chance", "a second chance"),
        ("", ""),
    ],
)
def test_examples(said: str, expected: str) -> None:
    assert written(said) == expected


def test_no_number_goes_beyond_a_comma() -> None:
    words = ["twenty", "five", "dollars"]
    spans = format_numbers(words, [True, False, False])
    assert [span.text for span in spans] == ["20", "$5"]


@given(st.integers(10, 999_999))
def test_whole_numbers_come_back(value: int) -> None:
    text = f"{value:,}" if value >= 10_000 else str(value)
    assert written(cardinal(value)) == text
    assert written(f"about {cardinal(value)} dollars") == f"about ${text}"


@given(st.integers(1300, 2099))
def test_years_come_back(value: int) -> None:
    assert written(f"in {year(value)}") == f"in {value}"


@given(st.integers(1, 31), st.integers(1, 12), st.integers(1, 59), st.sampled_from(["am", "pm"]))
def test_dates_and_times_come_back(day: int, hour: int, minute: int, half: str) -> None:
    clock = f"{hour}:{minute:02}"
    said = f"june {ordinal(day)} {spoken(clock)} {half}"
    assert written(said).startswith(f"june {day}")
    assert written(said).endswith(f" {clock} {half}")


@given(
    st.lists(
        st.sampled_from(WORDS),
        max_size=9,
    ),
    st.data(),
)
def test_every_word_is_covered_once(words: list[str], data: st.DataObject) -> None:
    breaks = data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words)))
    spans = format_numbers(words, breaks)
    assert [span.start for span in spans] == [0, *[span.end for span in spans]][: len(spans)]
    assert (spans[-1].end if spans else 0) == len(words)
    assert all(span.text for span in spans)
