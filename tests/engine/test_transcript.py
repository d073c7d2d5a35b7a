"""What a beam search may do to a segment that greedy decoding cannot: take words back."""

from __future__ import annotations

from loquent.engine.decode import Frame, Token
from loquent.engine.endpoint import EndpointRules
from loquent.engine.events import Ended, Event, Final, Partial
from loquent.engine.transcript import Transcript

PIECES = ["<blank>", "▁a", "b", "▁c"]


def token(piece: str, frame: int) -> Token:
    return Token(PIECES.index(piece), frame, -0.1)


def said(events: list[Event]) -> list[tuple[str, ...]]:
    return [
        (event.committed, event.tentative)
        if isinstance(event, Partial)
        else (event.text,)
        if isinstance(event, Final)
        else ("ended",)
        for event in events
    ]


def test_pending_words_are_tentative_and_may_all_be_taken_back() -> None:
    transcript = Transcript(PIECES, 0.04, EndpointRules(trailing_silence=0.2))
    transcript.accept([Frame(number, (), False) for number in range(8)])
    transcript.pending = (token("▁a", 3), token("▁c", 6))
    transcript.show()
    transcript.pending = ()
    transcript.show()
    transcript.show()
    first, taken_back = transcript.events()
    assert said([first, taken_back]) == [("", "a c"), ("", "")]
    assert isinstance(taken_back, Partial)
    assert (taken_back.start, taken_back.end, taken_back.words) == (0.12, 0.12, ())


def test_words_that_the_end_takes_back() -> None:
    transcript = Transcript(PIECES, 0.04, EndpointRules(trailing_silence=0.2))
    transcript.pending = (token("▁a", 3),)
    transcript.show()
    transcript.end(1.0)
    assert said(transcript.events()) == [("", "a"), ("", ""), ("ended",)]


def test_pending_words_go_on_from_settled_ones() -> None:
    transcript = Transcript(PIECES, 0.04, EndpointRules(trailing_silence=0.2))
    transcript.accept([Frame(3, (token("▁a", 3),), True)])
    transcript.pending = (token("b", 4), token("▁c", 6))
    transcript.show()
    transcript.pending = (token("▁c", 6),)
    transcript.show()
    transcript.accept([Frame(6, (token("▁c", 6),), True)])
    transcript.pending = ()
    transcript.show()
    transcript.end(1.0)
    events = transcript.events()
    assert said(events) == [("", "ab c"), ("", "a c"), ("a c",), ("ended",)]
    assert isinstance(events[-1], Ended)
    assert events[-1].segments == 1
