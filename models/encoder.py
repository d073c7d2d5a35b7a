"""The streaming encoder: front end, Emformer, and what stands behind it.

``forward`` (masked, whole utterances) and ``step`` (one window, carried state) compute the same
function. All lengths of the public methods are in FEATURE frames, as in the bundle's manifest.

Shape suffixes: B streams, T feature frames, F features, N output frames, E output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from loquent.models.emformer import Emformer, EmformerConfig, State, write_ring
from loquent.models.frontend import FrontendConfig, make_frontend


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of the encoder.

    Attributes:
        frontend, emformer: of the parts; their ``dim`` must agree.
        pool: this many frames of the front end are averaged into one (Whisper: 2, for 25 output
            frames a second).
        pool_first: average in front of the layers instead of behind them. They then have ``pool``
            times fewer frames to work on, and their lengths are in pooled frames.
        final_norm: layer norm behind the last layer (Whisper's ``ln_post``).
        output_dim: width of a last linear layer with layer norm (torchaudio's), 0: none.
    """

    frontend: FrontendConfig
    emformer: EmformerConfig
    pool: int = 1
    pool_first: bool = False
    final_norm: bool = False
    output_dim: int = 0

    def __post_init__(self) -> None:
        if self.frontend.dim != self.emformer.dim:
            raise ValueError(
                f"front end gives width {self.frontend.dim}, layers take {self.emformer.dim}"
            )

    @property
    def subsampling(self) -> int:
        """Feature frames per output frame."""
        return self.frontend.subsampling * self.pool

    @property
    def layer_subsampling(self) -> int:
        """Feature frames per frame of the layers."""
        return self.subsampling if self.pool_first else self.frontend.subsampling

    @property
    def lookahead(self) -> int:
        """Feature frames needed behind segment and right context."""
        return self.frontend.lookahead

    @property
    def width(self) -> int:
        """Width of an output frame, E."""
        return self.output_dim or self.emformer.dim


class Encoder(nn.Module):
    """Features in, output frames out."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.frontend = make_frontend(config.frontend)
        self.emformer = Emformer(config.emformer)
        dim = config.emformer.dim
        self.final_norm = nn.LayerNorm(dim) if config.final_norm else nn.Identity()
        self.output = (
            nn.Sequential(nn.Linear(dim, config.output_dim), nn.LayerNorm(config.output_dim))
            if config.output_dim
            else nn.Identity()
        )

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape without the batch axis. ``processed_frames`` is int64, the rest float32."""
        front = {f"frontend.{n}": s for n, s in self.frontend.state_shapes().items()}
        return front | self.emformer.state_shapes() | {"processed_frames": ()}

    def initial_state(self, batch: int) -> State:
        """The state of ``batch`` new streams: zeros."""
        reference = next(self.parameters())
        return {
            name: torch.zeros(
                (batch, *shape),
                device=reference.device,
                dtype=torch.int64 if name == "processed_frames" else reference.dtype,
            )
            for name, shape in self.state_shapes().items()
        }

    def _check(self, name: str, value: int, least: int) -> None:
        if value < least or value % self.config.subsampling:
            raise ValueError(
                f"got {name} of {value} feature frames, expected a multiple of "
                f"{self.config.subsampling}, at least {least}"
            )

    def _pool(self, x_BTD: Tensor) -> Tensor:
        if self.config.pool == 1:
            return x_BTD
        groups: Tensor = x_BTD.unflatten(1, (-1, self.config.pool))  # type: ignore[no-untyped-call]
        return groups.mean(2)

    def _head(self, x_BTD: Tensor) -> Tensor:
        """What the layers get of the front end's frames."""
        return self._pool(x_BTD) if self.config.pool_first else x_BTD

    def _tail(self, x_BTD: Tensor) -> Tensor:
        x = self.final_norm(x_BTD)
        result: Tensor = self.output(x if self.config.pool_first else self._pool(x))
        return result

    def forward(
        self,
        x_BTF: Tensor,
        lengths_B: Tensor,
        segment: int,
        right_context: int,
        start_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Masked pass over whole utterances.

        Args:
            x_BTF: (B, T + right_context + lookahead, F); T a multiple of the subsampling. What
                stands behind an utterance (silence features in practice) serves as its context.
            lengths_B: valid feature frames of each utterance, at most T.
            segment: S in feature frames.
            right_context: R in feature frames.
            start_B: (B,) encoder frames that the positions start from (drawn at random in
                training, so that a stream may go on for ever); zeros by default.

        Returns:
            (B, T // subsampling, E) and the valid output frames of each utterance, rounded up.
        """
        c = self.config
        self._check("segment", segment, c.subsampling)
        self._check("right_context", right_context, 0)
        whole = x_BTF.shape[1] - right_context - c.lookahead
        self._check("utterance", whole, c.subsampling)
        segment = min(segment, whole)
        factor = c.layer_subsampling
        batch = len(x_BTF)
        zeros = {n: x_BTF.new_zeros((batch, *s)) for n, s in self.frontend.state_shapes().items()}
        if start_B is None:
            start_B = torch.zeros(batch, dtype=torch.int64, device=x_BTF.device)
        frames, _ = self.frontend.step(x_BTF, zeros, start_B, segment)
        lengths = torch.div(lengths_B + factor - 1, factor, rounding_mode="floor")
        x = self._head(frames)
        out = self.emformer(x, lengths, segment // factor, right_context // factor)
        per_output = c.subsampling
        return self._tail(out), torch.div(
            lengths_B + per_output - 1, per_output, rounding_mode="floor"
        )

    def step(self, window_BTF: Tensor, right_context: Tensor, state: State) -> tuple[Tensor, State]:
        """One window of a batch of streams, each of any age.

        Args:
            window_BTF: (B, S + R + lookahead, F).
            right_context: () int64, R in feature frames.
            state: as :meth:`initial_state`.

        Returns:
            (B, S // subsampling, E) and the next state. The right context's frames do not come out,
            as they will be computed again.
        """
        out, following = self.window(window_BTF, right_context, state)
        processed, after = state["processed_frames"], following["processed_frames"]
        count = int((after - processed)[0]) // self.ring_every
        age = processed // self.ring_every
        for name in self.rings:
            following[name] = write_ring(state[name], following[name][:, :, :count], age)
        return out, following

    @property
    def rings(self) -> frozenset[str]:
        """States of which :meth:`window` gives the new frames only; see ``emformer.py``."""
        return self.emformer.rings

    @property
    def ring_every(self) -> int:
        """How many of the frames that ``processed_frames`` counts make a frame of the rings."""
        return self.config.pool if self.config.pool_first else 1

    def window(
        self,
        window_BTF: Tensor,
        right_context: Tensor,
        state: State,
        rows_B: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """As :meth:`step`, but rings are read where they lie and not written.

        Args:
            rows_B: (B,) int64, each stream's row of the rings.

        Returns:
            The output, and the next state, of whose rings (B, H, (S + R) // layer_subsampling, d)
            are the frames of the window, those of the right context too.
        """
        c = self.config
        processed = state["processed_frames"]
        right = torch.div(right_context, c.layer_subsampling, rounding_mode="floor")
        age = torch.div(processed, c.pool, rounding_mode="floor") if c.pool_first else processed
        segment = window_BTF.shape[1] - c.lookahead - right_context
        front = {n: state[f"frontend.{n}"] for n in self.frontend.state_shapes()}
        frames, front = self.frontend.step(window_BTF, front, processed, segment)
        layers = {n: t for n, t in state.items() if n.startswith("layer")}
        # What stands behind the segment is computed again with its own one.
        # (Not ``int``, which the exporter takes for a constant.)
        count = cast(int, torch.div(segment, c.subsampling, rounding_mode="floor").item())
        torch._check(count > 0)  # type: ignore[no-untyped-call]  # it allows for none otherwise
        wanted = count * (c.subsampling // c.layer_subsampling)
        out, following = self.emformer.window(
            self._head(frames), layers, age, right, rows_B, wanted
        )
        following |= {f"frontend.{n}": t for n, t in front.items()}
        following["processed_frames"] = processed + torch.div(
            segment, c.frontend.subsampling, rounding_mode="floor"
        )
        return self._tail(out), {name: following[name] for name in self.state_shapes()}
