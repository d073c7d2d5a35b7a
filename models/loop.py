"""The training loop: schedule, freezing, running average, checkpoints, log, early stop.

Everything random is a function of (seed, index of a batch) or (seed, epoch), so a run that was
killed and resumed goes through the same batches, masks and augmentations as one that was not.
Several processes, or several batches a step, go through the batches that one process with one
batch a step would go through, and their gradients are its gradients.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from loquent.models.checkpoint import CheckpointError, Tensors, read_json, read_tensors, recover
from loquent.models.data import prefetch
from loquent.models.devices import Devices, find_devices

B = TypeVar("B")
_SLOTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, kw_only=True)
class Freezing:
    """What does not learn, and until when.

    Attributes:
        encoder: up to this step nothing but the heads learns.
        front: up to this step the front end (a CNN's convolutions) does not learn; None: never.
        layers: this many of the lowest layers never learn, nor what lies below them.
        adapters_only: of the encoder only the adapters between its layers learn (MMS).
    """

    encoder: int = 0
    front: int | None = 0
    layers: int = 0
    adapters_only: bool = False

    def learns(self, name: str, step: int) -> bool:
        """Whether the parameter ``name`` (heads lie outside ``encoder.``) learns at ``step``."""
        if not name.startswith("encoder."):
            return True
        if step < self.encoder:
            return False
        if self.adapters_only:
            return "adapter_layer" in name
        if re.search(r"\.(frontend|feature_extractor)\.", name):
            return self.layers == 0 and self.front is not None and step >= self.front
        found = re.search(r"\.layers\.(\d+)\.", name)
        if found:
            return int(found[1]) >= self.layers
        return self.layers == 0 or "norm" in name


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How to train, whatever is trained.

    Attributes:
        steps: optimiser steps in all.
        batch_seconds: padded audio per batch; a step takes ``accumulate`` batches per process.
        lr, head_lr: peak learning rates of the encoder, and of everything behind it.
        warmup: steps of linear warm-up.
        decay: the learning rate stays at its peak and falls linearly to ``final_lr`` of it in so
            many last steps. A run may so be prolonged, or be ended from any checkpoint (warm-up,
            stable, decay; arXiv 2405.18392).
        clip: largest norm of the gradient.
        freezing: what does not learn.
        ema: decay of the running average of the weights, which is what gets evaluated.
        save_every, eval_every: steps.
        patience: stop after this many evaluations in a row without a new best; 0: never.
        core_hours: stop after so much processor time, evaluations on the way included; 0: never.
            Runs of equal cost are so compared.
        bf16: autocast.
        tensorboard: also log for TensorBoard, in ``run/tensorboard``.
    """

    steps: int
    seed: int = 1
    batch_seconds: float = 60.0
    accumulate: int = 1
    lr: float = 3e-4
    head_lr: float = 2e-3
    final_lr: float = 0.03
    warmup: int = 200
    decay: int = 1500
    weight_decay: float = 0.01
    clip: float = 5.0
    freezing: Freezing = field(default_factory=Freezing)
    ema: float = 0.999
    save_every: int = 200
    eval_every: int = 500
    patience: int = 0
    core_hours: float = 0.0
    bf16: bool = True
    tensorboard: bool = False


@dataclass
class Progress:
    """Counters that survive a kill."""

    step: int = 0
    audio_hours: float = 0.0
    core_hours: float = 0.0
    best_wer: float | None = None  # JSON has no infinity
    stale: int = 0  # evaluations since the best one


class Loop(ABC, Generic[B]):
    """One run in one folder; ``run/last`` is resumed from when it exists.

    Args:
        run: folder of the run.
        module: what learns. Its ``forward(batch, step)`` returns sums over the batch: ``loss``
            (to be minimised), ``count`` (what the loss is divided by), and what else to log.
        config: how to train.
        devices: where; found by itself unless given.
    """

    metric = "wer"  # name in the log of what _score gives

    def __init__(
        self, run: Path, module: nn.Module, config: LoopConfig, devices: Devices | None = None
    ) -> None:
        self.run, self.module, self.config = run, module, config
        self.devices = find_devices(bf16=config.bf16) if devices is None else devices
        self.progress = Progress()
        self.parameters: dict[str, nn.Parameter] = {
            self._name(name): p for name, p in module.named_parameters()
        }
        body = [p for name, p in self.parameters.items() if name.startswith("encoder.")]
        heads = [p for name, p in self.parameters.items() if not name.startswith("encoder.")]
        self.optimizer = torch.optim.AdamW(
            [{"params": body, "peak": config.lr}, {"params": heads, "peak": config.head_lr}],
            lr=0.0,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.wrapped = self.devices.wrap(module, self.optimizer)
        self.average: Tensors = {n: p.detach().clone() for n, p in self.parameters.items()}
        recover(run / "last")
        if (run / "last").exists():
            self._resume(run / "last")

    # -- what is trained --------------------------------------------------------------------

    def _name(self, name: str) -> str:
        """Name that a parameter of the module has in checkpoints; the encoder's is ``encoder.``."""
        return name

    @abstractmethod
    def _epoch(self, epoch: int) -> Iterable[list[int]]:
        """Batches of an epoch, as indices of utterances."""

    @abstractmethod
    def _make(self, index: int, indices: list[int]) -> B:
        """The batch number ``index`` of the run."""

    @abstractmethod
    def _seconds(self, batch: B) -> float:
        """Seconds of audio in a batch."""

    @abstractmethod
    def _describe(self, batch: B) -> str:
        """The batch in an error message."""

    @abstractmethod
    def _score(self) -> tuple[float, dict[str, float]]:
        """What to get low on the dev set, and more columns for the log."""

    @abstractmethod
    def _write(self, name: str, raw: Tensors | None, optimizer: Tensors | None) -> None:
        """Save a checkpoint of the average, which can be resumed from with the other two."""

    def _check(self, folder: Path) -> None:
        """Raise CheckpointError if the checkpoint belongs to something else."""

    # -- state ------------------------------------------------------------------------------

    def _save(self, name: str, *, resumable: bool) -> None:
        if self.devices.rank:
            return
        slots: Tensors = {}
        if resumable:
            for parameter_name, p in self.parameters.items():
                if p in self.optimizer.state:
                    own = self.optimizer.state[p]
                    slots |= {f"{parameter_name}.{slot}": own[slot] for slot in _SLOTS}
        self._write(
            name, dict(self.parameters) if resumable else None, slots if resumable else None
        )

    def _resume(self, folder: Path) -> None:
        self._check(folder)
        self.progress = Progress(**read_json(folder / "state.json")["progress"])
        device = self.devices.device
        average = read_tensors(folder / "model.safetensors")
        raw = read_tensors(folder / "raw.safetensors")
        slots = read_tensors(folder / "optimizer.safetensors")
        for name, p in self.parameters.items():
            with torch.no_grad():
                p.copy_(raw[name])
            # What helps to train alone (a projection for distillation) is in no model.
            self.average[name].copy_(average.get(name, raw[name]))
            if f"{name}.step" in slots:
                own = {slot: slots[f"{name}.{slot}"] for slot in _SLOTS}
                self.optimizer.state[p] = {s: t.to(device) for s, t in own.items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the module has the averaged weights."""
        own = {name: p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.data = self.average[name]
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]

    # -- the loop ---------------------------------------------------------------------------

    def _parts(self) -> Iterator[tuple[int, list[tuple[int, B]]]]:
        """(step, this process's numbered batches) from the current step on, for ever."""
        world = self.devices.world
        share = world * self.config.accumulate
        index, epoch = 0, 0
        parts: list[tuple[int, B]] = []
        while True:
            for indices in self._epoch(epoch):
                step, place = divmod(index, share)
                if step >= self.progress.step:
                    if place % world == self.devices.rank:
                        parts.append((index, self._make(index, indices)))
                    if place == share - 1:
                        yield step, parts
                        parts = []
                index += 1
            epoch += 1

    def _rate(self, step: int) -> float:
        c = self.config
        if step < c.warmup:
            return (step + 1) / c.warmup
        falling = step - max(c.warmup, c.steps - c.decay)
        return 1 - (1 - c.final_lr) * min(1.0, max(0.0, falling / max(1, c.decay)))

    def gradients(self, step: int, parts: list[tuple[int, B]]) -> dict[str, float]:
        """Set the gradients of a step; returns what to log, per unit of ``count``."""
        c = self.config
        for name, p in self.parameters.items():
            p.requires_grad_(c.freezing.learns(name, step))
        self.optimizer.zero_grad()
        self.module.train()
        sums: dict[str, Tensor] = {}
        for number, (index, batch) in enumerate(parts):
            torch.manual_seed(c.seed * 1_000_003 + index)
            np.random.seed((c.seed * 1_000_003 + index) % 2**32)  # transformers masks with it
            with self.devices.accumulating(self.wrapped, number + 1 < len(parts)):
                with self.devices.autocast():
                    values: dict[str, Tensor] = self.wrapped(batch, step)
                loss = values.pop("loss")
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"step {step}: the loss is {loss.item()}; lower the learning rate, or "
                        f"look at {self._describe(batch)}"
                    )
                self.devices.backward(loss)
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach().float()
        sums = {name: self.devices.total(value) for name, value in sums.items()}
        # Processes were averaged, and losses are sums: this makes it a mean over the whole step.
        count = sums.pop("count").clamp(min=1)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        torch._foreach_mul_(gradients, float(self.devices.world / count))
        return {name: float(value / count) for name, value in sums.items()}

    def _update(self, step: int, parts: list[tuple[int, B]]) -> dict[str, float]:
        c = self.config
        shown = self.gradients(step, parts)
        rate = self._rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), c.clip)
        self.optimizer.step()
        # A short memory at first, or the average would drag the initial weights along.
        decay = min(c.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), list(self.parameters.values()), 1 - decay
            )
        return {**shown, "norm": float(norm)}

    def fit(self) -> None:
        """Train until ``config.steps``; checkpoints, log and progress bar on the way.

        Raises:
            CheckpointError: another process trains in this folder; the two would mix their files.
        """
        self.run.mkdir(parents=True, exist_ok=True)
        if self.devices.rank:
            self._fit()
            return
        try:
            # The system lets go of it however the process ends.
            with FileLock(self.run / "lock", timeout=0):
                self._fit()
        except Timeout as error:
            raise CheckpointError(
                f"{self.run}: another process trains in this folder; stop it, or choose another "
                "folder for the run"
            ) from error

    def _fit(self) -> None:
        c, p = self.config, self.progress
        cpu, wall = time.process_time(), time.monotonic()
        smooth: dict[str, float] = {}
        speed = 0.0
        bar = tqdm(
            total=c.steps,
            initial=p.step,
            unit="step",
            smoothing=0.05,
            disable=self.devices.rank > 0,
        )
        batches = prefetch(self._parts())
        for step, parts in batches:
            if self._ended():
                break
            for name, value in self._update(step, parts).items():
                smooth[name] = 0.98 * smooth.get(name, value) + 0.02 * value
            seconds = sum(self._seconds(batch) for _, batch in parts)
            now, cpu_now = time.monotonic(), time.process_time()
            used = torch.tensor([seconds, cpu_now - cpu], device=self.devices.device)
            seconds, cores = self.devices.total(used).tolist()  # alike in all processes
            p.step = step + 1
            p.core_hours += cores / 3600
            p.audio_hours += seconds / 3600
            speed += (seconds / max(now - wall, 1e-9) - speed) * (0.05 if speed else 1.0)
            cpu, wall = cpu_now, now
            bar.update()
            shown = {n: f"{v:.3f}" for n, v in smooth.items()}
            if speed:  # there is none where the batches are text
                shown |= {"audio": f"{p.audio_hours:.1f}h", "speed": f"{speed:.0f}h/h"}
            bar.set_postfix(shown)
            ended = self._ended()
            if p.step % c.eval_every == 0 or ended:
                self._evaluate(smooth)
            if p.step % c.save_every == 0 or ended:
                self._save("last", resumable=True)
        batches.close()
        bar.close()

    def _ended(self) -> bool:
        c, p = self.config, self.progress
        return p.step >= c.steps or 0 < c.core_hours <= p.core_hours or 0 < c.patience <= p.stale

    def _evaluate(self, smooth: dict[str, float]) -> None:
        p = self.progress
        scored = math.nan
        columns: dict[str, float] = {}
        if self.devices.rank == 0:
            with self.averaged():
                scored, columns = self._score()
        wer = self.devices.first(scored)
        p.stale += 1
        if p.best_wer is None or wer < p.best_wer:
            p.best_wer, p.stale = wer, 0
            self._save("best", resumable=False)
        if self.devices.rank:
            return
        counters = dataclasses.asdict(p)
        row: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            **{n: counters[n] for n in ("step", "audio_hours", "core_hours")},
            **{n: round(v, 4) for n, v in (smooth | {self.metric: wer} | columns).items()},
        }
        tqdm.write(" ".join(f"{n}={v}" for n, v in row.items()))
        path = self.run / "log.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(str(self.run / "tensorboard")) as board:
                for name, value in row.items():
                    if name != "time":
                        board.add_scalar(name, value, p.step)
