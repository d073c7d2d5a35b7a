"""Holds an exported bundle against the torch model over carried state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loquent.engine.bundle import Bundle
from loquent.engine.encoder import OnnxEncoder
from loquent.models.student import Student


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Largest absolute differences over ``steps`` windows of one setting.

    Attributes:
        batch: streams, of different ages.
        segment, right_context: feature frames.
        ctc, joiner: of the heads' outputs (0 where there is no such head).
        state: of the carried states.
        flips: frames whose best CTC label differs, of ``frames``.
    """

    batch: int
    segment: int
    right_context: int
    steps: int
    ctc: float
    joiner: float
    state: float
    flips: int
    frames: int


def compare(
    student: Student,
    bundle: Bundle,
    *,
    steps: int = 20,
    batches: tuple[int, ...] = (1, 4),
    seed: int = 0,
) -> Iterator[Parity]:
    """One row for each batch size, segment and right context of the bundle.

    Half-way through, every second stream of a batch starts anew, so the in-graph age mask is part
    of what is compared.
    """
    graph = OnnxEncoder(bundle)
    spec = bundle.encoder
    for batch in batches:
        for segment in spec.segments:
            for right in spec.right_contexts:
                yield _run(student, bundle, graph, batch, segment, right, steps, seed)


def _larger(worst: float, difference: NDArray[Any]) -> float:
    """Unlike ``max``, this keeps NaN: a graph that gives NaN is no match for anything."""
    return float(np.maximum(worst, np.abs(difference).max()))


def _run(
    student: Student,
    bundle: Bundle,
    graph: OnnxEncoder,
    batch: int,
    segment: int,
    right: int,
    steps: int,
    seed: int,
) -> Parity:
    rng = np.random.default_rng(seed)
    encoder = student.encoder
    length = segment + right + bundle.encoder.lookahead
    ours = encoder.initial_state(batch)
    worst = {"ctc": 0.0, "joiner": 0.0, "state": 0.0}
    flips = frames = 0
    theirs = {name: t.numpy() for name, t in ours.items()}
    for step in range(steps):
        # Every second stream is new again half-way through: mixed ages.
        if step == steps // 2:
            for name, tensor in ours.items():
                theirs[name] = theirs[name].copy()
                tensor[1::2] = 0
                theirs[name][1::2] = 0
        window = rng.standard_normal((batch, length, bundle.features.n_mels)).astype(np.float32)
        with torch.no_grad():
            encoded, ours = encoder.step(torch.from_numpy(window), torch.tensor(right), ours)
            expected = {}
            if student.ctc is not None:
                expected["ctc"] = student.ctc_log_probs(encoded).numpy()
            if student.config.joiner_dim:
                expected["joiner"] = student.encoder_projection(encoded).numpy()
        got, theirs = graph.step(window, right, theirs)
        for head, value in expected.items():
            worst[head] = _larger(worst[head], got[head] - value)
        if "ctc" in expected:
            best = got["ctc"].argmax(-1)
            flips += int((best != expected["ctc"].argmax(-1)).sum())
            frames += best.size
        for name, tensor in ours.items():
            worst["state"] = _larger(worst["state"], theirs[name] - tensor.numpy())
    return Parity(
        batch=batch,
        segment=segment,
        right_context=right,
        steps=steps,
        flips=flips,
        frames=frames,
        **worst,
    )
