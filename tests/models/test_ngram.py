"""``loquent lm``: smoothing that sums to one, and files that can be trusted."""

from __future__ import annotations

import lzma
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loquent.engine.ngram import Ngram
from loquent.models.data import DataError
from loquent.models.ngram import main, perplexity, read_sentences, train

TEXT = ["the cat sat", "the cat ran", "the dog sat", "a cat sat on the mat", "the cat sat on a dog"]

sentences = st.lists(
    st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=6).map(" ".join),
    min_size=1,
    max_size=40,
)


@settings(deadline=None, max_examples=50)
@given(
    text=sentences,
    order=st.sampled_from([2, 3]),
    words=st.integers(2, 9),
    least=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_every_distribution_sums_to_one(
    text: list[str], order: int, words: int, least: tuple[int, int]
) -> None:
    model = train(text, words=words, order=order, least=least)
    states = {model.start, ()}
    for line in text:
        state = model.start
        for word in line.split():
            _, state = model.score(state, model.ids.get(word, model.unknown))
            states.add(state)
    for state in states:
        total = sum(math.exp(model.score(state, i)[0]) for i in range(len(model.words)) if i != 1)
        assert total == pytest.approx(1.0, abs=0.01)  # float16 has three digits


def test_longer_contexts_know_more() -> None:
    def of(order: int) -> float:
        return perplexity(train(TEXT * 3, words=20, order=order, least=(1, 1)), TEXT)[0]

    assert of(3) < of(2) < 9


def test_kneser_ney_asks_how_many_words_come_before() -> None:
    # "francisco" is frequent but only ever follows "san".
    text = ["san francisco"] * 10 + [f"{x} glasses" for x in "abcdefgh"] + ["q"]
    model = train(text, words=30, order=2, least=(1, 1))
    after = (model.ids["q"],)
    francisco, glasses = (model.score(after, model.ids[w])[0] for w in ("francisco", "glasses"))
    assert glasses > francisco + 1


def test_round_trip(tmp_path: Path) -> None:
    model = train(TEXT, words=20, order=3, least=(1, 1))
    again = Ngram.from_bytes(model.to_bytes())
    assert again.words == model.words
    state = model.start
    for word in ["the", "cat", "sat", "on", "a", "mat"]:
        index = model.ids[word]
        assert again.score(state, index) == model.score(state, index)
        state = model.score(state, index)[1]


@pytest.mark.parametrize("damage", [b"", b"PK\3\4", b"no zip at all"])
def test_a_damaged_file_is_refused(damage: bytes) -> None:
    with pytest.raises(ValueError, match=r"language model|zip|pickle|empty|data"):
        Ngram.from_bytes(damage)


def test_arrays_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="without <s>"):
        Ngram(["<unk>", "x"], np.zeros(2, np.float16), np.zeros(2, np.float16), ())
    with pytest.raises(ValueError, match="3 probabilities for 2 words"):
        Ngram(["<unk>", "<s>"], np.zeros(3, np.float16), np.zeros(2, np.float16), ())


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, packed, manifest = (tmp_path / n for n in ("a.txt", "b.txt.xz", "c.jsonl"))
    plain.write_text("The cat sat.\n\nA CAT, ran!\n")
    packed.write_bytes(lzma.compress(b"the dog\n"))
    manifest.write_text('{"text": "a mouse"}\n')
    assert list(read_sentences(plain)) == ["the cat sat", "a cat ran"]
    out = tmp_path / "new" / "lm.npz"
    arguments = [str(p) for p in (plain, packed, manifest)]
    assert main([*arguments, "-o", str(out), "--least", "1", "1", "--dev", str(plain)]) == 0
    said = capsys.readouterr().out
    assert "10 words of text, 9 words known" in said
    assert "a.txt: perplexity" in said
    assert {"dog", "mouse"} <= Ngram.from_bytes(out.read_bytes()).ids.keys()


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "x.jsonl"
    bad.write_text('{"words": 1}\n')
    with pytest.raises(DataError, match=r"x.jsonl:1: .*text"):
        list(read_sentences(bad))
    with pytest.raises(DataError, match="no text"):
        train([], words=10, order=3, least=(1, 1))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.txt"), "-o", str(tmp_path / "out.npz")])
    assert "none.txt: cannot be read" in capsys.readouterr().err
