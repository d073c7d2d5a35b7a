"""Casing and punctuation learnt from text, and numbers as they are spoken."""

from __future__ import annotations

from pathlib import Path

import pytest

from loquent.engine.finish import Finisher
from loquent.models.finish import learn, main, parse, score, split
from loquent.models.spoken import cardinal, ordinal, spoken, year


def test_a_line_as_the_model_sees_it() -> None:
    line = parse('"Mr. Dick," said my aunt, "it\'s $5 -- have you seen NASA?"')
    assert line is not None
    assert " ".join(line.words) == "mr dick said my aunt it's five dollars have you seen nasa"
    assert line.marks == [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 3]
    # First words of sentences and spelled-out numbers teach nothing about casing.
    assert line.cases == [-100, 1, 0, 0, 0, 0, -100, -100, 0, 0, 0, 2]


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("word", "word"),
        ("$62", "sixty two dollars"),
        ("$1", "one dollar"),
        ("$10.50", "ten dollars and fifty cents"),
        ("9:20", "nine twenty"),
        ("9:05", "nine oh five"),
        ("10:30am", "ten thirty am"),
        ("3pm", "three pm"),
        ("1st", "first"),
        ("22nd", "twenty second"),
        ("20%", "twenty percent"),
        ("1984", "nineteen eighty four"),
        ("12,500", "twelve thousand five hundred"),
        ("007", "zero zero seven"),
        ("b52", None),
        ("1/2", None),
    ],
)
def test_numbers_as_they_are_spoken(token: str, expected: str | None) -> None:
    assert spoken(token) == expected


def test_parts_of_numbers() -> None:
    assert cardinal(1_000_001) == "one million one"
    assert ordinal(40) == "fortieth"
    assert year(1905) == "nineteen oh five"
    with pytest.raises(ValueError, match="got -1, expected 0 to 999999999"):
        cardinal(-1)


def test_learning_and_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["Anna", "Boston", "Paris", "London", "Peter"]
    lines = [f"The bus number {k} leaves for {names[k % 5]}, my friend." for k in range(10, 500)]
    lines += [f"Do you know {names[k % 5]} or {k}?" for k in range(10, 500)]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines))
    train, held = split([text])
    assert 5 < len(held) < 60
    assert not set(train) & set(held)
    model = learn(train, size=1 << 12, words=6000, epochs=3)
    result = score(model, held)
    assert result.casing > 0.98 > result.lowercase
    assert result.any_mark[2] > 0.9
    assert result.numbers > 0.9 * result.numbers_total > 0
    words = ["do", "you", "know", "boston", "or", "twenty"]
    assert model.finish(words) == ("Do you know Boston or 20?", False)

    out = tmp_path / "xx.npz"
    assert main([str(text), "-o", str(out), "--words", "3000", "--bits", "12"]) == 0
    assert "held out" in capsys.readouterr().out
    assert Finisher.read(out.read_bytes()).case(words, 3) == "Boston"

    for asked, message in (
        ([str(text), "-o", str(text)], "text.txt is an input, which the output would destroy"),
        ([str(tmp_path / "none.txt")], "none.txt: cannot be read as text"),
    ):
        with pytest.raises(SystemExit):
            main(asked)
        assert message in capsys.readouterr().err
    assert text.read_text() == "\n".join(lines)
