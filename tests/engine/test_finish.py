"""Text finish: only ``Final.text`` changes, and it reads as people write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loquent.engine.errors import ConfigError
from loquent.engine.events import Event, Final
from loquent.engine.finish import Finisher, Finishing, bucket, finisher
from loquent.engine.recognizer import Recognizer

Float32 = NDArray[np.float32]
Speak = Callable[..., Float32]
Run = Callable[..., list[Event]]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("what time does the bus leave", "What time does the bus leave?"),
        ("i would like to go to san francisco", "I would like to go to San Francisco."),
        ("the bus leaves at ten thirty am", "The bus leaves at 10:30 am."),
        ("yes that is right thank you", "Yes, that is right. Thank you."),
        ("it costs twenty five dollars", "It costs $25."),
    ],
)
def test_the_model_that_is_shipped(said: str, expected: str) -> None:
    assert finisher("en").finish(said.split()) == (expected, False)


@given(st.lists(st.sampled_from(["the", "i", "bus", "twenty", "five", "dollars", "what"])))
def test_words_are_all_there(words: list[str]) -> None:
    model = Finisher(
        np.zeros((16, 4), np.int8) + np.array([0, 1, 0, 0], np.int8), np.zeros((16, 3), np.int8), {}
    )
    text, _ = model.finish(words)
    bare = text.replace(",", "").lower()
    assert set(bare.split()) <= {*words, "25", "$25", "20", "$5", "5", "$20"}


def test_a_sentence_may_go_on_in_the_next_segment() -> None:
    marks = np.zeros((1 << 10, 4), np.int8)
    marks[:, 0] = 1
    marks[bucket("1stop", len(marks)), 2] = 120
    finishing = Finishing(
        Finisher(marks, np.zeros((1 << 10, 3), np.int8), {"mcdonald": "McDonald"})
    )
    said = ["we went to", "old mcdonald stop", "we went"]
    assert [finishing.finish(text.split()) for text in said] == [
        "We went to",
        "old McDonald stop.",
        "We went",
    ]
    assert finishing.finish([]) == ""


def test_write_and_read() -> None:
    rng = np.random.default_rng(0)
    model = Finisher(
        rng.integers(-9, 9, (64, 4), np.int8),
        rng.integers(-9, 9, (64, 3), np.int8),
        {"nasa": "NASA"},
    )
    again = Finisher.read(model.write())
    words = ["the", "nasa", "people", "went"]
    assert again.finish(words) == model.finish(words)
    assert again.case(words, 1) == "NASA"


def test_a_stream_keeps_its_words(
    tiny: Recognizer, tones: Speak, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pcm = tones([(0, 0.2), (1, 0.12), (2, 0.1), (0, 1.2), (3, 0.15), (4, 0.1)])
    monkeypatch.setattr("loquent.engine.recognizer.finisher", lambda language: finisher("en"))
    plain = run(tiny, tiny.stream(), pcm, [1600])
    finished = run(tiny, tiny.stream(finish=True), pcm, [1600])
    finals = [e for e in finished if isinstance(e, Final)]
    assert [final.raw for final in finals] == ["bana", "kiwi"]
    assert all(final.text[0].isupper() for final in finals)
    # Nothing else is another: words, times, partials.
    assert [replace(e, text=e.raw) if isinstance(e, Final) else e for e in finished] == plain


def test_a_language_without_a_model(tiny: Recognizer) -> None:
    with pytest.raises(ConfigError, match="got finish for the language 'xx', expected one of en"):
        tiny.stream(finish=True)
