"""Knowledge distillation: what a teacher says about a batch, and the terms that use it.

Every term is a sum over the batch, in nats where it is a divergence, and is divided by the number
of target tokens like the other losses. :class:`Distillation` has their weights; 0 leaves one out.

Shape suffixes: B utterances, N output frames, V vocabulary, K kept tokens, E features, U tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Metric = Literal["cosine", "l2"]
_NEVER = -80.0  # a log-probability whose product with its own probability is nothing


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Weights of the terms.

    Attributes:
        ctc: frame by frame, the teacher's CTC posteriors (:func:`delayed_ctc`).
        delay: output frames that a causal student may lag behind its teacher.
        full_sum: the log-posterior of the whole text (:func:`full_sum`).
        features: the encoder's output (:func:`feature_distance`).
        metric: distance of the encoder's output.
        beside: frame by frame, the CTC posteriors of a student that runs beside, which hears the
            same chunks of the same changed audio (:func:`same_frames`).
        lattice: the transducer's lattice (:func:`lattice`), of the student beside.
    """

    ctc: float = 0.0
    delay: int = 4
    full_sum: float = 0.0
    features: float = 0.0
    metric: Metric = "cosine"
    beside: float = 0.0
    lattice: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Signals:
    """A teacher's view of a batch, at the student's output frames.

    Attributes:
        ids_BNK: tokens that the teacher gives most to.
        logs_BNK: their log-probabilities, which sum up to one.
        real_BN: where the teacher has said something.
        text_B: log-posterior of the utterance's text; NaN where that is unknown.
        features_BNE: the teacher's encoder output, if it was kept.
    """

    ids_BNK: Tensor
    logs_BNK: Tensor
    real_BN: Tensor
    text_B: Tensor
    features_BNE: Tensor | None = None


@dataclass(frozen=True)
class Said:
    """A teacher's view of one utterance, at its own frame rate.

    Attributes:
        ids_NK, logs_NK: as in :class:`Signals`.
        blank_N: log-probability of the blank.
        text: log-posterior of the text.
        features_NE: encoder output.
    """

    ids_NK: NDArray[np.integer]
    logs_NK: NDArray[np.floating]
    blank_N: NDArray[np.floating]
    text: float
    features_NE: NDArray[np.floating] | None


def resample(blank_N: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """Which of N frames stands at each of ``count`` frames that span the same time.

    CTC posteriors are spikes in a sea of blanks: where several frames fall into one, the one with
    the least blank is taken, or a faster utterance would lose tokens.
    """
    ratio = len(blank_N) / count
    edges = np.ceil(np.arange(count + 1) * ratio).astype(np.int64)
    nearest = np.minimum(((np.arange(count) + 0.5) * ratio).astype(np.int64), len(blank_N) - 1)
    first, last = edges[:-1], edges[1:]
    best = np.where(last > first, np.minimum(first, len(blank_N) - 1), nearest)
    for offset in range(1, int(np.ceil(ratio)) + 1):
        other = np.minimum(first + offset, len(blank_N) - 1)
        better = (first + offset < last) & (blank_N[other] < blank_N[best])
        best = np.where(better, other, best)
    return best


def collate_signals(
    rows: Sequence[Sequence[tuple[Said | None, int, int]]], frames: int, subsampling: int
) -> Signals | None:
    """Bring what was said to the student's frames.

    Args:
        rows: for each row of the batch its parts (utterances put together), each with the feature
            frames of a pause in front of it, of which the teacher has said nothing, and the number
            of those that it has become (augmentation changes the speed).
        frames: output frames of the batch.
        subsampling: feature frames per output frame.

    Returns:
        None if the teacher has said nothing about any of them.
    """
    known = [said for row in rows for said, _, _ in row if said is not None]
    if not known:
        return None
    kept = known[0].ids_NK.shape[1]
    shape = (len(rows), frames, kept)
    ids, logs = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    real = np.zeros(shape[:2], bool)
    text = np.full(len(rows), np.nan, np.float32)
    wide = known[0].features_NE
    features = None if wide is None else np.zeros((*shape[:2], wide.shape[1]), np.float32)
    for b, row in enumerate(rows):
        start, total = 0, 0.0
        for said, before, length in row:
            start += before
            first, last = -(-start // subsampling), min(frames, -(-(start + length) // subsampling))
            start += length
            total += np.nan if said is None else said.text
            if said is None or last <= first:
                continue
            at = resample(said.blank_N, last - first)
            ids[b, first:last], logs[b, first:last] = said.ids_NK[at], said.logs_NK[at]
            real[b, first:last] = True
            if features is not None and said.features_NE is not None:
                # No spikes here: linear interpolation between frame centres.
                theirs = said.features_NE
                where = (np.arange(last - first) + 0.5) * len(theirs) / (last - first) - 0.5
                where = where.clip(0, len(theirs) - 1)
                low = where.astype(np.int64)
                high = np.minimum(low + 1, len(theirs) - 1)
                part = (where - low)[:, None].astype(np.float32)
                features[b, first:last] = (1 - part) * theirs[low] + part * theirs[high]
        text[b] = total
    return Signals(
        ids_BNK=torch.from_numpy(ids),
        logs_BNK=torch.from_numpy(logs),
        real_BN=torch.from_numpy(real),
        text_B=torch.from_numpy(text),
        features_BNE=None if features is None else torch.from_numpy(features),
    )


def delayed_ctc(log_probs_BNV: Tensor, signals: Signals, frames_B: Tensor, delay: int) -> Tensor:
    """Divergence of the student's CTC posteriors from the teacher's, per utterance: (B,).

    A student that sees little of the future says a token later than a teacher that sees it all.
    The teacher's frame n stands against the student's n + d, and of all d from 0 to ``delay`` the
    one counts that fits an utterance best (Delayed-KD, arXiv 2505.22069, whose buffer is this
    range). The sum over frames keeps its size whatever d is.
    """
    valid_BN = torch.arange(log_probs_BNV.shape[1], device=frames_B.device) < frames_B[:, None]
    count_B = (signals.real_BN & valid_BN).sum(1)
    probs_BNK = signals.logs_BNK.exp()
    best: Tensor | None = None
    for d in range(min(delay, log_probs_BNV.shape[1] - 1) + 1):
        end = log_probs_BNV.shape[1] - d
        own = log_probs_BNV[:, d:].gather(2, signals.ids_BNK[:, :end])
        both = signals.real_BN[:, :end] & valid_BN[:, d:]
        each = (probs_BNK[:, :end] * (signals.logs_BNK[:, :end] - own)).sum(2)
        mean_B = each.masked_fill(~both, 0.0).sum(1) / both.sum(1).clamp(min=1)
        mean_B = mean_B.masked_fill(both.sum(1) == 0, torch.inf)
        best = mean_B if best is None else torch.minimum(best, mean_B)
    assert best is not None
    return torch.where(count_B > 0, best, torch.zeros_like(best)) * count_B


def same_frames(own_BNV: Tensor, theirs_BNV: Tensor, frames_B: Tensor) -> Tensor:
    """KL divergence of each utterance from the teacher's posteriors to ours, (B,) in nats.

    Args:
        own_BNV, theirs_BNV: log-probabilities at the same frames.
        frames_B: valid lengths.
    """
    each_BN = F.kl_div(own_BNV, theirs_BNV, reduction="none", log_target=True).sum(2)
    real_BN = torch.arange(each_BN.shape[1], device=each_BN.device) < frames_B[:, None]
    return torch.where(real_BN, each_BN, 0.0).sum(1)


def full_sum(student_B: Tensor, teacher_B: Tensor) -> Tensor:
    """Distance of the log-posteriors of whole texts, summed over all alignments: (B,).

    It leaves the alignment to the student, and stands labels that a poor teacher made (arXiv
    2303.05958). Utterances whose text the teacher has not scored (NaN) cost nothing.
    """
    known = teacher_B.isfinite()
    return torch.where(known, (student_B - teacher_B.masked_fill(~known, 0.0)).abs(), 0.0)


def feature_distance(
    own_BNE: Tensor, teacher_BNE: Tensor, real_BN: Tensor, metric: Metric
) -> Tensor:
    """Distance of the (projected) encoder output to the teacher's, summed over frames: ().

    ``cosine`` is 1 - cos, ``l2`` the mean square over the width.
    """
    if metric == "cosine":
        each = 1 - F.cosine_similarity(own_BNE, teacher_BNE, dim=2)
    else:
        each = (own_BNE - teacher_BNE).square().mean(2)
    return each.masked_fill(~real_BN, 0.0).sum()


def three_way(logits_BNUV: Tensor, targets_BU: Tensor, targets_B: Tensor, blank: int) -> Tensor:
    """Log-probabilities of next token, blank and all the rest: (B, N, U + 1, 3).

    Behind the last token there is no next one; its share belongs to the rest.
    """
    logs = F.log_softmax(logits_BNUV.float(), dim=-1)
    stay = logs[..., blank]
    index = F.pad(targets_BU, (0, 1), value=blank)[:, None, :, None]
    emit = logs.gather(3, index.expand(-1, logs.shape[1], -1, -1))[..., 0]
    columns = torch.arange(logs.shape[2], device=logs.device)
    ended = (columns >= targets_B[:, None])[:, None]
    emit = emit.masked_fill(ended, _NEVER)
    rest = (1 - stay.exp() - emit.exp()).clamp(min=1e-7).log()
    return torch.stack([emit, stay, rest], dim=-1)


def lattice(
    own_BNU3: Tensor,
    teacher_BNU3: Tensor,
    frames_B: Tensor,
    targets_B: Tensor,
) -> Tensor:
    """Divergence over the nodes of the transducer's lattice, per utterance: (B,).

    Three outcomes instead of the whole vocabulary (arXiv 2011.06110): the next token, the blank,
    the rest. Both arguments come from :func:`three_way`.
    """
    frames, columns = own_BNU3.shape[1:3]
    inside = (torch.arange(frames, device=frames_B.device) < frames_B[:, None])[:, :, None] & (
        torch.arange(columns, device=frames_B.device) <= targets_B[:, None]
    )[:, None]
    each = (teacher_BNU3.exp() * (teacher_BNU3 - own_BNU3)).sum(3)
    # Averaged over the text: a frame counts as much as it does in the CTC term.
    return each.masked_fill(~inside, 0.0).sum((1, 2)) / (targets_B + 1)
