"""Decoded frames in, events out: the part of a stream that knows words, segments and silence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy

from loquent.engine.decode import Frame, Token
from loquent.engine.endpoint import Endpointer, EndpointRules
from loquent.engine.events import Ended, Event, Final, Partial, Reason, Word
from loquent.engine.text import Hypothesis


class Transcript:
    """The text of one stream.

    Args:
        pieces: the bundle's tokens by id.
        frame_seconds: from one encoder frame to the next.
        rules: when a segment ends.

    Attributes:
        pending: tokens that a beam search may still change, behind all that were accepted.
        limit: seconds; no time of a word goes beyond it. To be set to the length of the audio
            before the frames that were padded to it.
    """

    def __init__(
        self, pieces: Sequence[str], frame_seconds: float, rules: EndpointRules | None
    ) -> None:
        self.limit = math.inf
        self.pending: tuple[Token, ...] = ()
        self._hypothesis = Hypothesis(pieces, frame_seconds)
        self._endpointer = Endpointer(rules, frame_seconds)
        self._segment = 0
        self._shown = ""
        self._since = 0.0  # start of what was last shown
        self._events: list[Event] = []

    def events(self) -> list[Event]:
        """Everything that happened since the last call."""
        events, self._events = self._events, []
        return events

    def endpointer(self) -> Endpointer:
        """A copy of the rule's state: it tells beforehand which frames will end with a silence.

        Cuts at the limit make no difference to that, as they leave a word behind.
        """
        return copy(self._endpointer)

    def accept(self, frames: Sequence[Frame]) -> None:
        """Take the frames that follow."""
        for frame in frames:
            for token in frame.tokens:
                self._hypothesis.add(token, self.limit)
            reason = self._endpointer.accept(frame)
            if reason == "endpoint":
                self._final(self._hypothesis.finish(self.limit), reason)
                self._endpointer.restart(None)
            elif reason == "limit" and self._hypothesis.settled:
                self._final(self._hypothesis.cut(), reason)
                self._endpointer.restart(self._hypothesis.growing_since)

    def show(self) -> None:
        """Say what the segment is so far, unless that was the last thing said.

        A beam search may take back all it said: then the text is empty.
        """
        committed = self._hypothesis.committed
        settled = len(self._hypothesis.words(self.limit)) - bool(self._hypothesis.tentative)
        shown = self._hypothesis.followed_by(self.pending, self.limit)
        words = shown.words(self.limit)
        tentative = " ".join(word.text for word in words[settled:])
        text = f"{committed} {tentative}".strip()
        if text != self._shown:
            self._shown = text
            if words:
                self._since = words[0].start
            self._events.append(
                Partial(
                    segment=self._segment,
                    start=self._since,
                    end=words[-1].end if words else self._since,
                    committed=committed,
                    tentative=tentative,
                    words=words,
                )
            )

    def end(self, duration: float) -> None:
        """The stream is over: settle what is left and say so."""
        self._final(self._hypothesis.finish(self.limit), "end")
        self.pending = ()
        self.show()
        self._events.append(Ended(duration=duration, segments=self._segment))

    def _final(self, words: tuple[Word, ...], reason: Reason) -> None:
        if not words:
            return
        self._events.append(
            Final(
                segment=self._segment,
                start=words[0].start,
                end=words[-1].end,
                text=" ".join(word.text for word in words),
                words=words,
                reason=reason,
            )
        )
        self._segment += 1
        self._shown = ""
