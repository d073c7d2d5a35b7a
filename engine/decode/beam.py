"""Beam search over prefixes, frame by frame, scored by CTC, by RNN-T or by both at once.

CTC as in prefix beam search (arXiv 1408.2873), RNN-T as in modified beam search, at most one token
a frame (arXiv 2010.14606, icefall's ``modified_beam_search``): each keeps the probability of a
prefix summed over its alignments, so that both can score the same prefix and be added, weighted. A
word language model is fused in, and the transducer's own one taken off.

What all hypotheses share is settled and is given out at once; it never changes. The rest of the
best one is tentative. A hypothesis that disagrees with the best for longer than the horizon is
dropped, so every token settles in bounded time and memory is flat however long the stream.

Shapes: H hypotheses of a stream, K frames, J joiner size, V tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from loquent.engine.decode import Frame, Token
from loquent.engine.decode.agreement import PATIENCE, agreed
from loquent.engine.decode.decoder import Job, Settings
from loquent.engine.decode.fusion import Fusion, reconsider
from loquent.engine.decode.hypothesis import NEVER, Hypothesis, log_add
from loquent.engine.decode.scores import Growth, Rows, Scores, score
from loquent.engine.decode.transducer import Transducer, log_softmax
from loquent.engine.hotwords import HotwordGraph

Float32 = NDArray[np.float32]
_NOTHING: Float32 = np.zeros((0, 0), np.float32)
# A frame that is blank by CTC with this probability does nothing but end a repetition.
_SURE = math.log(0.98)


@dataclass(frozen=True, slots=True, eq=False)
class BeamState:
    """What one stream carries: its weights and its hypotheses."""

    fusion: Fusion
    share: float
    hypotheses: tuple[Hypothesis, ...]
    heard: int = -1

    def best(self) -> Hypothesis:
        """The best hypothesis, its last word still growing."""
        return max(self.hypotheses, key=attrgetter("total"))

    @property
    def pending(self) -> tuple[Token, ...]:
        """The best hypothesis beyond what was given out."""
        return self.best().tokens

    def biased(self, hotwords: HotwordGraph | None) -> BeamState:
        """With other hotwords from here on."""
        fusion = self.fusion.biased(hotwords)
        before = self.fusion.hotwords
        found = tuple(h.reworded(fusion.rebiased(h.words, before)) for h in self.hypotheses)
        return replace(self, fusion=fusion, hypotheses=found)

    def flush(self) -> tuple[Token, ...]:
        """The best hypothesis, its last word being over."""
        finished = self.fusion.finished
        scores = [h.acoustic(self.share) + finished(h.words) for h in self.hypotheses]
        since, until = self.heard - PATIENCE + 1, self.heard + 1
        found = agreed(scores, [h.tokens for h in self.hypotheses], since, until)
        return found[scores.index(max(scores))]


class BeamSearch:
    """The decoder. It reads ``ctc``, (K, V) natural logarithms, and ``joiner``, (K, J).

    Args:
        fusion: language model and weights.
        blank: id of the blank token.
        share: of CTC in the score, 0 to 1; RNN-T has the rest.
        model: predictor and joiner, needed if RNN-T has a share.
    """

    def __init__(
        self,
        fusion: Fusion,
        *,
        blank: int,
        share: float,
        model: Transducer | None = None,
    ) -> None:
        assert model or share == 1, "RNN-T needs its networks"
        self._fusion = fusion
        self.blank = blank
        self.share = share
        self.model = model if share < 1 else None
        if self.model:
            self.model.know([self.model.start])

    def start(self, settings: Settings) -> BeamState:
        """The search of a new stream."""
        fusion = self._fusion.adjusted(settings.lm_weight, settings.blank_penalty)
        fusion = fusion.biased(settings.hotwords)
        if settings.horizon is not None:
            fusion = fusion.ruled(replace(fusion.rules, horizon=settings.horizon))
        return BeamState(fusion, self.share, (self.root(fusion),))

    def root(self, fusion: Fusion) -> Hypothesis:
        """What a sentence begins with."""
        context = self.model.start if self.model else None
        root = Hypothesis((), (), -1, fusion.start(), context, 0.0, 0.0, NEVER)
        return root.weigh(self.share)

    def decode(self, jobs: Sequence[Job]) -> list[tuple[list[Frame], BeamState]]:
        """See :class:`~loquent.engine.decode.decoder.Decoder`."""
        beams = [_Beam(self, job) for job in jobs]
        for k in range(max(beam.count for beam in beams)):
            live = [beam for beam in beams if k < beam.count]
            if unsure := [beam for beam in live if not beam.passes(k)]:
                for beam, scores in zip(unsure, self._score(unsure, k), strict=True):
                    beam.advance(k, scores)
                self._extend(unsure)
            if ending := [beam for beam in live if k == beam.count - 1]:
                _reconsider(ending)
            for beam in live:
                beam.listen(k)
        return [(beam.frames, beam.state()) for beam in beams]

    def _score(self, beams: Sequence[_Beam], k: int) -> list[Scores]:
        """What frame ``k`` says of each stream's hypotheses, computed together."""
        every = [h for beam in beams for h in beam.hypotheses]
        sizes = [len(beam.hypotheses) for beam in beams]
        penalties = np.array([beam.penalty for beam in beams], np.float32)
        ctc = rnnt = own = hot = None
        if self.share:
            ctc = np.stack([beam.ctc[k] for beam in beams])
            ctc[:, self.blank] -= penalties
        contexts = [h.context for h in every if h.context]
        if self.model:
            enc = np.repeat(np.stack([beam.joiner[k] for beam in beams]), sizes, axis=0)
            pred = np.concatenate([context.pred for context in contexts]).reshape(len(every), -1)
            logits = self.model.join(enc, pred)
            logits[:, self.blank] -= np.repeat(penalties, sizes)
            rnnt = log_softmax(logits)
            if any(beam.own for beam in beams):
                weights = np.repeat(np.array([beam.own for beam in beams], np.float32), sizes)
                unknown = np.zeros(rnnt.shape[1], np.float32)
                known = [unknown if c.tokens is None else c.tokens for c in contexts]
                own = weights[:, None] * np.concatenate(known).reshape(rnnt.shape)
        if any(beam.fusion.hotwords for beam in beams):
            scored = rnnt if ctc is None else ctc
            assert scored is not None, "something scores"
            none = np.zeros(scored.shape[1], np.float32)
            hot = np.stack(
                [
                    none if graph is None else graph.bias(h.words.hot)
                    for beam in beams
                    for graph in [beam.fusion.hotwords]
                    for h in beam.hypotheses
                ]
            )
        rows = Rows(
            sizes=sizes,
            totals=[[h.total for h in beam.hypotheses] for beam in beams],
            last=[h.last for h in every],
            margins=[beam.rules.margin for beam in beams],
            most=[2 * beam.rules.beam for beam in beams],
        )
        return score(rows, rnnt=rnnt, ctc=ctc, own=own, hot=hot, share=self.share, blank=self.blank)

    def _extend(self, beams: Sequence[_Beam]) -> None:
        """Run the predictor for the hypotheses that have a new token, in one call."""
        if self.model is None:
            return
        grown = [h for beam in beams for h in beam.grown]
        after = self.model.after([(h.context, h.last) for h in grown if h.context])
        for hypothesis, context in zip(grown, after, strict=True):
            hypothesis.context = context
        if any(beam.own for beam in beams):
            self.model.know(after)


class _Beam:
    """One stream while its frames are decoded: a copy, so that the search itself never changes."""

    def __init__(self, decoder: BeamSearch, job: Job) -> None:
        state: BeamState = job.search
        self._decoder = decoder
        self._state = state
        self.fusion = state.fusion
        self.rules = state.fusion.rules
        self._endpointer = job.endpointer
        self._first = job.first
        self._speech = False
        self._heard = state.heard
        self.ctc = job.frames["ctc"] if decoder.share else _NOTHING
        self._blanks = self.ctc[:, decoder.blank].tolist() if decoder.share else []
        self.joiner = job.frames["joiner"] if decoder.model else _NOTHING
        self.count = len(self.ctc if decoder.share else self.joiner)
        self.penalty = self.rules.blank_penalty
        self.own = self.rules.own_weight if state.fusion.active and decoder.model else 0.0
        self.frames: list[Frame] = []
        self.hypotheses = list(state.hypotheses)
        self.grown: list[Hypothesis] = []

    def passes(self, k: int) -> bool:
        """Whether frame ``k`` is as good as certainly blank; if so, that is all there is to it."""
        if not self._blanks or (blank := self._blanks[k]) < _SURE:
            return False
        blank -= self.penalty
        share = self._decoder.share
        self.hypotheses = [
            h.scored(h.rnnt, log_add(h.blank, h.token) + blank, NEVER).weigh(share)
            for h in self.hypotheses
        ]
        self._speech = False
        return True

    def advance(self, k: int, scores: Scores) -> None:
        """Take frame ``k``."""
        self._speech = scores.speech
        found = self._stay(scores)
        if scores.growths:
            self._grow(found, scores.growths, self._first + k)
        for h in found.values():
            h.weigh(self._decoder.share)
        if scores.growths:
            self._prune(found.values())
        else:
            self.hypotheses, self.grown = list(found.values()), []

    def _stay(self, scores: Scores) -> dict[tuple[int, ...], Hypothesis]:
        """Every prefix goes on as it is: with blank, or with CTC's last token held."""
        found = {}
        silence = scores.silence
        for i, h in enumerate(self.hypotheses):
            r, b, t = h.rnnt, h.blank, h.token
            if scores.stay:
                r += scores.stay[i]
            if scores.hold:
                b, t = log_add(b, t) + silence, t + scores.hold[i] if h.last >= 0 else NEVER
            found[h.ids] = h.scored(r, b, t)
        return found

    def _grow(
        self, found: dict[tuple[int, ...], Hypothesis], growths: Sequence[Growth], number: int
    ) -> None:
        """Prefixes go on with tokens; what leads to the same prefix is added up."""
        extend = self.fusion.extend
        listens, transduces = self._decoder.share > 0, self._decoder.model is not None
        for i, token, rnnt, ctc, both, bonus in growths:
            parent = self.hypotheses[i]
            r, t = parent.rnnt + rnnt, parent.token
            if listens:
                # The same token twice in a row is two tokens only with a blank in between.
                t = parent.blank if token == parent.last else log_add(parent.blank, t)
                t += ctc
            longer = parent.longer.get(token)
            if longer is None:
                words = extend(parent.words, token, bonus if self.own else 0.0)
                longer = parent.longer[token] = ((*parent.ids, token), words)
            ids, words = longer
            h = found.get(ids)
            if h is None:
                tokens = (*parent.tokens, Token(token, number, both))
                b = NEVER if listens else parent.blank
                found[ids] = Hypothesis(ids, tokens, token, words, parent.context, r, b, t)
            else:
                # It was said where it is likeliest, not where it was first thought of.
                if both > h.tokens[-1].logp:
                    h.tokens = (*h.tokens[:-1], Token(token, number, both))
                if transduces:
                    h.rnnt = log_add(h.rnnt, r)
                if listens:
                    h.token = log_add(h.token, t)

    def _prune(self, found: Iterable[Hypothesis]) -> None:
        """Keep the best, best first."""
        ranked = sorted(found, key=attrgetter("total"), reverse=True)
        worst = ranked[0].total - self.rules.margin
        old = {h.ids for h in self.hypotheses}
        self.hypotheses = [h for h in ranked[: self.rules.beam] if h.total >= worst]
        self.grown = [h for h in self.hypotheses if h.ids not in old]

    # -- what is settled ---------------------------------------------------------------------

    def listen(self, k: int) -> None:
        """Frame ``k`` is searched: end the segment if a silence does; settle after the last."""
        number = self._heard = self._first + k
        due = number - PATIENCE
        if any(_speaks(h.tokens, due) for h in self.hypotheses):
            scores = [h.total for h in self.hypotheses]
            found = agreed(scores, [h.tokens for h in self.hypotheses], due, due + 1)
            for hypothesis, said in zip(self.hypotheses, found, strict=True):
                hypothesis.tokens = said
        tokens: tuple[Token, ...] = ()
        if self._endpointer.accept(Frame(number, (), self._speech)) == "endpoint":
            _reconsider([self])
            tokens = self.state().flush()
            self._endpointer.restart(None)
            self.hypotheses = [self._decoder.root(self.fusion)]
        elif k == self.count - 1:
            tokens = self._settle(number)
        self.frames.append(Frame(number, tokens, self._speech))

    def state(self) -> BeamState:
        """The search after these frames."""
        return replace(self._state, hypotheses=tuple(self.hypotheses), heard=self._heard)

    def _settle(self, number: int) -> tuple[Token, ...]:
        """Give out what all share; drop what has disagreed with the best for too long."""
        best = self.state().best()
        late = number - self.rules.horizon
        keep = sum(1 for token in best.tokens if token.frame <= late)
        if keep:
            self.hypotheses = [h for h in self.hypotheses if h.ids[:keep] == best.ids[:keep]]
        shared = _shared([h.ids for h in self.hypotheses])
        if shared:
            self.hypotheses = [h.settled(shared) for h in self.hypotheses]
        return best.tokens[:shared]


def _reconsider(beams: Sequence[_Beam]) -> None:
    """Have the neural language model's view of all words that are over, if there is one."""
    searches = [(beam.fusion, [h.words for h in beam.hypotheses]) for beam in beams]
    for beam, found in zip(beams, reconsider(searches), strict=True):
        beam.hypotheses = [
            h if words is h.words else h.reworded(words)
            for h, words in zip(beam.hypotheses, found, strict=True)
        ]


def _speaks(tokens: Sequence[Token], frame: int) -> bool:
    """Whether one of the tokens, which are in the order of their frames, is of this one."""
    for token in reversed(tokens):
        if token.frame <= frame:
            return token.frame == frame
    return False


def _shared(sequences: Sequence[tuple[int, ...]]) -> int:
    """Length of what all begin with."""
    first, last = min(sequences), max(sequences)  # these two differ first
    for i, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return i
    return min(len(first), len(last))
