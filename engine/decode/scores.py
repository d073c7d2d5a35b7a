"""What one frame says of the hypotheses of all streams of a batch: the part of a search in arrays.

Everything here is done once for the batch, and comes out as plain numbers for each stream.

Shapes: B streams, H hypotheses of all streams together, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


class Growth(NamedTuple):
    """A hypothesis may go on with a token.

    Attributes:
        parent: which of the stream's.
        token: with what.
        rnnt, ctc: its probability by each (natural logarithms); 0 where that does not score.
        both: weighted.
        bonus: for taking the transducer's own language model off.
    """

    parent: int
    token: int
    rnnt: float
    ctc: float
    both: float
    bonus: float


class Scores(NamedTuple):
    """What a frame says of one stream's hypotheses.

    Attributes:
        speech: the best one says something.
        stay: blank by RNN-T after each; empty without RNN-T.
        silence: blank by CTC.
        hold: the last token of each by CTC; empty without CTC.
        growths: what they may go on with.
    """

    speech: bool
    stay: list[float]
    silence: float
    hold: list[float]
    growths: list[Growth]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The hypotheses of a batch, those of a stream one after another.

    Attributes:
        sizes: how many each stream has.
        totals: their scores so far.
        last: their last tokens; -1 for none.
        margins, most: of each stream, how far below the best a growth may be, and how many are
            kept.
    """

    sizes: Sequence[int]
    totals: Sequence[Sequence[float]]
    last: Sequence[int]
    margins: Sequence[float]
    most: Sequence[int]


def score(
    rows: Rows,
    *,
    rnnt: Float32 | None,
    ctc: Float32 | None,
    own: Float32 | None,
    hot: Float32 | None,
    share: float,
    blank: int,
) -> list[Scores]:
    """One for each stream.

    Args:
        rows: the hypotheses.
        rnnt: (H, V) log-probabilities after each, or None.
        ctc: (B, V) log-probabilities, or None; one of the two is there.
        own: (H, V) of the transducer's own language model, to be taken off.
        hot: (H, V) what hotwords are worth.
        share: of CTC.
        blank: id of the blank token.
    """
    sizes = rows.sizes
    ends = np.cumsum(np.array(sizes, np.int64))
    starts = ends - np.array(sizes, np.int64)
    stream = np.repeat(np.arange(len(sizes)), sizes)
    if ctc is None:
        assert rnnt is not None, "something scores"
        both = rnnt
    elif rnnt is None:
        both = ctc[stream]
    else:
        both = (1 - share) * rnnt + share * ctc[stream]
    # Relative to the best, as totals grow for hours and float32 has seven digits.
    tops = [max(totals) for totals in rows.totals]
    relative = [total - top for row, top in zip(rows.totals, tops, strict=True) for total in row]
    value = both + np.array(relative, np.float32)[:, None]
    if own is not None:
        value -= own
    if hot is not None:
        value += hot
    best = [row.index(top) for row, top in zip(rows.totals, tops, strict=True)]
    speech = (both[starts + best].argmax(axis=1) != blank).tolist()
    floors = np.maximum.reduceat(value.max(axis=1), starts) - np.array(rows.margins, np.float32)
    value[:, blank] = -np.inf
    flat = np.flatnonzero(value > floors[stream][:, None])
    parts, begin = [], 0
    bounds = np.searchsorted(flat, ends * both.shape[1]).tolist()
    for end, most in zip(bounds, rows.most, strict=True):
        part, begin = flat[begin:end], end
        if len(part) > most:
            part = part[np.argpartition(value.ravel()[part], -most)[-most:]]
        parts.append(part)
    growths = _growths(parts, starts, stream, rnnt, ctc, both, own)
    stay = [] if rnnt is None else rnnt[:, blank].tolist()
    silence = [0.0] * len(sizes) if ctc is None else ctc[:, blank].tolist()
    hold = [] if ctc is None else ctc[stream, rows.last].tolist()
    return [
        Scores(speech[i], stay[start:end], silence[i], hold[start:end], growths[i])
        for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
    ]


def _growths(
    parts: Sequence[NDArray[np.int64]],
    starts: NDArray[np.int64],
    stream: NDArray[np.int64],
    rnnt: Float32 | None,
    ctc: Float32 | None,
    both: Float32,
    own: Float32 | None,
) -> list[list[Growth]]:
    flat = np.concatenate(parts)
    row, token = np.divmod(flat, both.shape[1])
    nothing = [0.0] * len(flat)
    found = map(
        Growth,
        (row - starts[stream[row]]).tolist(),
        token.tolist(),
        nothing if rnnt is None else rnnt.ravel()[flat].tolist(),
        nothing if ctc is None else ctc[stream[row], token].tolist(),
        both.ravel()[flat].tolist(),
        nothing if own is None else (-own.ravel()[flat]).tolist(),
    )
    return [[next(found) for _ in range(len(part))] for part in parts]
