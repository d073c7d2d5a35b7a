"""Words, their times, and text that does not change once it is committed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loquent.engine.decode import Frame, Token
from loquent.engine.endpoint import EndpointRules
from loquent.engine.errors import ConfigError
from loquent.engine.events import Ended, Event, Final, Partial, Word
from loquent.engine.text import Hypothesis, join_pieces
from loquent.engine.transcript import Transcript
from loquent.engine.words import WordRules

PIECES = ["<blank>", "▁the", "▁c", "at", "s", "▁", "▁sat", "<0xC3>", "<0xA9>", "."]
THE, C, AT, S, SPACE, SAT = range(1, 7)
STOP = 9


def hypothesis(*tokens: tuple[int, int]) -> Hypothesis:
    words = Hypothesis(PIECES, 0.04)
    for token, frame in tokens:
        words.add(Token(token, frame, -0.1), math.inf)
    return words


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["▁the", "▁c", "at", "s"], "the cats"),
        (["at", "s", "▁the"], "ats the"),
        (["▁", "the", "▁", "▁sat"], "the  sat"),
        (["▁caf", "<0xC3>", "<0xA9>", "▁sat"], "café sat"),
        (["▁caf", "<0xC3>"], "caf\ufffd"),
        ([], ""),
    ],
)
def test_join_pieces(pieces: list[str], text: str) -> None:
    assert join_pieces(pieces) == text


def test_words_and_times() -> None:
    words = hypothesis((THE, 5), (C, 10), (AT, 12), (S, 13))
    assert words.words(math.inf) == (
        Word(text="the", start=0.2, end=0.24, confidence=0.905),
        Word(text="cats", start=0.4, end=0.56, confidence=0.905),
    )
    assert (words.committed, words.tentative) == ("the", "cats")
    assert words.words(0.5)[1] == Word(text="cats", start=0.4, end=0.5, confidence=0.905)


RULES = WordRules(
    delay=0.09, tail=0.1, tail_character=0.05, bias=2.0, least=1.0, odds=0.5, agreed=2.0
)


def test_times_by_measured_rules() -> None:
    words = Hypothesis(PIECES, 0.04, RULES)
    for token, frame in ((THE, 1), (C, 10), (AT, 12), (SAT, 15)):
        words.add(Token(token, frame, -0.1), math.inf)
    the, cat, sat = words.words(0.84)
    assert (the.start, the.end) == (0.0, 0.31)  # 0.08 + 0.1 + 3 * 0.05 but not beyond the next
    assert (cat.start, cat.end) == (0.31, 0.51)  # the next one's start
    assert (sat.start, sat.end) == (0.51, 0.84)  # no more was heard


def test_confidence_by_measured_rules() -> None:
    tokens = [Token(C, 10, -0.2), Token(AT, 12, -1.4, agreed=0.5)]
    p = math.exp(-1.4)
    value = 2.0 - 1.4 + 0.5 * math.log(p / (1 - p)) + 2 * math.log(0.5 / 0.5)
    assert RULES.confidence(tokens) == pytest.approx(1 / (1 + math.exp(-value)), abs=2e-3)
    assert WordRules().confidence(tokens) == pytest.approx(math.exp(-1.4), abs=1e-3)
    assert 0.0 <= RULES.confidence([Token(C, 0, -1e9, agreed=0.0)]) <= 1.0


@given(
    tokens=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=30),
    delay=st.floats(-0.2, 0.4),
    tail=st.floats(-0.2, 0.4),
    late=st.integers(0, 5),
)
def test_times_are_in_order_and_do_not_change(
    tokens: list[tuple[int, int]], delay: float, tail: float, late: int
) -> None:
    words = Hypothesis(PIECES, 0.04, WordRules(delay=delay, tail=tail, tail_character=0.05))
    frame, settled = 0, 0
    seen: tuple[Word, ...] = ()
    for token, gap in tokens:
        frame += gap
        heard = (frame + 1 + late) * 0.04
        words.add(Token(token, frame, -0.1), heard)
        now = words.words(heard)
        assert now[:settled] == seen[:settled]
        settled, seen = len(now) - bool(words.tentative), now
    seen = words.words(heard)
    times = [time for word in seen for time in (word.start, word.end)]
    assert times == sorted(times)
    assert not times or (times[0] >= 0 and times[-1] <= heard)
    # A cut of the segment changes no times either.
    assert words.cut() == seen[:settled]
    assert words.finish(heard) == seen[settled:]


def test_a_lone_word_start_is_no_word() -> None:
    words = hypothesis((THE, 5), (SPACE, 8))
    assert [word.text for word in words.words(math.inf)] == ["the"]
    words.add(Token(AT, 9, 0.0), math.inf)
    assert [word.text for word in words.words(math.inf)] == ["the", "at"]


def test_cut_keeps_the_growing_word() -> None:
    words = hypothesis((THE, 5), (SAT, 8), (C, 10), (AT, 11))
    assert [word.text for word in words.cut()] == ["the", "sat"]
    assert words.growing_since == 10
    assert words.committed == ""
    words.add(Token(S, 12, 0.0), math.inf)
    assert [word.text for word in words.finish(math.inf)] == ["cats"]
    assert words.words(math.inf) == ()


# Transcript


def play(
    tokens: dict[int, list[int]],
    frames: int,
    *,
    rules: EndpointRules | None,
    show_every: int = 1,
) -> tuple[list[Event], list[int]]:
    """Events, and the frames after which a decoder is to forget its context."""
    transcript = Transcript(PIECES, 0.04, rules)
    resets = []
    for number in range(frames):
        said = tuple(Token(token, number, -0.1) for token in tokens.get(number, []))
        frame = Frame(number, said, bool(said))
        if transcript.endpointer().accept(frame) == "endpoint":
            resets.append(number)
        transcript.accept([frame])
        if (number + 1) % show_every == 0:
            transcript.show()
    transcript.show()
    transcript.end(frames * 0.04)
    return transcript.events(), resets


def test_partials_only_when_the_text_changes() -> None:
    events, _ = play({2: [THE], 5: [SPACE], 7: [C], 8: [AT]}, 12, rules=None)
    assert [e.text for e in events if isinstance(e, Partial)] == ["the", "the c", "the cat"]
    assert events[-2:] == [
        Final(
            segment=0,
            start=0.08,
            end=0.36,
            text="the cat",
            words=(
                Word(text="the", start=0.08, end=0.12, confidence=0.905),
                Word(text="cat", start=0.28, end=0.36, confidence=0.905),
            ),
            reason="end",
        ),
        Ended(duration=0.48, segments=1),
    ]


def test_endpoint_after_silence_gives_a_final_only_after_a_token() -> None:
    rules = EndpointRules(trailing_silence=0.4, max_utterance=20)
    events, resets = play({30: [THE], 35: [SAT], 60: [C]}, 62, rules=rules)
    finals = [e for e in events if isinstance(e, Final)]
    assert [(f.segment, f.text, f.reason) for f in finals] == [
        (0, "the sat", "endpoint"),
        (1, "c", "end"),
    ]
    # The first is that of the second in which nobody has said anything yet.
    assert resets == [24, 45]


def test_limit_cuts_before_the_growing_word() -> None:
    rules = EndpointRules(trailing_silence=0.8, max_utterance=0.4)
    # One long word first: there is nothing to cut before, so it has to wait.
    tokens = {0: [C], 4: [AT], 9: [S], 14: [S], 16: [THE], 19: [SAT], 22: [S], 24: [S], 27: [S]}
    events, resets = play(tokens, 30, rules=rules)
    finals = [e for e in events if isinstance(e, Final)]
    assert [(f.text, f.reason) for f in finals] == [
        ("catss", "limit"),
        ("the", "limit"),
        ("satsss", "end"),
    ]
    assert [f.start for f in finals] == [0.0, 0.64, 0.76]
    assert resets == []  # a cut inside running speech must not make the decoder forget


@given(
    tokens=st.dictionaries(
        st.integers(0, 80),
        st.lists(st.sampled_from([THE, C, AT, S, SPACE, SAT, STOP]), min_size=1, max_size=3),
        max_size=40,
    ),
    show_every=st.sampled_from([1, 2, 8, 32]),
    silence=st.sampled_from([0.08, 0.4, 3.0]),
    longest=st.sampled_from([0.2, 1.0, 20.0]),
)
def test_event_stream_rules(
    tokens: dict[int, list[int]], show_every: int, silence: float, longest: float
) -> None:
    rules = EndpointRules(trailing_silence=silence, max_utterance=longest)
    events, _ = play(tokens, 90, rules=rules, show_every=show_every)
    assert [isinstance(e, Ended) for e in events] == [False] * (len(events) - 1) + [True]
    finals = [e for e in events if isinstance(e, Final)]
    assert [f.segment for f in finals] == list(range(len(finals)))
    assert events[-1] == Ended(duration=3.6, segments=len(finals))
    shown: tuple[int, str, str] = (0, "", "")
    for event in events[:-1]:
        assert isinstance(event, Partial | Final)
        assert event.text == " ".join(word.text for word in event.words) != ""
        assert (event.start, event.end) == (event.words[0].start, event.words[-1].end)
        segment, committed, text = shown
        if isinstance(event, Final):
            assert event.text.startswith(committed)
            assert event.segment == segment
            shown = (segment + 1, "", "")
        else:
            assert event.segment == segment
            assert event.text != text
            assert event.committed.startswith(committed)
            shown = (segment, event.committed, event.text)
    # Nothing is lost or said twice, wherever the segments end. Cuts fall between tokens.
    said = join_pieces([PIECES[t] for n in sorted(tokens) for t in tokens[n]])
    assert "".join(f.text for f in finals).replace(" ", "") == said.replace(" ", "")


def test_the_endpoint_rule_does_not_depend_on_rounding() -> None:
    # 0.8 / 0.04 is 20 frames, whatever the floating point says.
    _, resets = play({0: [THE]}, 60, rules=EndpointRules())
    # 0.8 s after the word, and then for every second of the pause.
    assert resets == [20, 45]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_rules_are_checked(value: float) -> None:
    with pytest.raises(ConfigError, match=r"got trailing_silence .* expected seconds above 0"):
        EndpointRules(trailing_silence=value)
