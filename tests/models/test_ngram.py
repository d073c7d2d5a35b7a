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
from loquent.models.arpa import read_arpa, write_arpa
from loquent.models.data import DataError
from loquent.models.ngram import main, perplexity, read_sentences, train

TEXT = ["the cat sat", "the cat ran", "the dog sat", "a cat sat on the mat", "the cat sat on a dog"]

sentences = st.lists(
    st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=6).map(" ".join),
    min_size=1,
    max_size=40,
)


@settings(max_examples=50)
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
    manifest.write_text(
        '{"text": "a mouse", "licence": "CC-BY-4.0"}\n'
        '{"text": "no elk", "licence": "CC-BY-NC-3.0"}\n'
    )
    assert list(read_sentences(plain)) == ["the cat sat", "a cat ran"]
    out = tmp_path / "new" / "lm.npz"
    arguments = [str(p) for p in (plain, packed, manifest)]
    left_out = ["--exclude-licence", "NC", "--dev", str(plain)]
    assert main([*arguments, "-o", str(out), "--least", "1", "1", *left_out]) == 0
    said = capsys.readouterr().out
    assert "10 words of text, 9 words known" in said
    assert "a.txt: perplexity" in said
    known = Ngram.from_bytes(out.read_bytes()).ids.keys()
    assert {"dog", "mouse"} <= known
    assert "elk" not in known


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "x.jsonl"
    for line in ('{"words": 1}', '["words"]', "words"):
        bad.write_text(line + "\n")
        with pytest.raises(DataError, match=r"x.jsonl:1: .*text"):
            list(read_sentences(bad))
    with pytest.raises(DataError, match="no text"):
        train([], words=10, order=3, least=(1, 1))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.txt"), "-o", str(tmp_path / "out.npz")])
    assert "none.txt: cannot be read" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text("a b c\n")
    with pytest.raises(SystemExit):
        main([str(text), "-o", str(text)])
    assert "text.txt is an input, which the output would destroy" in capsys.readouterr().err
    assert text.read_text() == "a b c\n"


# ARPA files

ARPA = """\
made by hand

\\data\\
ngram 1=5
ngram 2=3
ngram 3=1

\\1-grams:
-99 <s> -0.5
-1.0 </s>
-2.0 <UNK>
-0.5 GOOD -0.3
-0.7 day

\\2-grams:
-0.2 <s> GOOD -0.1
-0.4 GOOD day
-0.3 day </s>

\\3-grams:
-0.05 <s> GOOD day

\\end\\
"""


def test_an_arpa_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "hand.arpa"
    path.write_text(ARPA)
    model = read_arpa(path)
    assert sorted(model.ids) == ["<s>", "<unk>", "day", "good"]
    good, day = model.ids["good"], model.ids["day"]
    ln10 = np.log(10)
    logp, state = model.score(model.start, good)
    assert logp == pytest.approx(-0.2 * ln10, abs=2e-3)
    assert model.score(state, day)[0] == pytest.approx(-0.05 * ln10, abs=2e-3)
    # No such pair: the backoff of <s> and the word by itself.
    assert model.score(model.start, day)[0] == pytest.approx((-0.5 - 0.7) * ln10, abs=4e-3)
    assert model.score((), model.unknown)[0] == pytest.approx(-2.0 * ln10, abs=4e-3)


@pytest.mark.parametrize("suffix", [".arpa", ".arpa.gz"])
@pytest.mark.parametrize("order", [2, 3])
def test_a_model_survives_arpa(tmp_path: Path, suffix: str, order: int) -> None:
    text = [f"{a} {b} {c}" for a in "abcd" for b in "bcde" for c in "xyxy"]
    model = train(text, words=100, order=order, least=(1, 1))
    write_arpa(model, tmp_path / f"lm{suffix}")
    again = read_arpa(tmp_path / f"lm{suffix}")
    assert again.words == model.words
    for sentence in ("a b x", "d e y a", "x x x", "a q y"):
        states = [model.start, again.start]
        for word in sentence.split():
            scores = []
            for i, m in enumerate((model, again)):
                logp, states[i] = m.score(states[i], m.ids.get(word, m.unknown))
                scores.append(logp)
            assert scores[1] == pytest.approx(scores[0], abs=5e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no model\n", "no .end., expected a whole ARPA file"),
        ("\\data\\\n\\1-grams:\n-1 a b c\n\\end\\\n", ":3: got 4 fields; expected a decimal"),
        ("\\data\\\n\\1-grams:\n-99 <s>\n\\end\\\n", "got no words, expected 1-grams"),
    ],
)
def test_arpa_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.arpa"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_arpa(path)


def test_arpa_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lm.arpa").write_text(ARPA)
    assert main(["--arpa", str(tmp_path / "lm.arpa"), "-o", str(tmp_path / "lm.npz")]) == 0
    assert "lm.arpa, 4 words known" in capsys.readouterr().out
    assert Ngram.from_bytes((tmp_path / "lm.npz").read_bytes()).order == 3
    with pytest.raises(SystemExit):
        main(["-o", str(tmp_path / "lm.npz")])
    assert "expected either text or --arpa FILE" in capsys.readouterr().err
