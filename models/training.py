"""Training of the student: random segment and right context, CTC and transducer loss."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from loquent.engine.features import Fbank, FeatureSpec
from loquent.models.checkpoint import CheckpointError, Tensors, read_json, save_checkpoint
from loquent.models.data import (
    Augment,
    Batch,
    FeatureCache,
    FeatureSource,
    augment,
    collate,
    epoch_batches,
    pause,
)
from loquent.models.devices import moved
from loquent.models.distillation import (
    Distillation,
    Said,
    Signals,
    collate_signals,
    delayed_ctc,
    feature_distance,
    full_sum,
    lattice,
    same_frames,
    three_way,
)
from loquent.models.loop import Loop, LoopConfig
from loquent.models.posteriors import Posteriors
from loquent.models.scoring import Score, ctc_greedy
from loquent.models.student import Losses, Student
from loquent.models.tokens import Tokenizer

WHOLE = 1 << 20  # a segment that no utterance outgrows: full context


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """How to train the student, see also :class:`LoopConfig`. Lengths are in feature frames.

    Attributes:
        rnnt_from: step at which the transducer loss joins the CTC loss.
        ctc_weight: of the CTC loss once both run (the transducer has the rest).
        segments: (segment, probability) pairs drawn per batch.
        longest_until: up to this step only segments of ``longest_segment`` and more are drawn. A
            pretrained encoder has heard all context, and copies of right context cost time.
        long_until: up to this step only segments of ``long_segment`` and more are drawn: short ones
            cost up to three times the time, and what they need is learnt late.
        right_contexts: (right context, probability) pairs drawn per batch. Every segment has a copy
            of its right context, so no more than ``short_right`` or the segment's length is taken.
        short_right: see above.
        watch: segment and right context at which the dev set is scored on the way.
        join: part of the batches in which every two utterances are put together to one, since
            captions go on for longer than the utterances that recordings are cut into.
        drop_above: an utterance whose CTC loss a token is above this many nats is left out: its
            label is wrong more often than it is hard.
        delay_penalty: makes the transducer speak earlier, see :func:`transducer_loss`.
        distil: what to learn from a teacher.
    """

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
    longest_until: int = 0
    longest_segment: int = 128
    long_until: int = 0
    long_segment: int = 32
    right_contexts: tuple[tuple[int, float], ...] = (
        (0, 0.1),
        (4, 0.15),
        (8, 0.2),
        (16, 0.25),
        (24, 0.3),
    )
    short_right: int = 8
    watch: tuple[int, int] = (32, 24)
    join: float = 0.25
    drop_above: float = 5.0
    delay_penalty: float = 0.0
    distil: Distillation = field(default_factory=Distillation)
    augment: Augment = field(default_factory=Augment)


def _draw(options: tuple[tuple[int, float], ...], rng: np.random.Generator) -> int:
    values, weights = zip(*options, strict=True)
    p = np.asarray(weights, np.float64)
    return int(rng.choice(values, p=p / p.sum()))


class Drawn:
    """A batch with the segment and right context drawn for it, and what a teacher says of it."""

    def __init__(
        self, batch: Batch, segment: int, right: int, signals: Signals | None = None
    ) -> None:
        self.batch, self.segment, self.right, self.signals = batch, segment, right, signals


class Objective(nn.Module):
    """What the student minimises.

    Args:
        student: to be trained.
        config: weights of the terms.
        teacher_width: of the teacher's encoder output, if features are distilled.
        beside: another student, for the terms ``beside`` and ``lattice``; it does not learn.
    """

    def __init__(
        self,
        student: Student,
        config: TrainConfig,
        *,
        teacher_width: int = 0,
        beside: Student | None = None,
    ) -> None:
        super().__init__()
        self.student, self.config = student, config
        self.features = (
            nn.Linear(student.config.encoder.width, teacher_width) if teacher_width else None
        )
        same = teacher_width == student.config.encoder.width
        # A random map into another basis would pull the encoder anywhere: first it learns alone.
        self._features_from = 0 if same else 2 * config.warmup
        if self.features is not None and same:
            # A student that begins as its teacher's layers has no other basis to find.
            nn.init.eye_(self.features.weight)
            nn.init.zeros_(self.features.bias)
        # In a list: its parameters are not ours.
        self._beside = [] if beside is None else [beside.eval().requires_grad_(False)]

    def forward(self, drawn: Drawn, step: int) -> dict[str, Tensor]:
        """Sums over the batch in nats; ``count`` is the number of target tokens."""
        c, student = self.config, self.student
        device = next(student.parameters()).device
        batch = moved(drawn.batch, device)
        period = student.config.encoder.frontend.positions
        start = torch.randint(0, max(1, period), (len(batch.x_BTF),)).to(device)
        encoded, frames = student(batch.x_BTF, batch.lengths_B, drawn.segment, drawn.right, start)
        with_rnnt = step >= c.rnnt_from and student.config.joiner_dim > 0
        losses = student.losses(
            encoded.float(),
            frames,
            batch.targets_BU,
            batch.targets_B,
            rnnt=with_rnnt,
            drop_above=c.drop_above if step >= c.warmup else math.inf,
            delay_penalty=c.delay_penalty,
        )
        weight = c.ctc_weight if with_rnnt else 1.0
        loss = weight * losses.ctc + (1 - weight) * losses.rnnt
        learnt = self._distilled(drawn, batch, start, encoded, frames, losses, step)
        for value, share in learnt.values():
            loss = loss + share * value
        return {
            "loss": loss,
            "count": torch.tensor(float(losses.tokens), device=device),
            "ctc": losses.ctc,
            "rnnt": losses.rnnt,
            **{name: value for name, (value, _) in learnt.items()},
        }

    def _distilled(
        self,
        drawn: Drawn,
        batch: Batch,
        start: Tensor,
        encoded: Tensor,
        frames: Tensor,
        losses: Losses,
        step: int,
    ) -> dict[str, tuple[Tensor, float]]:
        """Terms with their weights."""
        d = self.config.distil
        # Processes add up what they log: all must name the same terms, heard by a teacher or not.
        zero = encoded.new_zeros((), dtype=torch.float32)
        weights = {"kd_ctc": d.ctc, "kd_text": d.full_sum, "kd_features": d.features}
        terms = {name: (zero, weight) for name, weight in weights.items() if weight}
        if drawn.signals is not None:
            signals = moved(drawn.signals, encoded.device)
            if d.ctc and losses.log_probs_BNV is not None:
                kd = delayed_ctc(losses.log_probs_BNV, signals, frames, d.delay)
                terms["kd_ctc"] = kd.sum(), d.ctc
            if d.full_sum:
                terms["kd_text"] = full_sum(-losses.ctc_B, signals.text_B).sum(), d.full_sum
            if self.features is not None and signals.features_BNE is not None:
                ours = encoded if step >= self._features_from else encoded.detach()
                own = self.features(ours).float()
                kd = feature_distance(own, signals.features_BNE, signals.real_BN, d.metric)
                terms["kd_features"] = kd, d.features
        beside = self._beside[0].to(encoded.device) if self._beside else None
        if d.beside and beside is not None and losses.log_probs_BNV is not None:
            with torch.no_grad():
                heard, _ = beside(batch.x_BTF, batch.lengths_B, drawn.segment, drawn.right, start)
                theirs = beside.ctc_log_probs(heard)
            kd = same_frames(losses.log_probs_BNV, theirs, frames)
            terms["kd_beside"] = kd.sum(), d.beside
        if d.lattice and beside is not None and losses.logits_BNUV is not None:
            blank = self.student.config.blank
            with torch.no_grad():
                heard, _ = beside(batch.x_BTF, batch.lengths_B, WHOLE, drawn.right, start)
                logits = beside.lattice(heard.float(), batch.targets_BU)
                theirs = three_way(logits, batch.targets_BU, batch.targets_B, blank)
            own = three_way(losses.logits_BNUV, batch.targets_BU, batch.targets_B, blank)
            kd = lattice(own, theirs, frames, batch.targets_B)
            terms["kd_lattice"] = kd.sum(), d.lattice
        return terms


class Trainer(Loop[Drawn]):
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
        teacher: what a teacher said about the utterances, for ``config.distil``.
        beside: another student, for the terms ``beside`` and ``lattice`` of ``config.distil``.
    """

    config: TrainConfig

    def __init__(
        self,
        run: Path,
        student: Student,
        tokenizer: Tokenizer,
        train: FeatureSource,
        dev: FeatureCache,
        weights: list[float],
        config: TrainConfig,
        origin: dict[str, Any],
        noise: FeatureCache | None = None,
        teacher: Posteriors | None = None,
        beside: Student | None = None,
    ) -> None:
        self.student, self.tokenizer = student, tokenizer
        self.train, self.dev, self.weights = train, dev, weights
        self.origin = origin
        self.noises = [noise[i] for i in range(len(noise))] if noise else []
        self.spec: FeatureSpec = train.spec
        self.silence = torch.from_numpy(Fbank(self.spec).pad_frame)
        self.targets = [tokenizer.encode(u.text) for u in train.utterances]
        self._frames = [train.frames(i) for i in range(len(train))]
        self.teacher = teacher
        width = teacher.width if teacher is not None and config.distil.features else 0
        super().__init__(
            run, Objective(student, config, teacher_width=width, beside=beside), config
        )

    def _name(self, name: str) -> str:
        return name.removeprefix("student.")

    def _write(self, name: str, raw: Tensors | None, optimizer: Tensors | None) -> None:
        own = {n for n, _ in self.student.named_parameters()}
        save_checkpoint(
            self.run / name,
            self.student.config,
            self.tokenizer,
            {n: t for n, t in self.average.items() if n in own},
            {
                "progress": dataclasses.asdict(self.progress),
                "training": dataclasses.asdict(self.config),
                "features": self.spec.to_dict(),
                "origin": self.origin,
            },
            raw=raw,
            optimizer=optimizer,
        )

    def _check(self, folder: Path) -> None:
        own = json.loads(json.dumps(self.student.config.to_dict()))
        if read_json(folder / "config.json") != own:
            raise CheckpointError(
                f"{folder}: the run that it belongs to trains a student of another shape; resume "
                "it with the settings it was started with, or choose another folder for the run"
            )
        before = read_json(folder / "state.json").get("origin", {}).get("data")
        if before != self.origin.get("data"):
            tqdm.write(
                f"{self.run}: goes on with other data than before, which were {before}",
                file=sys.stderr,
            )

    def _epoch(self, epoch: int) -> Iterable[list[int]]:
        c = self.config
        per_batch = round(c.batch_seconds * self.spec.sample_rate / self.spec.hop)
        return epoch_batches(self._frames, self.weights, per_batch, seed=c.seed * 1000 + epoch)

    def _make(self, index: int, indices: list[int]) -> Drawn:
        rng = np.random.default_rng((self.config.seed, index))
        c = self.config
        step = index // (self.devices.world * c.accumulate)
        least = c.long_segment if step < c.long_until else 0
        if step < c.longest_until:
            least = c.longest_segment
        segment = _draw(tuple(pair for pair in c.segments if pair[0] >= least), rng)
        right = min(_draw(c.right_contexts, rng), max(c.short_right, segment))
        features: list[Tensor] = []
        said: list[list[tuple[Said | None, int, int]]] = []
        for i in indices:
            own = torch.from_numpy(self.train.features(i, rng))
            lead = pause(own, self.spec, c.augment, rng)
            x = torch.cat([lead, own])
            features.append(augment(x, self.spec, c.augment, rng, self.noises))
            # Changes of speed hold for the pause, too, of which the teacher has heard nothing.
            before = round(len(lead) * len(features[-1]) / len(x))
            heard = self.teacher.get(self.train.utterances[i]) if self.teacher else None
            said.append([(heard, before, len(features[-1]) - before)])
        targets = [self.targets[i] for i in indices]
        if rng.random() < c.join:
            # Neighbours have about the same length, so little is padded.
            pairs = range(0, len(indices), 2)
            said = [[part for row in said[k : k + 2] for part in row] for k in pairs]
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
        count = (batch.x_BTF.shape[1] - right - encoder.lookahead) // encoder.subsampling
        signals = collate_signals(said, count, encoder.subsampling) if self.teacher else None
        return Drawn(batch, segment, right, signals)

    def _seconds(self, batch: Drawn) -> float:
        return float(batch.batch.lengths_B.sum()) * self.spec.hop / self.spec.sample_rate

    def _describe(self, batch: Drawn) -> str:
        names = [str(self.train.utterances[i].audio) for i in batch.batch.indices[:3]]
        return f"utterances {names}"

    def _score(self) -> tuple[float, dict[str, float]]:
        segment, right = self.config.watch
        scores = evaluate_ctc(self.student, self.tokenizer, self.dev, segment, right)
        total = sum(scores.values(), Score())
        return total.wer, {f"wer.{source}": s.wer for source, s in sorted(scores.items())}


def evaluate_ctc(
    student: Student, tokenizer: Tokenizer, dev: FeatureCache, segment: int = 32, right: int = 4
) -> dict[str, Score]:
    """Greedy CTC scores per source with the masked forward pass (fast; for watching a run)."""
    scores: dict[str, Score] = {}
    each = score_each(student, tokenizer, dev, segment, right)
    for u, score in zip(dev.utterances, each, strict=True):
        scores[u.source] = scores.get(u.source, Score()) + score
    return scores


def score_each(
    student: Student, tokenizer: Tokenizer, dev: FeatureCache, segment: int, right: int
) -> list[Score]:
    """Like :func:`evaluate_ctc`, for every utterance."""
    student.eval()
    device = next(student.parameters()).device
    encoder = student.config.encoder
    silence = torch.from_numpy(Fbank(dev.spec).pad_frame)
    frames = [dev.frames(i) for i in range(len(dev))]
    scores = [Score()] * len(dev)
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
            x, lengths = batch.x_BTF.to(device), batch.lengths_B.to(device)
            encoded, lengths = student(x, lengths, segment, right)
            best: Tensor = student.ctc_log_probs(encoded).argmax(-1)
        for row, i in enumerate(indices):
            ids = ctc_greedy(best[row, : int(lengths[row])].tolist(), student.config.blank)
            scores[i] = Score.of(dev.utterances[i].text, tokenizer.decode(ids))
    return scores
