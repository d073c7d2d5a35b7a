"""Emformer layers written for export: fixed-size caches, the age of a stream masked in the graph.

One layer is a pre-norm Transformer layer whose attention sees a segment, its right context, a
cached left context and, optionally, a memory bank with the mean of earlier segments. Two paths
compute the same function:

* :meth:`Emformer.forward` for training: the whole utterance under one mask, with a hard copy of
  the right context behind every segment (so that no frame ever sees past it);
* :meth:`Emformer.step` for streaming: one window of segment + right context, and a state. The
  right context is recomputed at every step and never cached. :meth:`Emformer.window` is what of it
  goes into the exported graph: it reads the caches but does not write them.

The left context is a ring: frame n of a stream lies in slot n mod L, as attention does not mind the
order of its keys. A step then changes the S slots of its own frames and copies none of the others,
and a graph that reads the caches where they lie gives out those S frames only.

Sources: Emformer, arXiv 2010.10759; ``torchaudio/models/emformer.py``, whose weights load here
with the same output. Different from it on purpose: the left context is a fixed-size cache whose
valid part follows from ``processed_frames`` of each stream, so that a batch may mix streams of any
age and the exported graph has no data-dependent shape; memory is the plain mean of a segment
(icefall PR#440) instead of an attention summary.

Shape suffixes: B streams, T frames, D model width, H heads, d = D // H, L left context, M memory
slots, S segment, R right context, G segments, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["relu", "gelu", "silu"]
State = dict[str, Tensor]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}
_MASKED = -1e9


@dataclass(frozen=True, kw_only=True)
class EmformerConfig:
    """Shape of the layers. Lengths are in encoder frames (after subsampling).

    Attributes:
        dim: model width D.
        heads: attention heads; must divide ``dim``.
        ffn_dim: hidden width of the feed-forward module.
        layers: number of layers.
        left_context: cached frames each segment may look back at.
        activation: of the feed-forward module.
        memory: slots of the memory bank (0: none).
        output_norm: layer norm at the end of each layer (torchaudio yes, Whisper no).
        conv_kernel: kernel of the causal convolution module (0: none).
        dropout: after attention and inside the feed-forward module, training only.
    """

    dim: int
    heads: int
    ffn_dim: int
    layers: int
    left_context: int
    activation: Activation = "relu"
    memory: int = 0
    output_norm: bool = True
    conv_kernel: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.left_context < 1:
            raise ValueError(f"left_context is {self.left_context}, expected at least 1")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation is {self.activation!r}, expected one of {sorted(_ACTIVATIONS)}"
            )


@dataclass(frozen=True)
class _Layout:
    """How an utterance is cut for the masked forward pass. Computed once for all layers.

    Attributes:
        mask_BxTK: True where a query [right-context copies, utterance] may see a key
            [memory, right-context copies, utterance].
        rc_index_GR: utterance frame behind each right-context copy.
        ends_G: end of each segment.
        segment, right: S and R.
    """

    mask_BxTK: Tensor
    rc_index_GR: Tensor
    ends_G: Tensor
    segment: int
    right: int


def _layout(
    lengths_B: Tensor, frames: int, segment: int, right: int, left: int, memory: int
) -> _Layout:
    device = lengths_B.device
    count = -(-frames // segment)
    ends_G = torch.clamp((torch.arange(count, device=device) + 1) * segment, max=frames)
    rc_index_GR = ends_G[:, None] + torch.arange(right, device=device)
    utt_T = torch.arange(frames, device=device)
    rc_segment = torch.arange(count, device=device).repeat_interleave(right)
    query_segment = torch.cat([rc_segment, utt_T // segment])[:, None]
    starts = query_segment * segment
    sees_utt = (utt_T >= starts - left) & (utt_T < starts + segment)
    sees = [rc_segment == query_segment, sees_utt]
    if memory:
        past = torch.arange(count, device=device)
        sees.insert(0, (past < query_segment) & (past >= query_segment - memory))
    mask_TK = torch.cat(sees, dim=1)
    real_BK = torch.ones(len(lengths_B), mask_TK.shape[1], dtype=torch.bool, device=device)
    real_BK[:, -frames:] = utt_T < lengths_B[:, None]
    mask_BTK = mask_TK[None] & real_BK[:, None]
    # A row of padding that sees no key would be NaN; what it sees does not matter.
    mask_BTK = mask_BTK | ~mask_BTK.any(dim=2, keepdim=True)
    return _Layout(
        mask_BxTK=mask_BTK[:, None],
        rc_index_GR=rc_index_GR,
        ends_G=ends_G,
        segment=segment,
        right=right,
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, mask_BxTK: Tensor) -> Tensor:
    """Attention of heads (B, H, T, d) under a mask: (B, H, T, d)."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask_BxTK)
    # In bf16 torch's kernel for CPUs takes twice the time of the plain products, forth and back.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    bias = torch.zeros(mask_BxTK.shape, dtype=scores.dtype).masked_fill_(~mask_BxTK, _MASKED)
    return torch.softmax(scores + bias, dim=-1).to(value.dtype) @ value


class _ConvModule(nn.Module):
    """Causal convolution module (Conformer's, arXiv 2005.08100, layer norm for batch norm)."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.mid_norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, dim)

    def gate(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D): what the depthwise convolution runs over."""
        return F.glu(self.expand(self.norm(x)), dim=-1)

    def convolve(self, history_and_x: Tensor) -> Tensor:
        """(B, kernel - 1 + T, D) -> (B, T, D)."""
        y: Tensor = self.depthwise(history_and_x.transpose(1, 2)).transpose(1, 2)
        projected: Tensor = self.project(F.silu(self.mid_norm(y)))
        return projected


class EmformerLayer(nn.Module):
    """One layer. Parameter names follow torchaudio's where the module is the same."""

    def __init__(self, config: EmformerConfig) -> None:
        super().__init__()
        d = config.dim
        self.config = config
        self.norm_input = nn.LayerNorm(d)
        self.query = nn.Linear(d, d)
        self.key_value = nn.Linear(d, 2 * d)
        self.out = nn.Linear(d, d)
        self.conv = _ConvModule(d, config.conv_kernel) if config.conv_kernel else None
        self.norm_ffn = nn.LayerNorm(d)
        self.ffn_in = nn.Linear(d, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, d)
        self.norm_output = nn.LayerNorm(d) if config.output_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, d)."""
        heads: Tensor = x_BTD.unflatten(-1, (self.config.heads, -1))  # type: ignore[no-untyped-call]
        return heads.transpose(1, 2)

    def _feed_forward(self, x: Tensor) -> Tensor:
        hidden = _ACTIVATIONS[self.config.activation](self.ffn_in(self.norm_ffn(x)))
        result: Tensor = self.norm_output(x + self.dropout(self.ffn_out(self.dropout(hidden))))
        return result

    def forward(self, x_BTD: Tensor, layout: _Layout) -> Tensor:
        """Masked pass over [right-context copies, utterance]: (B, G*R + T, D) -> same shape."""
        copies = layout.rc_index_GR.numel()
        normed = self.norm_input(x_BTD)
        key, value = self.key_value(normed).chunk(2, dim=-1)
        if self.config.memory:
            key = torch.cat([self._segment_means(key[:, copies:], layout), key], dim=1)
            value = torch.cat([self._segment_means(value[:, copies:], layout), value], dim=1)
        attended = _attend(
            self._heads(self.query(normed)),
            self._heads(key),
            self._heads(value),
            layout.mask_BxTK,
        )
        x = x_BTD + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        if self.conv is not None:
            x = x + self._convolve_blocks(x, layout)
        return self._feed_forward(x)

    @staticmethod
    def _segment_means(x_BTD: Tensor, layout: _Layout) -> Tensor:
        """Mean of each segment's frames: (B, T, D) -> (B, G, D)."""
        segment = layout.segment
        starts = torch.arange(len(layout.ends_G), device=x_BTD.device) * segment
        padded = F.pad(x_BTD, (0, 0, 0, len(starts) * segment - x_BTD.shape[1]))
        segments: Tensor = padded.unflatten(1, (-1, segment))  # type: ignore[no-untyped-call]
        return segments.sum(2) / (layout.ends_G - starts)[None, :, None]

    def _convolve_blocks(self, x_BTD: Tensor, layout: _Layout) -> Tensor:
        """Convolution over the utterance, and over each copy with its own segment as history."""
        assert self.conv is not None
        history = self.conv.kernel - 1
        batch, copies = len(x_BTD), layout.rc_index_GR.numel()
        gated = self.conv.gate(x_BTD)
        utterance = F.pad(gated[:, copies:], (0, 0, history, 0))
        result = self.conv.convolve(utterance)
        if not copies:
            return result
        # In padded coordinates the frames before a segment's end start right at that end.
        index = layout.ends_G[:, None] + torch.arange(history, device=x_BTD.device)
        before = utterance[:, index].flatten(0, 1)
        blocks = gated[:, :copies].reshape(-1, layout.right, self.config.dim)
        rc = self.conv.convolve(torch.cat([before, blocks], dim=1))
        return torch.cat([rc.reshape(batch, copies, -1), result], dim=1)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape without the batch axis."""
        c = self.config
        head = (c.heads, c.left_context, c.dim // c.heads)
        shapes: dict[str, tuple[int, ...]] = {"key": head, "value": head}
        if c.memory:
            bank = (c.heads, c.memory, c.dim // c.heads)
            shapes |= {"memory_key": bank, "memory_value": bank}
        if c.conv_kernel:
            shapes["conv"] = (c.conv_kernel - 1, c.dim)
        return shapes

    def step(
        self,
        x_BTD: Tensor,
        state: State,
        bias_Bx1K: Tensor,
        segment: Tensor,
        rows_B: Tensor | None,
        wanted: int | None = None,
    ) -> tuple[Tensor, State]:
        """One window: (B, S + R, D) -> as many frames, or less, and what follows of the state.

        Args:
            x_BTD: segment followed by its right context.
            state: this layer's entries, named as in :meth:`state_shapes`, batch first.
            bias_Bx1K: (B, 1, 1, M + L + S + R), 0 where a key may be seen.
            segment: () int64, S.
            rows_B: where each stream's row of the rings is; None if they are in the batch's order.
            wanted: only so many frames are to come out, (B, wanted, D); the others are heard only.

        Returns:
            The output, and the next state, of whose rings there are only the frames of this window,
            those of the right context too.
        """
        c = self.config
        normed = self.norm_input(x_BTD)
        key, value = (self._heads(part) for part in self.key_value(normed).chunk(2, dim=-1))
        if wanted is not None:
            x_BTD, normed = x_BTD.narrow(1, 0, wanted), normed.narrow(1, 0, wanted)
        query = self._heads(self.query(normed)) * (c.dim // c.heads) ** -0.5
        following: State = {"key": key, "value": value}
        # The products go over the parts one by one, as a copy of the caches costs more than they.
        seen: dict[str, list[Tensor]] = {}
        for name, new in (("key", key), ("value", value)):
            ring = state[name]
            seen[name] = [ring if rows_B is None else ring.index_select(0, rows_B), new]
            if c.memory:
                bank = state[f"memory_{name}"]
                inside = (torch.arange(new.shape[2], device=new.device) < segment).to(new.dtype)
                mean = (new * inside[:, None]).sum(2, keepdim=True) / segment
                following[f"memory_{name}"] = torch.cat([bank[:, :, 1:], mean], dim=2)
                seen[name].insert(0, bank)
        scores = torch.cat([query @ part.transpose(2, 3) for part in seen["key"]], dim=3)
        weights = torch.softmax(scores + bias_Bx1K, dim=-1)
        cached = c.memory + c.left_context
        bounds = [0, *([c.memory] if c.memory else []), cached]
        attended = weights[..., cached:] @ seen["value"][-1]
        for i, part in enumerate(seen["value"][:-1]):
            attended = attended + weights[..., bounds[i] : bounds[i + 1]] @ part
        x = x_BTD + self.out(attended.transpose(1, 2).flatten(2))
        if self.conv is not None:
            run = torch.cat([state["conv"], self.conv.gate(x)], dim=1)
            tail = torch.arange(c.conv_kernel - 1, device=x.device) + segment
            following["conv"] = run.index_select(1, tail)
            x = x + self.conv.convolve(run)
        return self._feed_forward(x), following


class Emformer(nn.Module):
    """A stack of :class:`EmformerLayer`."""

    def __init__(self, config: EmformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EmformerLayer(config) for _ in range(config.layers))

    def _layer(self, index: int) -> EmformerLayer:
        layer = self.layers[index]
        assert isinstance(layer, EmformerLayer)
        return layer

    def forward(self, x_BTD: Tensor, lengths_B: Tensor, segment: int, right: int) -> Tensor:
        """Masked pass over whole utterances.

        Args:
            x_BTD: (B, T + right, D); the last ``right`` frames serve as right context only.
            lengths_B: valid frames of each utterance, without right context.
            segment: S, at least 1. ``segment >= T`` sees the whole utterance at once.
            right: R, 0 or more.

        Returns:
            (B, T, D).
        """
        frames = x_BTD.shape[1] - right
        if segment < 1 or right < 0 or frames < 1:
            raise ValueError(
                f"got segment {segment}, right context {right} and {x_BTD.shape[1]} frames; "
                "expected segment >= 1, right context >= 0 and more frames than right context"
            )
        c = self.config
        layout = _layout(lengths_B, frames, segment, right, c.left_context, c.memory)
        copies = x_BTD[:, layout.rc_index_GR.flatten()]
        x = torch.cat([copies, x_BTD[:, :frames]], dim=1)
        for index in range(c.layers):
            x = self._layer(index)(x, layout)
        return x[:, copies.shape[1] :]

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape without the batch axis, for every layer; names are ``layer{i}.{name}``."""
        return {
            f"layer{i}.{name}": shape
            for i in range(self.config.layers)
            for name, shape in self._layer(i).state_shapes().items()
        }

    @property
    def rings(self) -> frozenset[str]:
        """Names of the states that are rings over their axis 1 (2 with the batch)."""
        return frozenset(n for n in self.state_shapes() if n.split(".")[-1] in ("key", "value"))

    def step(
        self, x_BTD: Tensor, state: State, processed_B: Tensor, right: Tensor
    ) -> tuple[Tensor, State]:
        """One window of segment + right context.

        Args:
            x_BTD: (B, S + R, D).
            state: named as in :meth:`state_shapes`, batch first; zeros for a new stream.
            processed_B: (B,) int64, frames of earlier segments (the age of each stream).
            right: () int64, R.

        Returns:
            (B, S + R, D), of which only the first S frames are output, and the next state. The
            caller advances ``processed_B`` by S.
        """
        x, following = self.window(x_BTD, state, processed_B, right)
        segment = x_BTD.shape[1] - int(right)
        return x, {
            name: write_ring(state[name], new[:, :, :segment], processed_B)
            if name in self.rings
            else new
            for name, new in following.items()
        }

    def window(
        self,
        x_BTD: Tensor,
        state: State,
        processed_B: Tensor,
        right: Tensor,
        rows_B: Tensor | None = None,
        wanted: int | None = None,
    ) -> tuple[Tensor, State]:
        """As :meth:`step`, but the rings' new frames (B, H, S + R, d) come out and are not written.

        Args:
            rows_B: (B,) int64, rows of the rings, which may then have any number of them.
            wanted: only so many frames are to come out, (B, wanted, D). Behind its keys and
                values, the last layer has no work with the others.
        """
        c = self.config
        device = x_BTD.device
        segment = x_BTD.shape[1] - right
        slots = torch.arange(c.left_context, device=device)
        seen = [slots < processed_B[:, None]]
        if c.memory:
            segments_B = torch.div(processed_B, segment, rounding_mode="floor")
            bank = torch.arange(c.memory, device=device)
            seen.insert(0, bank >= c.memory - segments_B[:, None])
        seen.append(torch.ones_like(x_BTD[:, :, 0], dtype=torch.bool))
        visible = torch.cat(seen, dim=1)
        bias = torch.where(visible, 0.0, _MASKED)[:, None, None].to(x_BTD.dtype)
        following: State = {}
        x = x_BTD
        for index in range(c.layers):
            prefix = f"layer{index}."
            own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            last = wanted if index == c.layers - 1 else None
            x, new = self._layer(index).step(x, own, bias, segment, rows_B, last)
            following |= {prefix + name: tensor for name, tensor in new.items()}
        return x, following


def write_ring(ring_BHLd: Tensor, new_BHSd: Tensor, processed_B: Tensor) -> Tensor:
    """The ring with the frames from ``processed_B`` on: (B, H, L, d)."""
    length, count = ring_BHLd.shape[2], new_BHSd.shape[2]
    last = torch.arange(max(0, count - length), count, device=new_BHSd.device)
    slots = (processed_B[:, None] + last).remainder(length)[:, None, :, None]
    new = new_BHSd[:, :, last]
    return ring_BHLd.scatter(2, slots.expand_as(new), new)
