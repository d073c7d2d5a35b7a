"""New heads learn before the encoder does, on what a pretrained encoder has said.

A new head starts from noise, and its first gradients wash out what a pretrained encoder knows,
above all of voices that are in no training data (Kumar et al., arXiv 2202.10054: linear probing,
then fine-tuning). What ``loquent distill --encoder`` has kept is the encoder's output already, so
that heads learn from it at next to no cost: no encoder runs. A student that begins as that encoder
has heads that fit it from its first step on.

Shapes: B utterances, N output frames, E features, U tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from loquent.models.data import DataError, Utterance, epoch_batches
from loquent.models.devices import find_devices
from loquent.models.posteriors import Posteriors
from loquent.models.student import Student

_BATCH_FRAMES = 1500  # 60 s at 25 frames a second
_WARMUP = 50  # steps
_RNNT_FROM = 0.4  # of the steps: CTC costs a tenth of a transducer's step, and comes first
_LR, _TRAINED_LR = 4e-3, 5e-4  # of what starts from noise, and of a predictor that knows its tokens
_MASKS, _MASK_FRAMES = 2, 8  # in time, so that heads learn to take more than one frame's word
_CTC_WEIGHT = 0.4
_DROP_ABOVE = 5.0  # nats a token: labels that far off are wrong more often than hard


def learn_heads(
    student: Student,
    heard: Posteriors,
    utterances: Sequence[Utterance],
    targets: Sequence[Sequence[int]],
    *,
    steps: int,
    seed: int = 1,
    trained_predictor: bool = False,
    bf16: bool = True,
) -> dict[str, float]:
    """Train everything of the student but its encoder.

    Args:
        student: its heads are changed, its encoder is neither run nor changed.
        heard: what the pretrained encoder said, with its output.
        utterances, targets: with their tokens; those that it has not heard are left out.
        steps: optimiser steps of a minute of audio, the last 60 % with the transducer.
        trained_predictor: predictor and joiner know the tokens already, and learn more slowly.
        bf16: autocast where the device is made for it.

    Returns:
        Losses in nats a token, smoothed, at the end.

    Raises:
        DataError: the encoder's output has not the student's width, or was not kept.
    """
    width = student.config.encoder.width
    if heard.width != width:
        got = f"of width {heard.width}" if heard.width else "not kept (`loquent distill --encoder`)"
        raise DataError(
            f"--heads-first: the teacher's encoder output is {got}, expected the student's {width}"
        )
    rows = _rows(heard, utterances, targets)
    devices = find_devices(bf16=bf16)
    student.to(devices.device).train()
    fresh: list[Tensor] = []
    trained: list[Tensor] = []
    for name, p in student.named_parameters():
        p.requires_grad_(not name.startswith("encoder."))
        if p.requires_grad:
            known = trained_predictor and name.startswith(("predictor.", "joiner."))
            (trained if known else fresh).append(p)
    groups = [{"params": fresh, "peak": _LR}, {"params": trained, "peak": _TRAINED_LR}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.98), weight_decay=1e-4
    )
    rng = np.random.default_rng(seed)
    smooth: dict[str, float] = {}
    batches = _batches(rows, rng, seed)
    bar = tqdm(range(steps), unit="step", desc="heads", smoothing=0.05)
    for step in bar:
        x, frames, y, lengths = (t.to(devices.device) for t in next(batches))
        rnnt = student.config.joiner_dim > 0 and step >= _RNNT_FROM * steps
        with devices.autocast():
            losses = student.losses(
                x,
                frames,
                y,
                lengths,
                rnnt=rnnt,
                drop_above=_DROP_ABOVE if step >= 4 * _WARMUP else math.inf,
            )
            weight = _CTC_WEIGHT if rnnt else 1.0
            loss = (weight * losses.ctc + (1 - weight) * losses.rnnt) / max(1, losses.tokens)
        rate = min(1.0, (step + 1) / _WARMUP, 0.03 + 2 * (steps - step) / steps)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([*fresh, *trained], 5.0)
        optimizer.step()
        for name, value in (("ctc", losses.ctc), ("rnnt", losses.rnnt)):
            nats = float(value.detach()) / max(1, losses.tokens)
            smooth[name] = 0.98 * (smooth.get(name) or nats) + 0.02 * nats
        bar.set_postfix({name: f"{v:.3f}" for name, v in smooth.items()}, refresh=False)
    for p in student.parameters():
        p.requires_grad_(True)
    return smooth


Row = tuple[NDArray[np.floating], Sequence[int]]


def _rows(
    heard: Posteriors, utterances: Sequence[Utterance], targets: Sequence[Sequence[int]]
) -> list[Row]:
    rows: list[Row] = []
    for utterance, tokens in zip(utterances, targets, strict=True):
        said = heard.get(utterance)
        if said is not None and said.features_NE is not None:
            rows.append((said.features_NE, tokens))
    if not rows:
        raise DataError("--heads-first: the teacher has heard none of the utterances of --data")
    return rows


def _batches(
    rows: Sequence[Row], rng: np.random.Generator, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Features (B, N, E), their lengths, tokens (B, U), their lengths; for ever."""
    lengths = [len(features) for features, _ in rows]
    epoch = 0
    while True:
        for indices in epoch_batches(
            lengths, [1.0] * len(rows), _BATCH_FRAMES, seed=seed * 1000 + epoch
        ):
            chosen = [rows[i] for i in indices]
            longest = max(len(features) for features, _ in chosen)
            width = max(1, *(len(tokens) for _, tokens in chosen))
            x = torch.zeros(len(chosen), longest, chosen[0][0].shape[1])
            y = torch.zeros(len(chosen), width, dtype=torch.int64)
            for row, (features, tokens) in enumerate(chosen):
                count = len(features)
                x[row, :count] = torch.from_numpy(features.astype(np.float32))
                y[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
                for _ in range(_MASKS):
                    size = int(rng.integers(0, min(_MASK_FRAMES, count // 10) + 1))
                    start = int(rng.integers(0, count - size + 1))
                    x[row, start : start + size] = 0.0
            yield (
                x,
                torch.tensor([len(features) for features, _ in chosen]),
                y,
                torch.tensor([len(tokens) for _, tokens in chosen]),
            )
        epoch += 1
