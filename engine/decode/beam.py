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
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from loquent.engine.decode import Frame, Token
from loquent.engine.decode.agreement import PATIENCE, agreed
from loquent.engine.decode.decoder import Job, Settings
from loquent.engine.decode.fusion import Fusion, Words
from loquent.engine.decode.transducer import Context, Transducer, log_softmax
from loquent.engine.hotwords import HotwordGraph

Float32 = NDArray[np.float32]
_NEVER = -math.inf
_NOTHING: Float32 = np.zeros((0, 0), np.float32)
# A frame that is blank by CTC with this probability does nothing but end a repetition.
_SURE = math.log(0.98)


class Hypothesis:
    """Tokens that are not settled, what is known of all before them, and how likely they are.

    Attributes:
        ids, tokens: that are not settled.
        last: the last token, settled or not; -1 at the start.
        words: the language model's view.
        context: the predictor's, if RNN-T scores.
        rnnt: probability of all alignments by RNN-T (natural logarithm, as all of them); 0 where
            RNN-T does not score.
        blank, token: of the alignments by CTC that end with blank, and with the last token; 0 and
            minus infinity where CTC does not score.
        longer: a memo of ``ids`` and ``words`` with one more token.
    """

    __slots__ = ("blank", "context", "ids", "last", "longer", "rnnt", "token", "tokens", "words")

    def __init__(
        self,
        ids: tuple[int, ...],
        tokens: tuple[Token, ...],
        last: int,
        words: Words,
        context: Context | None,
        rnnt: float,
        blank: float,
        token: float,
    ) -> None:
        self.ids, self.tokens, self.last = ids, tokens, last
        self.words, self.context = words, context
        self.rnnt, self.blank, self.token = rnnt, blank, token
        self.longer: dict[int, tuple[tuple[int, ...], Words]] = {}

    def scored(self, rnnt: float, blank: float, token: float) -> Hypothesis:
        """The same with other probabilities."""
        other = Hypothesis(
            self.ids, self.tokens, self.last, self.words, self.context, rnnt, blank, token
        )
        other.longer = self.longer
        return other

    def reworded(self, words: Words) -> Hypothesis:
        """The same with another view of its words."""
        other = self.settled(0)
        other.words = words
        return other

    def settled(self, count: int) -> Hypothesis:
        """The same after its first ``count`` tokens have been given out."""
        return Hypothesis(
            self.ids[count:],
            self.tokens[count:],
            self.last,
            self.words,
            self.context,
            self.rnnt,
            self.blank,
            self.token,
        )

    def acoustic(self, share: float) -> float:
        """The score without words, ``share`` of it CTC's."""
        return (1 - share) * self.rnnt + share * _add(self.blank, self.token)


@dataclass(frozen=True, slots=True, eq=False)
class BeamState:
    """What one stream carries: its weights and its hypotheses."""

    fusion: Fusion
    share: float
    hypotheses: tuple[Hypothesis, ...]
    heard: int = -1

    def best(self) -> Hypothesis:
        """The best hypothesis, its last word still growing."""
        return max(self.hypotheses, key=lambda h: h.acoustic(self.share) + h.words.score)

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
        return Hypothesis((), (), -1, fusion.start(), context, 0.0, 0.0, _NEVER)

    def decode(self, jobs: Sequence[Job]) -> list[tuple[list[Frame], BeamState]]:
        """See :class:`~loquent.engine.decode.decoder.Decoder`."""
        beams = [_Beam(self, job) for job in jobs]
        for k in range(max(beam.count for beam in beams)):
            live = [beam for beam in beams if k < beam.count]
            unsure = [beam for beam in live if not beam.passes(k)]
            for beam, log_probs in zip(unsure, self._join(unsure, k), strict=True):
                beam.advance(k, log_probs)
            self._extend(unsure)
            for beam in live:
                beam.listen(k)
        return [(beam.frames, beam.state()) for beam in beams]

    def _join(self, beams: Sequence[_Beam], k: int) -> Iterable[Float32 | None]:
        """RNN-T's log-probabilities (H, V) of frame ``k`` for each stream, in one call."""
        if self.model is None or not beams:
            return [None] * len(beams)
        sizes = [len(beam.hypotheses) for beam in beams]
        enc = np.stack([beam.joiner[k] for beam in beams])
        logits = self.model.join(
            np.repeat(enc, sizes, axis=0), np.concatenate([beam.pred for beam in beams])
        )
        logits[:, self.blank] -= np.repeat([beam.penalty for beam in beams], sizes)
        return np.split(log_softmax(logits), np.cumsum(sizes)[:-1])

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
        for beam in beams:
            if beam.stale:
                beam.gather()


class _Beam:
    """One stream while its frames are decoded: a copy, so that the search itself never changes."""

    def __init__(self, decoder: BeamSearch, job: Job) -> None:
        state: BeamState = job.search
        self._decoder = decoder
        self._state = state
        self._rules = state.fusion.rules
        self._endpointer = job.endpointer
        self._first = job.first
        self._speech = False
        self._heard = state.heard
        self._ctc = job.frames["ctc"] if decoder.share else None
        self.joiner = job.frames["joiner"] if decoder.model else _NOTHING
        self.count = len(self.joiner if self._ctc is None else self._ctc)
        self.penalty = self._rules.blank_penalty
        self.own = self._rules.own_weight if state.fusion.active and decoder.model else 0.0
        self.frames: list[Frame] = []
        self.hypotheses = list(state.hypotheses)
        self.grown: list[Hypothesis] = []
        self.gather()

    def gather(self) -> None:
        """Lay out as rows what the predictor made of the hypotheses."""
        self.stale = False
        contexts = [h.context for h in self.hypotheses if h.context]
        if contexts:
            self.pred = np.stack([context.pred for context in contexts])
            if self.own:
                tokens = [context.tokens for context in contexts if context.tokens is not None]
                self._mine = self.own * np.stack(tokens)

    def passes(self, k: int) -> bool:
        """Whether frame ``k`` is as good as certainly blank; if so, that is all there is to it."""
        if self._ctc is None:
            return False
        blank = float(self._ctc[k, self._decoder.blank])
        if blank < _SURE:
            return False
        blank -= self.penalty
        self.hypotheses = [
            h.scored(h.rnnt, _add(h.blank, h.token) + blank, _NEVER) for h in self.hypotheses
        ]
        self._speech = False
        return True

    def advance(self, k: int, rnnt: Float32 | None) -> None:
        """Take frame ``k``; ``rnnt`` (H, V) are RNN-T's log-probabilities after each prefix."""
        blank, share = self._decoder.blank, self._decoder.share
        ctc = None
        if self._ctc is not None:
            ctc = self._ctc[k].copy()
            ctc[blank] -= self.penalty
        if ctc is None:
            assert rnnt is not None
            both = rnnt
        elif rnnt is None:
            both = np.repeat(ctc[None], len(self.hypotheses), axis=0)
        else:
            both = (1 - share) * rnnt + share * ctc
        totals = [h.acoustic(share) + h.words.score for h in self.hypotheses]
        top = max(totals)
        self._speech = int(both[totals.index(top)].argmax()) != blank
        # Relative to the best, as totals grow for hours and float32 has seven digits.
        value = both + np.array([total - top for total in totals], np.float32)[:, None]
        if self.own:
            value -= self._mine
        if hotwords := self._state.fusion.hotwords:
            value += np.stack([hotwords.bias(h.words.hot) for h in self.hypotheses])
        floor = float(value.max()) - self._rules.margin
        value[:, blank] = _NEVER
        flat = np.flatnonzero(value > floor)
        most = 2 * self._rules.beam
        if len(flat) > most:
            flat = flat[np.argpartition(value.ravel()[flat], -most)[-most:]]
        found = self._stay(rnnt, ctc)
        if len(flat):
            self._grow(found, flat.tolist(), self._first + k, rnnt, ctc, both)
            self._prune(found)
        else:
            self.hypotheses, self.grown = list(found.values()), []

    def _stay(self, rnnt: Float32 | None, ctc: Float32 | None) -> dict[tuple[int, ...], Hypothesis]:
        """Every prefix goes on as it is: with blank, or with CTC's last token held."""
        blank = self._decoder.blank
        found = {}
        for i, h in enumerate(self.hypotheses):
            r, b, t = h.rnnt, h.blank, h.token
            if rnnt is not None:
                r += float(rnnt[i, blank])
            if ctc is not None:
                b, t = (
                    _add(b, t) + float(ctc[blank]),
                    t + float(ctc[h.last]) if h.last >= 0 else _NEVER,
                )
            found[h.ids] = h.scored(r, b, t)
        return found

    def _grow(
        self,
        found: dict[tuple[int, ...], Hypothesis],
        flat: Sequence[int],
        number: int,
        rnnt: Float32 | None,
        ctc: Float32 | None,
        both: Float32,
    ) -> None:
        """Prefixes go on with tokens; what leads to the same prefix is added up."""
        fusion = self._state.fusion
        vocabulary = both.shape[1]
        for index in flat:
            i, token = divmod(index, vocabulary)
            parent = self.hypotheses[i]
            r, t = parent.rnnt, parent.token
            if rnnt is not None:
                r += float(rnnt[i, token])
            if ctc is not None:
                # The same token twice in a row is two tokens only with a blank in between.
                t = parent.blank if token == parent.last else _add(parent.blank, t)
                t += float(ctc[token])
            longer = parent.longer.get(token)
            if longer is None:
                bonus = -float(self._mine[i, token]) if self.own else 0.0
                words = fusion.extend(parent.words, token, bonus)
                longer = parent.longer[token] = ((*parent.ids, token), words)
            ids, words = longer
            h = found.get(ids)
            if h is None:
                tokens = (*parent.tokens, Token(token, number, float(both[i, token])))
                b = parent.blank if ctc is None else _NEVER
                found[ids] = Hypothesis(ids, tokens, token, words, parent.context, r, b, t)
            else:
                # It was said where it is likeliest, not where it was first thought of.
                if (logp := float(both[i, token])) > h.tokens[-1].logp:
                    h.tokens = (*h.tokens[:-1], Token(token, number, logp))
                if rnnt is not None:
                    h.rnnt = _add(h.rnnt, r)
                if ctc is not None:
                    h.token = _add(h.token, t)

    def _prune(self, found: dict[tuple[int, ...], Hypothesis]) -> None:
        """Keep the best, best first."""
        share = self._decoder.share
        ranked = [(h.acoustic(share) + h.words.score, h) for h in found.values()]
        ranked.sort(key=itemgetter(0), reverse=True)
        worst = ranked[0][0] - self._rules.margin
        old = {h.ids for h in self.hypotheses}
        self.hypotheses = [h for score, h in ranked[: self._rules.beam] if score >= worst]
        self.grown = [h for h in self.hypotheses if h.ids not in old]
        self.stale = True

    # -- what is settled ---------------------------------------------------------------------

    def listen(self, k: int) -> None:
        """Frame ``k`` is searched: end the segment if a silence does; settle after the last."""
        number = self._heard = self._first + k
        due = number - PATIENCE
        if any(t.frame == due for h in self.hypotheses for t in h.tokens):
            scores = [h.acoustic(self._decoder.share) + h.words.score for h in self.hypotheses]
            found = agreed(scores, [h.tokens for h in self.hypotheses], due, due + 1)
            for hypothesis, said in zip(self.hypotheses, found, strict=True):
                hypothesis.tokens = said
        tokens: tuple[Token, ...] = ()
        if self._endpointer.accept(Frame(number, (), self._speech)) == "endpoint":
            tokens = self.state().flush()
            self._endpointer.restart(None)
            self.hypotheses = [self._decoder.root(self._state.fusion)]
            self.gather()
        elif k == self.count - 1:
            tokens = self._settle(number)
        self.frames.append(Frame(number, tokens, self._speech))

    def state(self) -> BeamState:
        """The search after these frames."""
        return replace(self._state, hypotheses=tuple(self.hypotheses), heard=self._heard)

    def _settle(self, number: int) -> tuple[Token, ...]:
        """Give out what all share; drop what has disagreed with the best for too long."""
        best = self.state().best()
        late = number - self._rules.horizon
        keep = sum(1 for token in best.tokens if token.frame <= late)
        if keep:
            self.hypotheses = [h for h in self.hypotheses if h.ids[:keep] == best.ids[:keep]]
        shared = _shared([h.ids for h in self.hypotheses])
        if shared:
            self.hypotheses = [h.settled(shared) for h in self.hypotheses]
        return best.tokens[:shared]


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    # e^-37 is below the resolution of a double; two impossible scores have no difference.
    return a if b == _NEVER or b < a - 37.0 else a + math.log1p(math.exp(b - a))


def _shared(sequences: Sequence[tuple[int, ...]]) -> int:
    """Length of what all begin with."""
    first, last = min(sequences), max(sequences)  # these two differ first
    for i, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return i
    return min(len(first), len(last))
