"""Front ends: from feature frames to encoder frames, with the state streaming needs.

Shape suffixes: B streams, T feature frames, F features, D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class FrontendConfig:
    """Which front end.

    Attributes:
        kind: ``stack`` (linear, then frames stacked: torchaudio's time reduction) or ``conv``
            (two convolutions of kernel 3 with GELU).
        features: features per frame.
        dim: width of the encoder.
        strides: of the two convolutions; (1, 2) is Whisper's, (2, 2) subsamples by 4. For
            ``stack`` the product counts.
        positions: period of the sinusoidal positions added to the frames (Whisper: 1500), 0: none.
    """

    kind: Literal["stack", "conv"]
    features: int
    dim: int
    strides: tuple[int, int] = (2, 2)
    positions: int = 0

    @property
    def subsampling(self) -> int:
        """Feature frames per encoder frame."""
        return self.strides[0] * self.strides[1]

    @property
    def lookahead(self) -> int:
        """Feature frames behind the window that its last encoder frame needs."""
        if self.kind == "stack":
            return 0
        # A convolution of stride 2 ends inside its own pair; one of stride 1 needs a frame more.
        first, second = self.strides
        return (1 if first == 1 else 0) + (first if second == 1 else 0)


class StackFrontend(nn.Module):
    """Linear without bias, then ``subsampling`` frames side by side (torchaudio's)."""

    def __init__(self, config: FrontendConfig) -> None:
        super().__init__()
        self.config = config
        if config.dim % config.subsampling:
            raise ValueError(f"dim {config.dim} is not a multiple of {config.subsampling}")
        self.linear = nn.Linear(config.features, config.dim // config.subsampling, bias=False)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """No state."""
        return {}

    def step(
        self, x_BTF: Tensor, state: State, processed_B: Tensor, segment: Tensor | int
    ) -> tuple[Tensor, State]:
        """(B, T, F) -> (B, T // subsampling, D)."""
        stride = self.config.subsampling
        x = self.linear(x_BTF)
        usable = x.shape[1] // stride * stride
        return x[:, :usable].reshape(x.shape[0], -1, self.config.dim), {}


class ConvFrontend(nn.Module):
    """Two convolutions, each with one cached frame on the left (zeros at the start).

    The zero state is the zero padding that the batch convolution has, so a stream equals a batch.
    Source: ``whisper/model.py`` ``AudioEncoder`` (arXiv 2212.04356) for strides (1, 2).
    """

    inverse_timescales: Tensor

    def __init__(self, config: FrontendConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.features, config.dim, 3, stride=config.strides[0])
        self.conv2 = nn.Conv1d(config.dim, config.dim, 3, stride=config.strides[1])
        half = config.dim // 2
        step = math.log(10000.0) / (half - 1)
        self.register_buffer(
            "inverse_timescales", torch.exp(-step * torch.arange(half)), persistent=False
        )

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The last input frame of each convolution."""
        return {"conv1": (1, self.config.features), "conv2": (1, self.config.dim)}

    def step(
        self, x_BTF: Tensor, state: State, processed_B: Tensor, segment: Tensor | int
    ) -> tuple[Tensor, State]:
        """One window.

        Args:
            x_BTF: (B, segment + right context + lookahead, F).
            state: as :meth:`state_shapes`.
            processed_B: (B,) int64, encoder frames before this window (for the positions).
            segment: S in feature frames; the state is taken at its end.

        Returns:
            (B, (T - lookahead) // subsampling, D) and the next state.
        """
        first = torch.cat([state["conv1"], x_BTF], dim=1)
        hidden = F.gelu(self.conv1(first.transpose(1, 2))).transpose(1, 2)
        second = torch.cat([state["conv2"], hidden.to(state["conv2"].dtype)], dim=1)
        out = F.gelu(self.conv2(second.transpose(1, 2))).transpose(1, 2)
        if self.config.positions:
            index = torch.arange(out.shape[1], device=out.device) + processed_B[:, None]
            index = torch.remainder(index, self.config.positions)
            angle = index[..., None].to(torch.float32) * self.inverse_timescales
            out = out + torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)
        # Input `segment - 1` is row `segment` behind the cached row.
        at = torch.as_tensor(segment, device=out.device).reshape(1)
        following = {
            "conv1": first.index_select(1, at),
            "conv2": second.index_select(1, at // self.config.strides[0]),
        }
        return out, following


def make_frontend(config: FrontendConfig) -> StackFrontend | ConvFrontend:
    """The module that ``config`` names."""
    return StackFrontend(config) if config.kind == "stack" else ConvFrontend(config)
