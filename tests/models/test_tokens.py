"""Subwords, and what transcripts are before they become subwords."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from loquent.models.text import edit_distance, normalise
from loquent.models.tokens import BLANK, BLANK_PIECE, Tokenizer

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "don't pack my box with five dozen liquor jugs",
    "how vexingly quick daft zebras jump",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(SENTENCES, 40)


@given(
    words=st.lists(
        st.text(alphabet="abcdefghijklmnopqrstuvwxyz'", min_size=1, max_size=8), max_size=6
    )
)
def test_round_trip(tokenizer: Tokenizer, words: list[str]) -> None:
    text = " ".join(words)
    ids = tokenizer.encode(text)
    assert BLANK not in ids
    assert all(0 <= i < tokenizer.size for i in ids)
    assert tokenizer.decode(ids) == text


def test_sizes_and_pieces(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.pieces()
    assert tokenizer.size == len(pieces) == len(set(pieces)) == 40
    assert pieces[BLANK] == BLANK_PIECE
    assert any(piece.startswith("▁") for piece in pieces)


def test_an_unknown_letter_is_one_token(tokenizer: Tokenizer) -> None:
    assert 1 in tokenizer.encode("fox ж dog")


def test_survives_a_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokens.spm"
    path.write_bytes(tokenizer.model)
    again = Tokenizer.load(path)
    assert again.pieces() == tokenizer.pieces()
    assert again.encode(SENTENCES[0]) == tokenizer.encode(SENTENCES[0])


def test_a_model_without_our_blank_is_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(prefix),
        vocab_size=36,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="id 0 is '<unk>', expected '<blank>'"):
        Tokenizer.load(prefix.with_suffix(".model"))


@pytest.mark.parametrize("vocab", [5, 100000])
def test_an_impossible_vocabulary_is_refused(vocab: int) -> None:
    with pytest.raises(ValueError, match=f"cannot learn {vocab} subwords from this text"):
        Tokenizer.train(SENTENCES, vocab)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("Don’t stop", "don't stop"),
        ("'quoted' rock 'n' roll", "quoted rock n roll"),
        ("well-known — or not", "well known or not"),
        ("  a\t b\n", "a b"),
        ("e\u0301te\u0301", "été"),
        ("Straße", "straße"),
        ("हिन्दी", "हिन्दी"),
        ("50% off", "50 off"),
        ("...", ""),
        ("yes,no;maybe...or not", "yes no maybe or not"),
        ("3,000 at 5:30", "3000 at 530"),
        ("the U.S. and e.g. others", "the us and eg others"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(st.text())
def test_normalise_is_idempotent(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert once == once.strip()
    assert "  " not in once


@given(st.text(alphabet="ab", max_size=8), st.text(alphabet="ab", max_size=8))
def test_edit_distance_is_a_metric(a: str, b: str) -> None:
    distance = edit_distance(a, b)
    assert distance == edit_distance(b, a)
    assert (distance == 0) == (a == b)
    assert abs(len(a) - len(b)) <= distance <= max(len(a), len(b))


@pytest.mark.parametrize("model", [b"", b"nothing of the kind"])
def test_garbage_is_refused(model: bytes) -> None:
    with pytest.raises(ValueError, match="SentencePiece model: "):
        Tokenizer(model)
