"""The automaton of hotwords: what it pays and takes back, however the words are spelled."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loquent.engine.errors import ConfigError
from loquent.engine.hotwords import MAX_PHRASES, Hotword, HotwordGraph

PIECES = ["<blank>", "<unk>", "▁", "▁a", "▁b", "a", "b", "c", "ab", "▁ab", "ca", "'", "<0xC3>"]
ID = {piece: i for i, piece in enumerate(PIECES)}


def graph(*phrases: str, boost: float = 1.0) -> HotwordGraph:
    return HotwordGraph([Hotword(phrase=p, boost=boost) for p in phrases], PIECES, 0)


def paid(of: HotwordGraph, tokens: list[int], *, finish: bool = True) -> float:
    total, state = 0.0, of.start
    for token in tokens:
        bias = of.bias(state)
        gain, state = of.step(state, token)
        assert bias[token] == pytest.approx(gain, abs=1e-5)
        total += gain
    return total + (of.finish(state) if finish else 0.0)


def spell(*pieces: str) -> list[int]:
    return [ID[piece] for piece in pieces]


def test_pays_in_advance_and_takes_back() -> None:
    words = graph("abc")  # ▁ab c: two subwords, four characters
    assert paid(words, spell("▁a"), finish=False) == 1.0
    assert paid(words, spell("▁a")) == 0.0
    assert paid(words, spell("▁ab", "c")) == 2.0
    assert paid(words, spell("▁", "a", "b", "c")) == 2.0
    assert paid(words, spell("▁ab", "a")) == 0.0
    assert paid(words, spell("▁b", "▁ab", "c", "▁a")) == 2.0
    # Not in the middle of a word, at neither side.
    assert paid(words, spell("▁b", "ab", "c")) == 0.0
    assert paid(words, spell("▁ab", "c", "a")) == 0.0
    # Blank and what spells nothing leave everything as it is.
    assert words.step(words.step(words.start, ID["▁a"])[1], 0) == (0.0, (2, 0.0))
    assert words.bias(words.step(words.start, ID["▁a"])[1])[[0, 1, 12]].tolist() == [0, 0, 0]


def test_phrases_that_share_words() -> None:
    both = graph("a b", "a b c", "b a")
    assert paid(both, spell("▁a", "▁b")) == pytest.approx(2.0)
    assert paid(both, spell("▁a", "▁b", "▁", "c")) == pytest.approx(4.0)
    # Leaving the longer phrase keeps the shorter one.
    assert paid(both, spell("▁a", "▁b", "▁", "a", "c")) == pytest.approx(2.0)
    # One phrase begins with the end of another.
    assert paid(both, spell("▁a", "▁b", "▁a")) == pytest.approx(2.0)
    assert paid(graph("a b c", "b a"), spell("▁a", "▁b", "▁a")) == pytest.approx(2.0)
    assert paid(both, spell("▁a", "▁b", "▁ab", "▁b", "▁a")) == pytest.approx(4.0)


@pytest.mark.parametrize(("phrases", "share"), [(1, 1.0), (100, 1.0), (1000, 0.75)])
def test_a_phrase_counts_for_less_in_a_long_list(phrases: int, share: float) -> None:
    words = ("".join(letters) for letters in itertools.product("abc", repeat=8))
    fill = itertools.islice((word for word in words if word != "abcabcab"), phrases - 1)
    of = graph("abcabcab", *fill)
    alone = paid(graph("abcabcab"), spell("▁ab", "ca", "b", "ca", "b"))
    assert alone > 1
    assert paid(of, spell("▁ab", "ca", "b", "ca", "b")) == pytest.approx(share * alone)


def test_boost_is_for_each_phrase() -> None:
    words = HotwordGraph([Hotword(phrase="A", boost=3.0), Hotword(phrase="ab", boost=1)], PIECES, 0)
    assert words.words == {"a", "ab"}
    assert paid(words, spell("▁a")) == 3.0
    assert paid(words, spell("▁a", "b")) == 1.0
    assert paid(words, spell("▁a", "c")) == 0.0


TEXT = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=6)


def every_spelling(text: str, draw: st.DrawFn) -> list[int]:
    tokens = []
    while text:
        fits = [i for i, p in enumerate(PIECES) if i > 1 and text.startswith(p)]
        tokens.append(draw(st.sampled_from(fits)))
        text = text.removeprefix(PIECES[tokens[-1]])
    return tokens


@st.composite
def spelled(draw: st.DrawFn) -> tuple[list[str], list[int]]:
    words = draw(TEXT)
    return words, every_spelling("".join("▁" + word for word in words), draw)


PHRASES = st.lists(st.lists(st.text("abc", min_size=1, max_size=2), min_size=1, max_size=2))


@given(spelled(), PHRASES)
def test_the_sum_is_what_the_phrases_said_are_worth(
    said: tuple[list[str], list[int]], phrases: list[list[str]]
) -> None:
    words, tokens = said
    of = graph(*(" ".join(phrase) for phrase in phrases))
    total = paid(of, tokens)
    found = [
        paid(graph(" ".join(phrase)), [ID[c] for word in phrase for c in ["▁", *word]])
        for phrase in {tuple(p) for p in phrases}
        for at in range(len(words))
        if words[at : at + len(phrase)] == list(phrase)
    ]
    # Phrases that overlap count as the better of them, so the sum of all is the most.
    assert max(found, default=0.0) - 1e-6 <= total <= sum(found) + 1e-6
    if all(len(phrase) == 1 for phrase in phrases):
        assert total == pytest.approx(sum(found))
    state = of.start
    for token in tokens:
        assert of.bias(state) == pytest.approx(
            np.array([of.step(state, t)[0] for t in range(len(PIECES))]), abs=1e-5
        )
        state = of.step(state, token)[1]


@pytest.mark.parametrize(
    ("phrase", "message"),
    [
        ("  ", "got an empty hotword, expected one or more words"),
        ("a" * 101, "of 101 characters, expected at most 100"),
        ("a+b", r"got the hotword 'a\+b', but this model cannot spell the character '\+'"),
        ("ab9", "cannot spell the character '9'; write it as it is said"),
        ("日本", "cannot spell the character '日'"),
        ("...", "cannot spell these characters together"),
    ],
)
def test_phrases_that_do_not_work(phrase: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        graph(phrase)


def test_casing_and_punctuation_do_not_matter() -> None:
    assert graph("A-b, CA’b!").words == {"a", "b", "ca'b"}
    upper = HotwordGraph([Hotword(phrase="ab", boost=1.5)], ["<blank>", "▁A", "B"], 0)
    assert paid(upper, [1, 2]) == 3.0


def test_limits() -> None:
    with pytest.raises(ConfigError, match=f"got {MAX_PHRASES + 1} hotwords, expected at most"):
        HotwordGraph([Hotword(phrase="a")] * (MAX_PHRASES + 1), PIECES, 0)
    for boost in (0.0, -1.0, 11.0, math.nan):
        with pytest.raises(ConfigError, match=r"got boost .* for the hotword 'a', expected"):
            Hotword(phrase="a", boost=boost)


def test_parse() -> None:
    assert Hotword.parse("New York") == Hotword(phrase="New York")
    assert Hotword.parse(" New York : 2.5") == Hotword(phrase="New York", boost=2.5)
    with pytest.raises(ConfigError, match="expected PHRASE or PHRASE:BOOST with a number"):
        Hotword.parse("New York:much")
