"""Confidences that are probabilities: a logistic map from what tokens say, and what it is worth.

The map is fitted on one half of a set and judged on the other. Measures: expected calibration error
(arXiv 1706.04599, ten bins of equal width), normalised cross entropy (the measure of NIST's
evaluations of confidences: 0 for the base rate, 1 for certainty) and the area under the ROC curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from loquent.engine.words import WordRules, evidence
from loquent.export.wordtrial import Heard

Float = NDArray[np.float64]
BINS = 10
_RIDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """What confidences were worth.

    Attributes:
        ece, nce, auc: see the module.
        bins: (mean confidence, share of right words, words) of each bin that has words.
    """

    words: int
    right: float
    ece: float
    nce: float
    auc: float
    bins: tuple[tuple[float, float, int], ...]


def fit_confidence(words: Sequence[Heard], rules: WordRules) -> WordRules:
    """The rules with the most likely weights (penalised maximum likelihood, Newton's method).

    A weight that would be negative is left out: a token that is surer never makes a word less sure.
    """
    target = np.array([word.right for word in words], np.float64)
    if not 0 < target.sum() < len(target):
        raise ValueError("confidences need words that are right and words that are wrong")
    features = np.array([evidence(word.tokens) for word in words])
    # What is the same for all words (greedy decoding always agrees) is in the bias.
    varies = features.max(axis=0) > features.min(axis=0)
    names = [n for n, v in zip(["least", "odds", "agreed"], varies, strict=True) if v]
    features = features[:, varies]
    while True:
        weights = _logistic(features[:, : len(names)], target)
        worst = int(weights[1:].argmin()) if names else 0
        if not names or weights[1 + worst] >= 0:
            break
        del names[worst]
        features = np.delete(features, worst, axis=1)
    found = {name: round(float(w), 4) for name, w in zip(names, weights[1:], strict=True)}
    empty = {"least": 0.0, "odds": 0.0, "agreed": 0.0}
    return replace(rules, bias=round(float(weights[0]), 4), **(empty | found))


def reliability(words: Sequence[Heard], rules: WordRules) -> Reliability:
    """How well the rules' confidences tell right words from wrong ones."""
    p = np.array([rules.confidence(word.tokens) for word in words])
    y = np.array([word.right for word in words], np.float64)
    index = np.minimum((p * BINS).astype(int), BINS - 1)
    bins = tuple(
        (float(p[index == k].mean()), float(y[index == k].mean()), int((index == k).sum()))
        for k in range(BINS)
        if (index == k).any()
    )
    return Reliability(
        words=len(y),
        right=float(y.mean()),
        ece=sum(abs(mean - right) * count for mean, right, count in bins) / len(y),
        nce=1 - _cross_entropy(p, y) / _cross_entropy(np.full(len(y), y.mean()), y),
        auc=_auc(p, y),
        bins=bins,
    )


def _logistic(features: Float, target: Float) -> Float:
    x = np.column_stack([np.ones(len(features)), features])
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (p - target) / len(target) + _RIDGE * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x / len(target) + _RIDGE * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        w -= step
        if np.abs(step).max() < 1e-8:
            break
    return w


def _cross_entropy(p: Float, y: Float) -> float:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return float(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean())


def _auc(p: Float, y: Float) -> float:
    """Probability that a right word has more confidence than a wrong one, ties being halves."""
    _values, index, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    right = y.sum()
    if not 0 < right < len(y):
        return float("nan")
    u = ranks[index][y == 1].sum() - right * (right + 1) / 2
    return float(u / (right * (len(y) - right)))
