"""What a stream says: a closed union of frozen records that know nothing of JSON or sockets.

All times are seconds of audio from the start of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reason = Literal["endpoint", "limit", "finalize", "end"]
EndReason = Literal["end", "idle", "stopping", "session_limit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """One word, the time in which it was said, and how sure it is.

    Attributes:
        confidence: estimate of the probability that the word is right, 0 to 1.
    """

    text: str
    start: float
    end: float
    confidence: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """The text of a segment so far; it replaces the segment's earlier partials.

    Attributes:
        segment: number of the segment, from 0.
        start, end: first word's start, last word's end.
        committed: words that will never change; a prefix of everything that follows in this
            segment.
        tentative: what may still change: the word that is growing and, with a beam search, the
            words that hypotheses differ in. Where all of it was taken back, text is empty.
        words: committed words, then the tentative ones.
    """

    segment: int
    start: float
    end: float
    committed: str
    tentative: str
    words: tuple[Word, ...]

    @property
    def text(self) -> str:
        """Committed and tentative text in one."""
        return " ".join(part for part in (self.committed, self.tentative) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """The settled text of a segment; its words start with the last partial's committed ones.

    Attributes:
        text: the words, or, in a session with ``finish``, what they look like in writing.
        words: as recognised, with their times, finished or not.
        reason: ``endpoint`` (silence), ``limit`` (utterance too long, cut between two words),
            ``finalize`` (asked for with ``Stream.finalize``) or ``end`` (of the stream).
    """

    segment: int
    start: float
    end: float
    text: str
    words: tuple[Word, ...]
    reason: Reason

    @property
    def raw(self) -> str:
        """The words as recognised, whatever ``text`` makes of them."""
        return " ".join(word.text for word in self.words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalized:
    """The answer to one ``Stream.finalize``: its final, if there was anything to say, is out.

    Attributes:
        position: seconds of audio; everything before it is settled.
    """

    position: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The last event of every stream that was finished, exactly once.

    Attributes:
        duration: seconds of audio received.
        segments: number of finals.
        reason: ``end`` (the client's wish), or why a server ended the session: ``idle`` (no word
            from the client), ``stopping`` (the server goes down) or ``session_limit`` (too long).
    """

    duration: float
    segments: int
    reason: EndReason = "end"


Event = Partial | Final | Finalized | Ended
