"""Tables, JSON, and when a word was on the screen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from num2words import num2words

from loquent.engine.events import Final, Partial, Word
from loquent.engine.recognizer import Recognizer
from loquent.export.bench import time_decoders
from loquent.export.emission import delays
from loquent.export.peers import spell_digits
from loquent.export.results import (
    Line,
    Result,
    as_dicts,
    delay_table,
    entity_table,
    speed_table,
    table,
)
from loquent.export.streaming import Said, Watcher
from loquent.models.align import AlignedWord
from loquent.models.data import Utterance


def line(text: str, heard: str, source: str, **row: str) -> Line:
    return Line.of(Utterance(Path("x.wav"), text, source, 1.0, {"text": text, **row}), heard)


LINES = (
    line("We met Anna on May Day.", "we met anna on may day", "a", accent="us"),
    line("Seven cats", "eleven cats", "b", accent="uk"),
    line("two", "too", "b"),
)
RESULT = Result(bundle="en", precision="int8", decoder="rnnt", chunk_ms=160.0, lines=LINES)
PEER = Result(bundle="other", lines=LINES[:1], delays=((0.1, 0.5), (0.3, 0.7)))


def test_table() -> None:
    assert table([RESULT, PEER]).splitlines() == [
        "| system | precision | decoder | chunk ms | a | b | all |",
        "|---|---|---|---|---|---|---|",
        "| en | int8 | rnnt | 160 | 0.0 ± 0.0 / 0.0 | 66.7 ± 25.0 / 23.1 | 22.2 ± 50.0 / 8.6 |",
        "| other | - | - | whole | 0.0 ± 0.0 / 0.0 | - | 0.0 ± 0.0 / 0.0 |",
    ]
    assert "| - | uk | us |" in table([RESULT], "accent")


def test_speed_stands_beside_greedy() -> None:
    slow = replace(RESULT, decoder="joint", steps_ms={1: 3.0, 16: 48.0})
    rows = speed_table([replace(RESULT, steps_ms={1: 2.0, 16: 40.0}), slow, PEER]).splitlines()
    assert rows[0].endswith(
        "| ms a chunk, 1 stream | ms a chunk, 16 streams | streams a core, 16 together |"
    )
    assert rows[2:] == [
        "| en | int8 | rnnt | 160 | 2.00 (1.00x) | 40.00 (1.00x) | 64 |",
        "| en | int8 | joint | 160 | 3.00 (1.50x) | 48.00 (1.20x) | 53 |",
    ]
    assert speed_table([slow]).splitlines()[-1].endswith("| 3.00 | 48.00 | 53 |")
    assert speed_table([RESULT]) == ""
    assert as_dicts([slow])[0]["step_ms"] == {"1": 3.0, "16": 48.0}


def test_decoders_are_timed_in_turns() -> None:
    decoders = ["joint", "rnnt"]
    times = time_decoders(Recognizer.load("en"), decoders=decoders, chunk_ms=160, batch=2, steps=4)
    assert list(times) == decoders
    assert all(0 < ms < 1000 for ms in times.values())


def test_entities_and_delays() -> None:
    assert entity_table([RESULT]).splitlines()[-1] == (
        "| en | int8 | rnnt | 160 | 100.0 of 2 | 100.0 of 3 |"
    )
    assert entity_table([Result(bundle="x", lines=(line("a", "a", "s"),))]) == ""
    assert delay_table([RESULT]) == ""
    last = delay_table([RESULT, PEER]).splitlines()[-1]
    assert last == "| other | - | - | whole | 2 | 200 / 200 / 280 | 600 / 600 / 680 |"


def test_json_has_the_numbers_of_the_tables() -> None:
    (row,) = json.loads(json.dumps(as_dicts([RESULT], ["source", "accent"])))
    assert row["by"]["source"]["b"]["wer"] == pytest.approx(2 / 3, abs=1e-4)
    assert row["by"]["accent"]["us"]["clips"] == 1
    low, high = row["wer_95"]
    assert low <= row["wer"] == 0.22222 <= high
    assert row["numbers"] == {"errors": 2, "words": 2}
    assert row["cpu_per_second"] is None
    (row,) = as_dicts([PEER])
    assert row["delay_ms"] == {"words": 2, "shown": 200.0, "committed": 600.0}


def words(text: str) -> tuple[Word, ...]:
    return tuple(Word(text=w, start=0.0, end=0.0) for w in text.split())


def partial(committed: str, tentative: str) -> Partial:
    every = words(f"{committed} {tentative}")
    return Partial(segment=0, start=0, end=0, committed=committed, tentative=tentative, words=every)


def final(text: str) -> Final:
    return Final(segment=0, start=0, end=0, text=text, words=words(text), reason="limit")


def test_a_word_counts_from_when_it_stayed() -> None:
    watcher = Watcher()
    watcher.see(partial("", "the cad"), 1.0)
    watcher.see(partial("the", "cat"), 2.0)
    watcher.see(partial("the", "cat saw"), 3.0)
    watcher.see(final("the cat"), 4.0)  # cut at the limit: `saw` goes on
    watcher.see(partial("", "saw me"), 5.0)
    watcher.see(partial("", "saw"), 6.0)  # taken back
    watcher.see(partial("saw", "me"), 7.0)
    watcher.see(final("saw me"), 8.0)
    assert [(s.text, s.shown, s.settled) for s in watcher.said] == [
        ("the", 1.0, 2.0),
        ("cat", 2.0, 4.0),
        ("saw", 3.0, 7.0),
        ("me", 7.0, 8.0),
    ]


def test_delays_are_those_of_words_heard_right() -> None:
    aligned = [
        AlignedWord(text=t, start=e - 0.2, end=e, logp=0.0)
        for t, e in (("a", 1.0), ("b", 2.0), ("c", 3.0))
    ]
    said = [
        Said(text="a", shown=1.5, settled=1.75),
        Said(text="x", shown=2.5, settled=2.5),
        Said(text="C", shown=3.25, settled=4.0),
    ]
    assert delays(aligned, said) == [(0.5, 0.75), (0.25, 1.0)]
    assert delays(aligned, []) == delays([], said) == []


def test_digits_are_spelt_out() -> None:
    text = "At 7, 21 people and the 3rd of 1,200 saw B52s and 3.5."
    assert spell_digits(text, num2words) == (
        "At seven twenty-one people and the third of one thousand, two hundred saw B52s and 3.5."
    )
