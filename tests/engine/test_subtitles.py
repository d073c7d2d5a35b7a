"""Subtitle files."""

from __future__ import annotations

import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from loquent.engine.events import Final, Word
from loquent.engine.subtitles import LINE, LONGEST, Cue, make_cues, srt, vtt


def final(*words: tuple[str, float, float]) -> Final:
    spoken = tuple(Word(text=text, start=start, end=end) for text, start, end in words)
    return Final(
        segment=0,
        start=spoken[0].start,
        end=spoken[-1].end,
        text=" ".join(word.text for word in spoken),
        words=spoken,
        reason="end",
    )


FINALS = [final(("good", 0.5, 0.8), ("mor<ning", 0.9, 1.9)), final(("bye", 3661.5, 3661.7))]


def test_srt() -> None:
    assert srt(FINALS) == (
        "1\n00:00:00,500 --> 00:00:01,900\ngood mor<ning\n\n2\n01:01:01,500 --> 01:01:02,500\nbye\n"
    )
    assert srt([]) == ""


def test_vtt() -> None:
    assert vtt(FINALS) == (
        "WEBVTT\n\n00:00:00.500 --> 00:00:01.900\ngood mor&lt;ning\n\n"
        "01:01:01.500 --> 01:01:02.500\nbye\n"
    )
    assert vtt([]) == "WEBVTT\n"


def test_a_time_is_rounded_as_a_whole() -> None:
    assert "00:01:00,000 --> 00:01:01,000" in srt([final(("x", 59.9996, 60.1))])


def test_a_pause_starts_a_new_cue() -> None:
    cues = make_cues([final(("one", 0.0, 0.5), ("two", 1.4, 1.8), ("three", 2.5, 2.7))])
    assert cues == [Cue(0.0, 1.0, ("one",)), Cue(1.4, 2.7, ("two three",))]


def test_short_cues_stay_until_the_next_one_at_most() -> None:
    cues = make_cues([final(("one", 0.0, 0.1)), final(("two", 0.6, 0.7))])
    assert [(cue.start, cue.end) for cue in cues] == [(0.0, 0.6), (0.6, 1.6)]


def test_long_text_is_two_lines_of_about_the_same_length() -> None:
    words = [(f"word{n}", n / 4, n / 4 + 0.2) for n in range(10)]
    [cue] = make_cues([final(*words)])
    assert cue.lines == ("word0 word1 word2 word3 word4", "word5 word6 word7 word8 word9")


@given(
    st.lists(
        st.tuples(st.text("abc", min_size=1, max_size=12), st.floats(0, 2), st.floats(0.01, 1)),
        min_size=1,
        max_size=60,
    )
)
def test_cues_keep_every_word_and_the_rules(spoken: list[tuple[str, float, float]]) -> None:
    now, words = 0.0, []
    for text, pause, length in spoken:
        words.append((text, now + pause, now + pause + length))
        now += pause + length
    cues = make_cues([final(*words)])
    assert " ".join(" ".join(cue.lines) for cue in cues).split() == [text for text, _, _ in spoken]
    for cue in cues:
        assert 1 <= len(cue.lines) <= 2
        assert max(map(len, cue.lines)) <= LINE
        assert cue.end - cue.start <= LONGEST + 1e-6
    for before, after in pairwise(cues):
        assert before.start <= before.end <= after.start
    assert len(re.findall("-->", srt([final(*words)]))) == len(cues)
