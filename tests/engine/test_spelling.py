"""Misspelt words: what is near, what it becomes, and that nothing committed changes for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loquent.engine.audio import load_audio
from loquent.engine.bundle import Bundle
from loquent.engine.decode import Frame, Token
from loquent.engine.errors import BundleError, ConfigError
from loquent.engine.events import Event, Final, Partial
from loquent.engine.hotwords import Hotword, HotwordGraph
from loquent.engine.ngram import Ngram, Table
from loquent.engine.recognizer import Recognizer
from loquent.engine.spelling import Speller, SpellingRules
from loquent.engine.transcript import Transcript

NONE = SpellingRules(reach=0.0)


def ngram(words: dict[str, float], pairs: Iterable[tuple[str, str, float]] = ()) -> Ngram:
    """Single words, and what follows what, by natural logarithms."""
    ids = ["<unk>", "<s>", *words]
    logp = np.array([-20.0, -99.0, *words.values()], np.float16)
    rows = sorted((ids.index(a), ids.index(b), p) for a, b, p in pairs)
    counts = np.bincount([a for a, _, _ in rows], minlength=len(ids))
    table = Table(
        first=np.concatenate([[0], counts.cumsum()]).astype(np.uint32),
        word=np.array([b for _, b, _ in rows], np.uint16),
        logp=np.array([p for _, _, p in rows], np.float16),
        backoff=np.zeros(0, np.float16),
    )
    return Ngram(ids, logp, np.zeros(len(ids), np.float16), (table,))


def distance(a: str, b: str) -> float:
    """The plain definition, letter by letter."""
    vowels, alike = "aeiouy", ("ckqsxz", "dt", "bp", "fvw", "mn", "gj", "lr")

    def swap(x: str, y: str) -> float:
        if x == y:
            return 0.0
        if x in vowels and y in vowels:
            return 0.4
        return 0.5 if any(x in group and y in group for group in alike) else 1.0

    def gap(word: str, i: int) -> float:
        return 0.5 if word[i] in vowels or (i and word[i] == word[i - 1]) else 1.0

    row = [0.0]
    for j in range(len(b)):
        row.append(row[-1] + gap(b, j))
    for i, x in enumerate(a):
        following = [row[0] + gap(a, i)]
        for j, y in enumerate(b):
            following.append(
                min(row[j] + swap(x, y), row[j + 1] + gap(a, i), following[j] + gap(b, j))
            )
        row = following
    return row[-1]


words = st.text("abcdehlmst", min_size=1, max_size=9)


@given(st.sets(words, min_size=1, max_size=30), words, st.floats(0.0, 0.6))
def test_near_words_are_those_of_the_definition(known: set[str], word: str, reach: float) -> None:
    speller = Speller(ngram(dict.fromkeys(known, -1.0)), SpellingRules(reach=reach))
    limit = min(reach * len(word), 3.0)
    expected = {w: d for w in known if (d := distance(word, w)) <= limit - 1e-9}
    found = dict(speller.near(word))
    assert {w: found.get(w, math.inf) for w in expected} == pytest.approx(expected)
    assert all(distance(word, w) <= limit + 1e-9 for w in found)


def test_the_likeliest_near_word_is_taken() -> None:
    model = ngram(
        {"hobby": -9.0, "happy": -5.0, "the": -2.0, "weird": -9.0},
        [("weird", "hobby", -1.0), ("the", "happy", -6.0)],
    )
    speller = Speller(model, SpellingRules(weight=2.0))
    assert speller.fix("hopby", ["weird"]) == "hobby"
    assert speller.fix("hopby", ["the"]) == "happy"
    # What an edit costs decides with it.
    assert Speller(model, SpellingRules(weight=50.0)).fix("hopby", ["the"]) == "hobby"


def test_what_is_left_as_it_is() -> None:
    speller = Speller(ngram({"hobby": -9.0, "cat": -6.0, "cité": -9.0}), SpellingRules())
    for word in ("hobby", "cut", "h2bby", "hob'y", "zzzzzz", "привет", ""):
        assert speller.fix(word, []) == word
    assert speller.fix("hopby", [], known={"hopby"}) == "hopby"
    assert Speller(ngram({"hobby": -9.0}), NONE).fix("hopby", []) == "hopby"
    assert Speller(ngram({}), SpellingRules()).fix("hopby", []) == "hopby"
    # An accent is a small mistake.
    assert speller.fix("cite", []) == "cité"


PIECES = ["<blank>", "▁weird", "▁hop", "by", "▁the", "▁is"]


def token(piece: str, frame: int) -> Token:
    return Token(PIECES.index(piece), frame, -0.1)


def texts(events: list[Event]) -> list[tuple[str, ...]]:
    return [
        (e.committed, e.tentative) if isinstance(e, Partial) else (e.text,)
        for e in events
        if isinstance(e, Partial | Final)
    ]


def test_a_word_is_put_right_once_it_is_whole() -> None:
    speller = Speller(ngram({"hobby": -9.0, "weird": -9.0, "is": -3.0}), SpellingRules())
    transcript = Transcript(PIECES, 0.04, None, speller=speller)
    for frame, piece in enumerate(["▁weird", "▁hop", "by"]):
        transcript.accept([Frame(frame, (token(piece, frame),), True)])
        transcript.show()
    transcript.pending = (token("▁is", 3),)
    transcript.show()
    transcript.pending = ()
    transcript.show()
    transcript.accept([Frame(4, (token("▁is", 4),), True)])
    transcript.show()
    transcript.end(1.0)
    assert texts(transcript.events()) == [
        ("", "weird"),
        ("weird", "hop"),
        ("weird", "hopby"),
        ("weird", "hobby is"),
        ("weird", "hopby"),
        ("weird hobby", "is"),
        ("weird hobby is",),
    ]


def test_the_last_word_is_put_right_at_the_end_and_hotwords_never() -> None:
    speller = Speller(ngram({"hobby": -9.0}), SpellingRules())
    for hotwords, text in (
        (None, "hobby"),
        (HotwordGraph([Hotword(phrase="hopby", boost=1.0)], PIECES, 0), "hopby"),
    ):
        transcript = Transcript(PIECES, 0.04, None, speller=speller)
        transcript.expect(hotwords)
        for frame, piece in enumerate(["▁hop", "by"]):
            transcript.accept([Frame(frame, (token(piece, frame),), True)])
        transcript.end(1.0)
        assert texts(transcript.events())[-1] == (text,)


@given(st.lists(st.sampled_from(["▁hop", "by", "▁the", "▁is", "▁weird"]), max_size=12))
def test_committed_text_only_grows(pieces: list[str]) -> None:
    speller = Speller(ngram({"hobby": -9.0, "there": -3.0}), SpellingRules(reach=0.5))
    transcript = Transcript(PIECES, 0.04, None, speller=speller)
    before = ""
    for frame, piece in enumerate(pieces):
        transcript.accept([Frame(frame, (token(piece, frame),), True)])
        transcript.show()
        for event in transcript.events():
            assert isinstance(event, Partial)
            assert event.committed.startswith(before)
            before = event.committed
            assert f"{event.committed} {event.tentative}".split() == [w.text for w in event.words]
    transcript.end(1.0)
    for event in transcript.events():
        if isinstance(event, Final):
            assert event.text.startswith(before)


@pytest.mark.parametrize("decoder", ["joint", "ctc-beam", "ctc"])
def test_of_the_bundle_only_searches_with_words_have_it(
    decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    fix = Speller.fix

    def seen(self: Speller, word: str, *args: Any) -> str:
        asked.append(word)
        return fix(self, word, *args)

    monkeypatch.setattr(Speller, "fix", seen)
    recognizer = Recognizer.load("en")
    pcm = load_audio(files("loquent.engine") / "samples" / "morning.flac")
    recognizer.transcribe(pcm[: 3 * 16000], decoder=decoder)
    assert bool(asked) == (decoder != "ctc")
    asked.clear()
    stream = recognizer.stream(decoder=decoder, lm_weight=0.0)
    stream.accept(pcm[: 3 * 16000])
    stream.finish()
    while stream.ready:
        recognizer.step([stream])
    assert not asked


def test_rules_of_a_bundle(write_bundle: Callable[..., Path], tmp_path: Path) -> None:
    def spelling(rules: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
        return lambda m: m.update(lm={"file": "lm.npz", "sha256": "0" * 64, "spelling": rules})

    folder = write_bundle(tmp_path / "a", change=spelling({"reach": 0.2}))
    lm = Bundle.load(folder).lm
    assert lm is not None
    assert lm.spelling == SpellingRules(reach=0.2)
    folder = write_bundle(tmp_path / "b", change=spelling({"weight": -1}))
    with pytest.raises(BundleError, match=r"lm\.spelling: got weight -1.* 0 on"):
        Bundle.load(folder)
    with pytest.raises(ConfigError):
        SpellingRules(reach=math.nan)
