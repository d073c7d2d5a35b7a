"""CTC prefix beam search, frame by frame, with a word n-gram model fused in.

Prefix beam search after Hannun et al., arXiv 1408.2873; the language model is applied to whole
words, and to the beginning of a word as the best word that begins so, which keeps hypotheses in
the middle of a word comparable with those at its end.

What all hypotheses share is settled and is given out at once; it never changes. The rest of the
best one is tentative. A hypothesis that disagrees with the best for longer than the horizon is
dropped, so every token settles in bounded time and memory is flat however long the stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loquent.engine.decode import Frame, Token
from loquent.engine.endpoint import Endpointer
from loquent.engine.ngram import Ngram, State
from loquent.engine.text import WORD_START

Float32 = NDArray[np.float32]
_NEVER = -math.inf
# A frame that is blank with this probability does nothing but end a repetition.
_SURE = math.log(0.995)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamRules:
    """How wide to search; scores are natural logarithms.

    Attributes:
        beam: hypotheses kept.
        margin: a hypothesis that is this much worse than the best is dropped.
        tokens: most tokens considered in a frame.
        horizon: encoder frames after which a token of the best hypothesis is settled.
        lm_weight: of the language model.
        word_bonus: for every word, against the deletions that a language model causes.
        unknown: for a word that the language model does not know.
    """

    beam: int = 16
    margin: float = 10.0
    tokens: int = 8
    horizon: int = 50
    lm_weight: float = 0.4
    word_bonus: float = 1.5
    unknown: float = -10.0


class Fusion:
    """The language model in terms of the pieces of one vocabulary. Shared by all streams.

    Args:
        pieces: the bundle's tokens by id.
        ngram: None scores nothing.
        rules: weights.
    """

    def __init__(self, pieces: Sequence[str], ngram: Ngram | None, rules: BeamRules) -> None:
        self.pieces = pieces
        self.starts = [piece.startswith(WORD_START) for piece in pieces]
        self.texts = [piece.removeprefix(WORD_START) for piece in pieces]
        self.rules = rules
        self.ngram = ngram
        self.start: State = ngram.start if ngram else ()
        self._ahead: dict[str, float] = {}
        if ngram:
            for word, index in ngram.ids.items():
                logp = ngram.unigram(index)
                for end in range(1, len(word) + 1):
                    prefix = word[:end]
                    if logp > self._ahead.get(prefix, _NEVER):
                        self._ahead[prefix] = logp
            self._ahead[""] = 0.0

    def ahead(self, prefix: str) -> float:
        """Score of a word that begins so and is not over."""
        if self.ngram is None:
            return 0.0
        r = self.rules
        logp = self._ahead.get(prefix)
        return r.lm_weight * logp if logp is not None else r.unknown

    def word(self, state: State, word: str) -> tuple[float, State]:
        """Score of a whole word, and the language model's next state."""
        if self.ngram is None or not word:
            return 0.0, state
        r = self.rules
        index = self.ngram.ids.get(word)
        if index is None:
            _, state = self.ngram.score(state, self.ngram.unknown)
            return r.unknown + r.word_bonus, state
        logp, state = self.ngram.score(state, index)
        return r.lm_weight * logp + r.word_bonus, state


class _Node:
    """A prefix: the last token, what came before, and the language model's view of it."""

    __slots__ = ("ahead", "children", "frame", "lm", "logp", "parent", "score", "state", "token")

    def __init__(
        self, parent: _Node | None, token: int, frame: int, logp: float, state: State, lm: float
    ) -> None:
        self.parent, self.token, self.frame, self.logp = parent, token, frame, logp
        self.children: dict[int, _Node] = {}
        # Words that are over: the model's state behind them and the sum of their scores.
        self.state, self.lm = state, lm
        self.ahead = ""  # the word that is growing
        self.score = lm


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    # e^-37 is below the resolution of a double; two impossible scores have no difference.
    return a if b == _NEVER or b < a - 37.0 else a + math.log1p(math.exp(b - a))


class CtcBeam:
    """The search of one stream."""

    def __init__(self, fusion: Fusion, blank: int) -> None:
        self._fusion = fusion
        self._blank = blank
        self._restart()

    def _restart(self) -> None:
        # The root is what has been given out last; scores are counted from there.
        self._root = _Node(None, -1, -1, 0.0, self._fusion.start, 0.0)
        self._beam: dict[_Node, tuple[float, float]] = {self._root: (0.0, _NEVER)}

    def fork(self) -> CtcBeam:
        """A search in the same state, which goes its own way."""
        twins: dict[_Node, _Node] = {}
        for node in (self._root, *(node for leaf in self._beam for node in self._path(leaf))):
            if node not in twins:
                twin = twins[node] = copy(node)
                twin.children = {}
                if node is not self._root and node.parent is not None:
                    twin.parent = twins[node.parent]
                    twin.parent.children[node.token] = twin
        other = copy(self)
        other._root = twins[self._root]
        other._beam = {twins[node]: scores for node, scores in self._beam.items()}
        return other

    @property
    def pending(self) -> tuple[Token, ...]:
        """The best hypothesis beyond what was given out."""
        return tuple(_token(node) for node in self._path(self._best()))

    def accept(self, log_probs: Float32, first: int, endpointer: Endpointer) -> list[Frame]:
        """Decode the frames that follow.

        Args:
            log_probs: (K, V) natural logarithms.
            first: index of the first of these K frames in the stream.
            endpointer: a copy of the stream's, which tells where a segment ends.

        Returns:
            A frame for each, with the tokens that settled there, which may be of earlier frames.
        """
        frames: list[Frame] = []
        tops = log_probs.argmax(axis=1).tolist()
        for k, top in enumerate(tops):
            number = first + k
            row = log_probs[k]
            self._advance(row, number)
            speech = top != self._blank
            tokens: tuple[Token, ...] = ()
            if endpointer.accept(Frame(number, (), speech)) == "endpoint":
                tokens = self.flush()
                endpointer.restart(None)
            elif k == len(tops) - 1:
                tokens = self._settle(number)
            frames.append(Frame(number, tokens, speech))
        return frames

    def flush(self) -> tuple[Token, ...]:
        """Settle on the best hypothesis, its last word being over, and begin a new sentence."""
        nodes = self._path(self._best(whole=True))
        self._restart()
        return tuple(_token(node) for node in nodes)

    # -- search -----------------------------------------------------------------------------

    def _advance(self, row: Float32, number: int) -> None:
        rules = self._fusion.rules
        blank = float(row[self._blank])
        if blank > _SURE:
            self._beam = {n: (_add(b, t) + blank, _NEVER) for n, (b, t) in self._beam.items()}
            return
        # A bit below the best token even where blank is likely: the language model may want it.
        least = max(-12.0, float(row.max()) - rules.margin)
        candidates = np.flatnonzero(row > least)
        if len(candidates) > rules.tokens:
            candidates = candidates[
                np.argpartition(row[candidates], -rules.tokens)[-rules.tokens :]
            ]
        likely = [
            (token, float(row[token])) for token in candidates.tolist() if token != self._blank
        ]
        scores = dict(likely)
        old = self._beam
        floor = max(_add(b, t) + n.score for n, (b, t) in old.items()) + float(row.max())
        floor -= rules.margin
        new: dict[_Node, list[float]] = {}
        for node, (b, t) in old.items():
            both = _add(b, t)
            own = new.get(node)
            if own is None:
                own = new[node] = [_NEVER, _NEVER]
            own[0] = _add(own[0], both + blank)
            again = scores.get(node.token)
            if again is not None:
                own[1] = _add(own[1], t + again)
            for token, logp in likely:
                # The same token twice in a row is two tokens only with a blank in between.
                value = (b if token == node.token else both) + logp
                if value + node.score < floor:
                    continue
                child = node.children.get(token)
                if child is None:
                    child = self._extend(node, token, number, logp)
                elif child not in old and child not in new:
                    child.frame, child.logp = number, logp
                slot = new.get(child)
                if slot is None:
                    new[child] = [_NEVER, value]
                else:
                    slot[1] = _add(slot[1], value)
        ranked = [(_add(b, t) + node.score, node) for node, (b, t) in new.items()]
        ranked.sort(key=_first, reverse=True)
        worst = ranked[0][0] - rules.margin
        self._beam = {
            node: (new[node][0], new[node][1])
            for score, node in ranked[: rules.beam]
            if score >= worst
        }

    def _extend(self, node: _Node, token: int, number: int, logp: float) -> _Node:
        fusion = self._fusion
        if fusion.starts[token]:
            score, state = fusion.word(node.state, node.ahead)
            child = _Node(node, token, number, logp, state, node.lm + score)
            child.ahead = fusion.texts[token]
        else:
            child = _Node(node, token, number, logp, node.state, node.lm)
            child.ahead = node.ahead + fusion.texts[token]
        child.score = child.lm + fusion.ahead(child.ahead)
        node.children[token] = child
        return child

    def _best(self, *, whole: bool = False) -> _Node:
        def value(node: _Node) -> float:
            b, t = self._beam[node]
            lm = node.lm + self._fusion.word(node.state, node.ahead)[0] if whole else node.score
            return _add(b, t) + lm

        return max(self._beam, key=value)

    # -- what is settled ---------------------------------------------------------------------

    def _path(self, node: _Node) -> list[_Node]:
        nodes: list[_Node] = []
        at: _Node | None = node
        while at is not None and at is not self._root:
            nodes.append(at)
            at = at.parent
        return nodes[::-1]

    def _settle(self, number: int) -> tuple[Token, ...]:
        """Give out what all share; drop what has disagreed with the best for too long."""
        path = self._path(self._best())
        late = number - self._fusion.rules.horizon
        keep = sum(1 for node in path if node.frame <= late)
        paths = {node: self._path(node) for node in self._beam}
        if keep:
            prefix = path[:keep]
            paths = {node: p for node, p in paths.items() if p[:keep] == prefix}
            self._beam = {node: self._beam[node] for node in paths}
        shared = 0
        others = list(paths.values())
        while all(len(p) > shared and p[shared] is path[shared] for p in others):
            shared += 1
            if shared == len(path):
                break
        alive = {node for p in others for node in p}
        for node in alive:
            node.children = {t: c for t, c in node.children.items() if c in alive}
        self._root.children = {t: c for t, c in self._root.children.items() if c in alive}
        if not shared:
            return ()
        out = tuple(_token(node) for node in path[:shared])
        self._root = path[shared - 1]
        self._root.parent = None
        self._rescale()
        return out

    def _rescale(self) -> None:
        # Only differences count, and sums that grow for hours would lose their last digits.
        top = max(_add(b, t) for b, t in self._beam.values())
        self._beam = {n: (b - top, t - top) for n, (b, t) in self._beam.items()}


def _first(pair: tuple[float, _Node]) -> float:
    return pair[0]


def _token(node: _Node) -> Token:
    return Token(node.token, node.frame, node.logp)
