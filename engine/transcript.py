"""Decoded frames in, events out: the part of a stream that knows words, segments and silence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy

from loquent.engine.decode import Frame, Token
from loquent.engine.endpoint import Endpointer, EndpointRules, Hearing
from loquent.engine.events import Ended, Event, Final, Finalized, Partial, Reason, Word
from loquent.engine.finish import Finishing
from loquent.engine.hotwords import HotwordGraph
from loquent.engine.spelling import Speller
from loquent.engine.text import Hypothesis
from loquent.engine.words import PLAIN, WordRules

# Frames by which a token may move when the silence behind it turns out to be speech.
_SHIFT = 3


class Echo:
    """Tells tokens that a flush has said already from new ones when the same frames come again.

    The same tokens in the same order are the echo; from the first one that differs, it is whatever
    lies before the end of the flush. The order comes first because a beam search may date a token
    to where it was first thought of.

    Args:
        said: tokens of the flush.
        frame: where the audio of the flush ended.
    """

    def __init__(self, said: Sequence[Token] = (), frame: int = 0) -> None:
        self._said = tuple(token.id for token in said)
        self._same = True
        self.until = max([frame, *(token.frame + 1 for token in said)])

    def accept(self, tokens: Sequence[Token]) -> list[Token]:
        """Those of the tokens that follow which are new."""
        return [token for token in tokens if self._is_new(token)]

    @property
    def left(self) -> tuple[tuple[int, ...], bool, int]:
        """All that decides on the next token."""
        return self._said, self._same, self.until

    def _is_new(self, token: Token) -> bool:
        if not self._same:
            return token.frame >= self.until
        if not self._said:
            return True
        if token.id == self._said[0] and token.frame < self.until + _SHIFT:
            self._said = self._said[1:]
            return False
        self._same = False
        return token.frame >= self.until


class Transcript:
    """The text of one stream.

    Args:
        pieces: the bundle's tokens by id.
        frame_seconds: from one encoder frame to the next.
        rules: when a segment ends.
        words: from tokens to times and confidences.
        voice: a voice activity detector's view of the stream.
        finishing: writes the finals' text; None leaves it as the words are.
        speller: puts misspelt words right.

    Attributes:
        pending: tokens that a beam search may still change, behind all that were accepted.
        limit: seconds; no time of a word goes beyond it. To be set to the length of the audio
            before the frames that were padded to it.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        frame_seconds: float,
        rules: EndpointRules | None,
        words: WordRules = PLAIN,
        voice: Hearing | None = None,
        finishing: Finishing | None = None,
        speller: Speller | None = None,
    ) -> None:
        self.limit = math.inf
        self.pending: tuple[Token, ...] = ()
        self._frame_seconds = frame_seconds
        self._heard = 0.0  # seconds; what a word may last beyond its last token is not yet heard
        self._hypothesis = Hypothesis(pieces, frame_seconds, words, speller)
        self._endpointer = Endpointer(rules, frame_seconds, voice)
        self._finishing = finishing
        self._forget_encoder = False
        self._frame = -1  # the last one heard
        self._segment = 0
        self._shown = ""
        self._told: tuple[object, ...] | None = None  # that, and all that it was made of
        self._since = 0.0  # start of what was last shown
        self._echo = Echo()
        self._branch: list[Token] | None = None  # what a branch has heard
        self._events: list[Event] = []

    def expect(self, hotwords: HotwordGraph | None) -> None:
        """From here on the words of these are right, however rare."""
        self._hypothesis.hotwords = hotwords

    def set_endpoint(self, rules: EndpointRules | None) -> None:
        """From here on segments end by these rules."""
        self._endpointer = self._endpointer.ruled(rules, self._frame_seconds)

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
            self._frame = frame.number
            self._heard = round((frame.number + 1) * self._frame_seconds, 3)
            if self._branch is not None:
                self._branch += frame.tokens
            for token in self._echo.accept(frame.tokens):
                self._hypothesis.add(token, self._latest)
            reason = self._endpointer.accept(frame)
            if reason == "endpoint":
                self._final(self._hypothesis.finish(self._latest), reason)
                self._endpointer.restart(None)
                rules = self._endpointer.rules
                self._forget_encoder |= rules is not None and rules.reset_encoder
            elif reason == "limit" and self._hypothesis.settled:
                self._final(self._hypothesis.cut(), reason)
                self._endpointer.restart(self._hypothesis.growing_since)

    def show(self) -> None:
        """Say what the segment is so far, unless that was the last thing said.

        A beam search may take back all it said: then the text is empty.
        """
        committed = self._hypothesis.committed
        told = (self._shown, committed, self._hypothesis.growing, self.pending, self._echo.left)
        if told == self._told:
            return  # nothing has moved, as in every pause
        latest = self._latest
        settled = len(self._hypothesis.words(latest)) - bool(self._hypothesis.tentative)
        shown = self._hypothesis.followed_by(copy(self._echo).accept(self.pending), latest)
        words = shown.words(latest)
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
        self._told = (text, *told[1:])

    def forget_encoder(self, *, calm: bool) -> bool:
        """Whether the encoder is to start anew: an endpoint since last time, and no speech since.

        Args:
            calm: nobody has begun to speak whom the decoder does not hear yet.
        """
        forget = calm and self._forget_encoder and not self._endpointer.speaking
        self._forget_encoder = False
        if forget:
            self._endpointer.renew(self._frame)
        return forget

    def branch(self, voice: Hearing | None) -> None:
        """Frames of a flush follow, until ``finalize``, with the detector's view of them."""
        self._branch = []
        self._endpointer.voice = voice

    def finalize(self, position: float, frame: int, endpointer: Endpointer) -> None:
        """All before ``position`` seconds is said: settle it and say so.

        The frames since ``branch`` come again, now with what really follows them, and are not said
        twice.

        Args:
            frame: encoder frame in which ``position`` lies.
            endpointer: the rule's state before ``branch``; it goes on from there.
        """
        assert self._branch is not None, "no branch"
        self._final(self._hypothesis.finish(self._latest), "finalize")
        self.pending = ()
        self.show()
        self._events.append(Finalized(position=position))
        self._echo = Echo(self._branch, max(frame, self._echo.until))
        self._branch = None
        self._endpointer = endpointer
        endpointer.begin(self._echo.until)
        self.limit = math.inf

    def end(self, duration: float) -> None:
        """The stream is over: settle what is left and say so."""
        self._final(self._hypothesis.finish(self._latest), "end")
        self.pending = ()
        self.show()
        self._events.append(Ended(duration=duration, segments=self._segment))

    @property
    def _latest(self) -> float:
        return min(self.limit, self._heard)

    def _final(self, words: tuple[Word, ...], reason: Reason) -> None:
        if not words:
            return
        said = [word.text for word in words]
        text = self._finishing.finish(said) if self._finishing else " ".join(said)
        self._events.append(
            Final(
                segment=self._segment,
                start=words[0].start,
                end=words[-1].end,
                text=text,
                words=words,
                reason=reason,
            )
        )
        self._segment += 1
        self._shown = ""
