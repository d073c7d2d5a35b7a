"""Training of the student: resumable, with random segment and right context.

Everything random is a function of (seed, step) or (seed, epoch), so a run that was killed and
resumed goes through the same batches, masks and augmentations as one that was not.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from loquent.engine.features import Fbank, FeatureSpec
from loquent.models.checkpoint import (
    CheckpointError,
    Tensors,
    read_json,
    read_tensors,
    recover,
    save_checkpoint,
)
from loquent.models.data import (
    Augment,
    Batch,
    FeatureCache,
    augment,
    collate,
    epoch_batches,
    prefetch,
)
from loquent.models.scoring import Score, ctc_greedy
from loquent.models.student import Student
from loquent.models.tokens import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Lengths are in feature frames unless said otherwise.

    Attributes:
        steps: optimiser steps in all.
        batch_seconds: padded audio per step.
        lr, head_lr: peak learning rates of the encoder, and of everything behind it.
        warmup: steps of linear warm-up.
        decay: the learning rate stays at its peak and falls linearly to ``final_lr`` of it in so
            many last steps. A run may so be prolonged, or be ended from any checkpoint (warm-up,
            stable, decay; arXiv 2405.18392).
        rnnt_from: step at which the transducer loss joins the CTC loss.
        ctc_weight: of the CTC loss once both run (the transducer has the rest).
        segments: (segment, probability) pairs drawn per batch.
        long_until: up to this step only segments of ``long_segment`` and more are drawn: short ones
            cost up to three times the time, and what they need is learnt late.
        right_contexts: (right context, probability) pairs drawn per batch.
        ema: decay of the running average of the weights, which is what gets evaluated.
        save_every, eval_every: steps.
        bf16: autocast of the encoder.
        join: part of the batches in which every two utterances are put together to one, since
            captions go on for longer than the utterances that recordings are cut into.
        drop_above: an utterance whose CTC loss a token is above this many nats is left out: its
            label is wrong more often than it is hard.
    """

    steps: int
    seed: int = 1
    batch_seconds: float = 60.0
    lr: float = 3e-4
    head_lr: float = 2e-3
    final_lr: float = 0.03
    warmup: int = 200
    decay: int = 1500
    weight_decay: float = 0.01
    clip: float = 5.0
    rnnt_from: int = 500
    ctc_weight: float = 0.4
    segments: tuple[tuple[int, float], ...] = (
        (4, 0.05),
        (8, 0.1),
        (16, 0.2),
        (32, 0.3),
        (64, 0.2),
        (128, 0.15),
    )
    long_until: int = 0
    long_segment: int = 32
    right_contexts: tuple[tuple[int, float], ...] = ((0, 0.3), (4, 0.5), (8, 0.2))
    ema: float = 0.999
    save_every: int = 200
    eval_every: int = 500
    bf16: bool = True
    join: float = 0.25
    drop_above: float = 5.0
    augment: Augment = field(default_factory=Augment)


@dataclass
class Progress:
    """Counters that survive a kill."""

    step: int = 0
    audio_hours: float = 0.0
    core_hours: float = 0.0
    best_wer: float | None = None  # JSON has no infinity


def _draw(options: tuple[tuple[int, float], ...], rng: np.random.Generator) -> int:
    values, weights = zip(*options, strict=True)
    p = np.asarray(weights, np.float64)
    return int(rng.choice(values, p=p / p.sum()))


class Trainer:
    """One run in one folder.

    Args:
        run: folder of the run; ``run/last`` is resumed from when it exists.
        student: freshly initialised (or pretrained) student; overwritten when resuming.
        tokenizer: of its vocabulary.
        train, dev: features of the utterances.
        weights: share of each training utterance per epoch, see :func:`epoch_batches`.
        config: how to train.
        origin: what the weights started from, kept in the checkpoint for the model card.
        noise: features of recorded noise, to be added to the speech.
    """

    def __init__(
        self,
        run: Path,
        student: Student,
        tokenizer: Tokenizer,
        train: FeatureCache,
        dev: FeatureCache,
        weights: list[float],
        config: TrainConfig,
        origin: dict[str, Any],
        noise: FeatureCache | None = None,
    ) -> None:
        self.run, self.student, self.tokenizer = run, student, tokenizer
        self.train, self.dev, self.weights = train, dev, weights
        self.config, self.origin = config, origin
        self.noises = [noise[i] for i in range(len(noise))] if noise else []
        self.progress = Progress()
        self.spec: FeatureSpec = train.spec
        self.silence = torch.from_numpy(Fbank(self.spec).pad_frame)
        self.targets = [tokenizer.encode(u.text) for u in train.utterances]
        body: list[Tensor] = []
        heads: list[Tensor] = []
        for name, p in student.named_parameters():
            (body if name.startswith("encoder.") else heads).append(p)
        self.optimizer = torch.optim.AdamW(
            [{"params": body, "peak": config.lr}, {"params": heads, "peak": config.head_lr}],
            lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.average: Tensors = {n: p.detach().clone() for n, p in student.named_parameters()}
        recover(run / "last")
        if (run / "last").exists():
            self._resume()

    # -- state ------------------------------------------------------------------------------

    def _save(self, name: str, *, resumable: bool) -> None:
        slots: Tensors = {}
        if resumable:
            for parameter_name, p in self.student.named_parameters():
                for slot in ("exp_avg", "exp_avg_sq", "step"):
                    if p in self.optimizer.state:
                        slots[f"{parameter_name}.{slot}"] = self.optimizer.state[p][slot]
        save_checkpoint(
            self.run / name,
            self.student.config,
            self.tokenizer,
            self.average,
            {
                "progress": dataclasses.asdict(self.progress),
                "training": dataclasses.asdict(self.config),
                "features": self.spec.to_dict(),
                "origin": self.origin,
            },
            raw=dict(self.student.named_parameters()) if resumable else None,
            optimizer=slots if resumable else None,
        )

    def _resume(self) -> None:
        folder = self.run / "last"
        own = json.loads(json.dumps(self.student.config.to_dict()))
        if read_json(folder / "config.json") != own:
            raise CheckpointError(
                f"{folder}: the run that it belongs to trains a student of another shape; resume "
                "it with the settings it was started with, or choose another folder for the run"
            )
        self.progress = Progress(**read_json(folder / "state.json")["progress"])
        average = read_tensors(folder / "model.safetensors")
        # safetensors sorts by name; the update pairs the average with the parameters by position.
        self.average = {n: average[n] for n, _ in self.student.named_parameters()}
        self.student.load_state_dict(read_tensors(folder / "raw.safetensors"))
        slots = read_tensors(folder / "optimizer.safetensors")
        for name, p in self.student.named_parameters():
            if f"{name}.step" in slots:
                self.optimizer.state[p] = {
                    slot: slots[f"{name}.{slot}"] for slot in ("exp_avg", "exp_avg_sq", "step")
                }

    # -- data -------------------------------------------------------------------------------

    def _batches(self) -> Iterator[tuple[int, Batch, int, int]]:
        """(step, batch, segment, right context) from the current step on, for ever."""
        frames = [self.train.frames(i) for i in range(len(self.train))]
        per_batch = round(self.config.batch_seconds * self.spec.sample_rate / self.spec.hop)
        step, epoch = 0, 0
        while True:
            for indices in epoch_batches(
                frames, self.weights, per_batch, seed=self.config.seed * 1000 + epoch
            ):
                if step >= self.progress.step:
                    yield (step, *self._make(step, indices))
                step += 1
            epoch += 1

    def _make(self, step: int, indices: list[int]) -> tuple[Batch, int, int]:
        rng = np.random.default_rng((self.config.seed, step))
        c = self.config
        least = c.long_segment if step < c.long_until else 0
        segment = _draw(tuple(pair for pair in c.segments if pair[0] >= least), rng)
        right = _draw(self.config.right_contexts, rng)
        features = [
            augment(
                torch.from_numpy(self.train[i].astype(np.float32)),
                self.spec,
                self.config.augment,
                rng,
                self.noises,
            )
            for i in indices
        ]
        targets = [self.targets[i] for i in indices]
        if rng.random() < c.join:
            # Neighbours have about the same length, so little is padded.
            pairs = range(0, len(indices), 2)
            features = [torch.cat(features[k : k + 2]) for k in pairs]
            targets = [[t for part in targets[k : k + 2] for t in part] for k in pairs]
        encoder = self.student.config.encoder
        batch = collate(
            features,
            targets,
            indices,
            self.silence,
            multiple=encoder.subsampling,
            room=right + encoder.lookahead,
        )
        return batch, segment, right

    # -- the loop ---------------------------------------------------------------------------

    def _rate(self, step: int) -> float:
        c = self.config
        if step < c.warmup:
            return (step + 1) / c.warmup
        falling = step - max(c.warmup, c.steps - c.decay)
        return 1 - (1 - c.final_lr) * min(1.0, max(0.0, falling / max(1, c.decay)))

    def _update(self, step: int, batch: Batch, segment: int, right: int) -> dict[str, float]:
        c = self.config
        torch.manual_seed(c.seed * 1_000_003 + step)
        self.student.train()
        period = self.student.config.encoder.frontend.positions
        start = torch.randint(0, max(1, period), (len(batch.x_BTF),))
        with torch.autocast("cpu", torch.bfloat16, enabled=c.bf16):
            encoded, frames = self.student(batch.x_BTF, batch.lengths_B, segment, right, start)
        with_rnnt = step >= c.rnnt_from and self.student.config.joiner_dim > 0
        with torch.autocast("cpu", torch.bfloat16, enabled=c.bf16):
            losses = self.student.losses(
                encoded.float(),
                frames,
                batch.targets_BU,
                batch.targets_B,
                rnnt=with_rnnt,
                drop_above=c.drop_above if step >= c.warmup else math.inf,
            )
        weight = c.ctc_weight if with_rnnt else 1.0
        loss = (weight * losses.ctc + (1 - weight) * losses.rnnt) / losses.tokens
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"step {step}: the loss is {loss.item()}; lower the learning rate, or look at "
                f"utterances {[str(self.train.utterances[i].audio) for i in batch.indices[:3]]}"
            )
        rate = self._rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), c.clip)
        self.optimizer.step()
        # A short memory at first, or the average would drag the initial weights along.
        decay = min(c.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), list(self.student.parameters()), 1 - decay
            )
        return {
            "ctc": losses.ctc.item() / losses.tokens,
            "rnnt": losses.rnnt.item() / losses.tokens,
            "norm": float(norm),
        }

    def fit(self) -> None:
        """Train until ``config.steps``; checkpoints, log and progress bar on the way."""
        c = self.config
        self.run.mkdir(parents=True, exist_ok=True)
        cpu = time.process_time()
        smooth: dict[str, float] = {}
        bar = tqdm(total=c.steps, initial=self.progress.step, unit="step", smoothing=0.05)
        batches = prefetch(self._batches())
        for step, batch, segment, right in batches:
            if step >= c.steps:
                break
            values = self._update(step, batch, segment, right)
            for name, value in values.items():
                smooth[name] = 0.98 * smooth.get(name, value) + 0.02 * value
            now = time.process_time()
            p = self.progress
            p.step = step + 1
            p.core_hours += (now - cpu) / 3600
            p.audio_hours += (
                float(batch.lengths_B.sum()) * self.spec.hop / (self.spec.sample_rate * 3600)
            )
            cpu = now
            bar.update()
            shown = {n: f"{v:.3f}" for n, v in smooth.items()}
            bar.set_postfix(**shown, audio=f"{p.audio_hours:.1f}h")
            if p.step % c.eval_every == 0 or p.step == c.steps:
                self._evaluate(smooth)
            if p.step % c.save_every == 0 or p.step == c.steps:
                self._save("last", resumable=True)
        batches.close()
        bar.close()

    def _evaluate(self, smooth: dict[str, float]) -> None:
        own = {n: p.detach().clone() for n, p in self.student.named_parameters()}
        self.student.load_state_dict(self.average)
        scores = evaluate_ctc(self.student, self.tokenizer, self.dev)
        self.student.load_state_dict(own)
        total = sum(scores.values(), Score())
        row: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            **dataclasses.asdict(self.progress),
            **{n: round(v, 4) for n, v in smooth.items()},
            "wer": round(total.wer, 4),
            **{f"wer.{source}": round(s.wer, 4) for source, s in sorted(scores.items())},
        }
        row.pop("best_wer")
        path = self.run / "log.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        tqdm.write(" ".join(f"{n}={v}" for n, v in row.items()))
        if self.progress.best_wer is None or total.wer < self.progress.best_wer:
            self.progress.best_wer = total.wer
            self._save("best", resumable=False)


def evaluate_ctc(
    student: Student, tokenizer: Tokenizer, dev: FeatureCache, segment: int = 32, right: int = 4
) -> dict[str, Score]:
    """Greedy CTC scores per source with the masked forward pass (fast; for watching a run)."""
    student.eval()
    encoder = student.config.encoder
    silence = torch.from_numpy(Fbank(dev.spec).pad_frame)
    frames = [dev.frames(i) for i in range(len(dev))]
    scores: dict[str, Score] = {}
    for indices in epoch_batches(frames, [1.0] * len(dev), 12000, seed=0):
        batch = collate(
            [torch.from_numpy(dev[i].astype(np.float32)) for i in indices],
            [[] for _ in indices],
            indices,
            silence,
            multiple=encoder.subsampling,
            room=right + encoder.lookahead,
        )
        with torch.no_grad():
            encoded, lengths = student(batch.x_BTF, batch.lengths_B, segment, right)
            best: Tensor = student.ctc_log_probs(encoded).argmax(-1)
        for row, i in enumerate(indices):
            ids = ctc_greedy(best[row, : int(lengths[row])].tolist(), student.config.blank)
            u = dev.utterances[i]
            scores[u.source] = scores.get(u.source, Score()) + Score.of(
                u.text, tokenizer.decode(ids)
            )
    return scores
