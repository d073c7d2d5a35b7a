"""Where a run computes: this CPU, or whatever Lightning Fabric finds under ``torchrun``.

One process on a CPU needs none of Fabric, whose import alone costs seconds, so it has none of it.
With an accelerator, or with several processes (``torchrun --nproc-per-node 8 --nnodes 4 -m --
loquent.clients.cli train ...``, where ``--`` keeps torchrun from taking ``--run`` for its own),
Fabric places the module, casts, and averages the gradients.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Devices(Protocol):
    """What the loop asks of the place where it runs.

    Attributes:
        world, rank: number of processes, and which one this is.
        device: of this process.
    """

    world: int
    rank: int
    device: torch.device

    def wrap(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Move both to the device; the module returned averages gradients over the processes."""

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 where that was asked for, and where it is no slower than float32."""

    def accumulating(self, module: nn.Module, more: bool) -> AbstractContextManager[object]:
        """Inside, a backward pass leaves the gradients alone if ``more`` are to come."""

    def backward(self, loss: Tensor) -> None:
        """The backward pass."""

    def total(self, value: Tensor) -> Tensor:
        """Sum over the processes."""

    def first(self, value: float) -> float:
        """The value of process 0, for every process."""


class OneCpu:
    """One process on the CPU."""

    world, rank = 1, 0
    device = torch.device("cpu")

    def __init__(self, *, bf16: bool) -> None:
        self._bf16 = bf16 and cpu_has_bf16()

    def wrap(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        return module

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._bf16)

    def accumulating(self, module: nn.Module, more: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def total(self, value: Tensor) -> Tensor:
        return value

    def first(self, value: float) -> float:
        return value


class FabricDevices:
    """Lightning Fabric: GPUs, several processes, several machines."""

    def __init__(self, *, bf16: bool) -> None:
        from lightning.fabric import Fabric
        from lightning.fabric.strategies.ddp import DDPStrategy

        cuda = torch.cuda.is_available()
        world = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        strategy: Any = "auto"
        if world > 1:
            # Heads join and layers thaw on the way, so not every parameter has a gradient.
            strategy = DDPStrategy(
                find_unused_parameters=True, process_group_backend="nccl" if cuda else "gloo"
            )
        self._fabric = Fabric(
            accelerator="cuda" if cuda else "cpu",
            devices=local,
            num_nodes=world // local,
            strategy=strategy,
            precision="bf16-mixed" if bf16 and (cuda or cpu_has_bf16()) else "32-true",
        )
        self._fabric.launch()
        self.world, self.rank = self._fabric.world_size, self._fabric.global_rank
        self.device = self._fabric.device

    def wrap(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        return cast(nn.Module, self._fabric.setup(module, optimizer)[0])

    def autocast(self) -> AbstractContextManager[object]:
        return self._fabric.autocast()

    def accumulating(self, module: nn.Module, more: bool) -> AbstractContextManager[object]:
        return self._fabric.no_backward_sync(cast(Any, module), enabled=more)

    def backward(self, loss: Tensor) -> None:
        self._fabric.backward(loss)

    def total(self, value: Tensor) -> Tensor:
        return cast(Tensor, self._fabric.all_reduce(value, reduce_op="sum"))

    def first(self, value: float) -> float:
        return float(self._fabric.broadcast(value))


def cpu_has_bf16() -> bool:
    """Whether bf16 pays on this CPU, which takes instructions for it. With AVX-512 alone a step of
    training took 2.3 times as long as in float32 (a Xeon at 2.8 GHz, one thread); with AVX2 a
    product took 60 to 130 times as long (1500 x 512 by 512 x 512 and 2048, AMD EPYC)."""
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def find_devices(*, bf16: bool) -> Devices:
    """An accelerator or a group of processes if there is one, else this CPU."""
    if torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return FabricDevices(bf16=bf16)
    return OneCpu(bf16=bf16)


def moved(batch: T, device: torch.device) -> T:
    """A dataclass with its tensors on ``device``."""
    if device.type == "cpu":
        return batch
    tensors = {
        field.name: value.to(device, non_blocking=True)
        for field in dataclasses.fields(cast(Any, batch))
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return cast(T, dataclasses.replace(cast(Any, batch), **tensors))
