"""RNN-T parts: predictors, joiner and loss.

Shape suffixes: B streams, U tokens, N encoder frames, J joiner width, V vocabulary, C context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """Shape of the predictor.

    Attributes:
        kind: ``stateless`` (embeddings of the last ``context`` tokens under a convolution,
            arXiv 2109.07513) or ``lstm`` (layer-normed LSTM: torchaudio's ``_Predictor``).
        embedding: width of a token's embedding.
        context: tokens seen by the stateless predictor.
        layers, hidden: of the LSTM.
    """

    kind: Literal["stateless", "lstm"] = "stateless"
    embedding: int = 256
    context: int = 2
    layers: int = 3
    hidden: int = 512


class StatelessPredictor(nn.Module):
    """A trigram of embeddings (for ``context`` 2): no recurrent state to carry."""

    def __init__(self, config: PredictorConfig, vocab: int, width: int) -> None:
        super().__init__()
        self.context = config.context
        self.embedding = nn.Embedding(vocab, config.embedding)
        self.conv = nn.Conv1d(
            config.embedding, config.embedding, config.context, groups=config.embedding, bias=False
        )
        self.linear = nn.Linear(config.embedding, width)

    def state_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The tokens before the one to come; a new stream holds blanks."""
        return {"context": ((self.context - 1,), torch.int64)}

    def _run(self, tokens_BU: Tensor) -> Tensor:
        x = self.embedding(tokens_BU).transpose(1, 2)
        result: Tensor = self.linear(F.relu(self.conv(x).transpose(1, 2)))
        return result

    def forward(self, tokens_BU: Tensor, blank: int) -> Tensor:
        """(B, U) tokens -> (B, U + 1, J): the state before each token, and behind the last."""
        return self._run(F.pad(tokens_BU, (self.context, 0), value=blank))

    def step(self, token_B: Tensor, state: State) -> tuple[Tensor, State]:
        """(B,) last token and what came before it -> (B, J) and the next state."""
        tokens = torch.cat([state["context"], token_B[:, None]], dim=1)
        return self._run(tokens)[:, 0], {"context": tokens[:, 1:]}


class _NormedLstm(nn.Module):
    """One layer of torchaudio's ``_CustomLSTM`` with layer norm on gates and cell."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.x2g = nn.Linear(width, 4 * hidden, bias=False)
        self.p2g = nn.Linear(hidden, 4 * hidden, bias=False)
        # torchaudio.models.emformer_rnnt_base sets lstm_layer_norm_epsilon to 1e-3.
        self.c_norm = nn.LayerNorm(hidden, eps=1e-3)
        self.g_norm = nn.LayerNorm(4 * hidden, eps=1e-3)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.g_norm(self.x2g(x) + self.p2g(h))
        i, f, g, o = gates.chunk(4, dim=-1)
        c = self.c_norm(f.sigmoid() * c + i.sigmoid() * g.tanh())
        return o.sigmoid() * c.tanh(), c


class LstmPredictor(nn.Module):
    """torchaudio's predictor (``torchaudio/models/rnnt.py`` ``_Predictor``)."""

    def __init__(self, config: PredictorConfig, vocab: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab, config.embedding)
        self.input_norm = nn.LayerNorm(config.embedding)
        widths = [config.embedding, *[config.hidden] * (config.layers - 1)]
        self.lstm = nn.ModuleList(_NormedLstm(w, config.hidden) for w in widths)
        self.linear = nn.Linear(config.hidden, width)
        self.output_norm = nn.LayerNorm(width)

    def state_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Hidden and cell vector of each layer; zeros for a new stream."""
        hidden = ((self.config.hidden,), torch.float32)
        return {f"{n}{i}": hidden for i in range(self.config.layers) for n in ("h", "c")}

    def forward(self, tokens_BU: Tensor, blank: int) -> Tensor:
        """(B, U) tokens -> (B, U + 1, J)."""
        tokens = F.pad(tokens_BU, (1, 0), value=blank)
        weight = self.linear.weight
        state = {
            n: weight.new_zeros((len(tokens), *shape))
            for n, (shape, _) in self.state_shapes().items()
        }
        out = []
        for token in tokens.unbind(1):
            frame, state = self.step(token, state)
            out.append(frame)
        return torch.stack(out, dim=1)

    def step(self, token_B: Tensor, state: State) -> tuple[Tensor, State]:
        """(B,) last token and the state behind the tokens before it -> (B, J), next state."""
        x = self.input_norm(self.embedding(token_B))
        following: State = {}
        for i, layer in enumerate(self.lstm):
            assert isinstance(layer, _NormedLstm)
            x, cell = layer.step(x, state[f"h{i}"], state[f"c{i}"])
            following |= {f"h{i}": x, f"c{i}": cell}
        return self.output_norm(self.linear(x)), following


class Joiner(nn.Module):
    """``activation(encoder + predictor) -> linear``."""

    def __init__(self, width: int, vocab: int, activation: Literal["tanh", "relu"]) -> None:
        super().__init__()
        self.activation = activation
        self.linear = nn.Linear(width, vocab)

    def forward(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        """Broadcast over leading axes: (..., J) and (..., J) -> (..., V) logits."""
        x = encoder + predictor
        result: Tensor = self.linear(torch.tanh(x) if self.activation == "tanh" else F.relu(x))
        return result


def make_predictor(
    config: PredictorConfig, vocab: int, width: int
) -> StatelessPredictor | LstmPredictor:
    """The module that ``config`` names."""
    if config.kind == "stateless":
        return StatelessPredictor(config, vocab, width)
    return LstmPredictor(config, vocab, width)


def transducer_loss(
    logits_BNUV: Tensor,
    targets_BU: Tensor,
    frames_B: Tensor,
    targets_B: Tensor,
    blank: int,
    delay_penalty: float = 0.0,
) -> Tensor:
    """RNN-T loss of each utterance, in nats: (B,) (arXiv 1211.3711).

    The one place that knows which implementation computes it. On an accelerator that is
    ``torchaudio.functional.rnnt_loss``; on the CPU, where that one runs on a single thread, the
    lattice is walked diagonal by diagonal in vector operations (the table in ``models/README.md``
    has the times). Both give the same loss and the same gradient.

    Args:
        logits_BNUV: (B, N, U + 1, V) unnormalised.
        targets_BU: (B, U) tokens, padded with anything that is a valid id.
        frames_B, targets_B: valid lengths, at least one frame each.
        blank: id of the blank.
        delay_penalty: a transducer likes to wait for more context; a token at frame t of N gets
            this much times ((N - 1) / 2 - t) on its log-probability, which favours early ones
            (arXiv 2211.00490). 0.001 to 0.01 of frames of 40 ms trade little accuracy.
    """
    function = _lattice_loss if logits_BNUV.device.type == "cpu" else _torchaudio_loss
    return function(logits_BNUV, targets_BU, frames_B, targets_B, blank, delay_penalty)


def _earliness(frames_B: Tensor, frames: int, penalty: float) -> Tensor:
    """What a token gains at each frame: (B, N)."""
    at = torch.arange(frames, device=frames_B.device)
    return penalty * ((frames_B[:, None] - 1) / 2 - at)


def _torchaudio_loss(
    logits_BNUV: Tensor,
    targets_BU: Tensor,
    frames_B: Tensor,
    targets_B: Tensor,
    blank: int,
    delay_penalty: float,
) -> Tensor:
    logits = logits_BNUV.float()
    if delay_penalty:
        logits = F.log_softmax(logits, dim=-1)
        gain = _earliness(frames_B, logits.shape[1], delay_penalty)[:, :, None, None]
        tokens = torch.arange(logits.shape[3], device=logits.device) != blank
        logits = logits + gain * tokens
    loss: Tensor = torchaudio.functional.rnnt_loss(
        logits,
        targets_BU.int(),
        frames_B.int(),
        targets_B.int(),
        blank=blank,
        reduction="none",
        fused_log_softmax=not delay_penalty,
    )
    return loss


_PIECE = 4096  # cells whose logits are worked on at once: what is read again is in the cache
_IMPOSSIBLE = -1e30  # finite: a difference of infinities is not a number


class _Lattice(torch.autograd.Function):
    """The loss and its gradient in closed form: one walk from each end of the lattice.

    Recorded step by step, the walk would cost more than all the rest of the loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_BNUV: Tensor,
        targets_BU: Tensor,
        frames_B: Tensor,
        targets_B: Tensor,
        blank: int,
        delay_penalty: float,
    ) -> Tensor:
        batch, frames, columns, _ = logits_BNUV.shape
        pieces = torch.split(logits_BNUV.reshape(-1, logits_BNUV.shape[3]), _PIECE)
        total = torch.cat([x.float().logsumexp(-1) for x in pieces]).reshape(batch, frames, columns)
        stay = logits_BNUV[..., blank].float() - total
        # Behind the last token comes none; any label will do, as it is impossible.
        labels = F.pad(targets_BU, (0, 1))[:, None, :, None].expand(-1, frames, -1, -1)
        emit = logits_BNUV.gather(3, labels)[..., 0].float() - total
        if delay_penalty:
            emit = emit + _earliness(frames_B, frames, delay_penalty)[:, :, None]
        emit[:, :, -1] = _IMPOSSIBLE
        # Skewed: row n holds the cells with frame + column == n, which depend on row n - 1 alone.
        count = frames + columns - 1
        frame = torch.arange(count)[:, None] - torch.arange(columns)
        inside = (frame >= 0) & (frame < frames)
        index = frame.clamp(0, frames - 1).expand(batch, -1, -1)
        stay_RBU, emit_RBU = (
            x.gather(1, index).masked_fill(~inside, _IMPOSSIBLE).transpose(0, 1).contiguous()
            for x in (stay, emit)
        )
        which, last = torch.arange(batch), frames_B - 1
        end = last + targets_B, which, targets_B
        log_alpha = torch.full_like(stay_RBU, _IMPOSSIBLE)
        log_alpha[0, :, 0] = 0.0
        for row in range(1, count):
            before = log_alpha[row - 1]
            torch.add(before, stay_RBU[row - 1], out=log_alpha[row])
            emitted = (before + emit_RBU[row - 1])[:, :-1]
            log_alpha[row, :, 1:] = torch.logaddexp(log_alpha[row, :, 1:], emitted)
        score_B = log_alpha[end] + stay_RBU[end]
        # From a cell to the end: row `count` and column `columns` lie behind it.
        log_beta = stay_RBU.new_full((count + 1, batch, columns + 1), _IMPOSSIBLE)
        ending = (torch.arange(count)[:, None] == end[0])[..., None] & (
            torch.arange(columns) == targets_B[:, None]
        )
        ends = torch.where(ending, stay_RBU, _IMPOSSIBLE)
        for row in range(count - 1, -1, -1):
            after = log_beta[row + 1]
            on = torch.logaddexp(after[:, :-1] + stay_RBU[row], after[:, 1:] + emit_RBU[row])
            log_beta[row, :, :-1] = torch.logaddexp(on, ends[row])
        # How likely each cell is left by a blank, and by its token.
        rest = log_alpha - score_B[:, None]
        by_blank = (rest + stay_RBU + log_beta[1:, :, :-1]).exp_()
        by_blank[end] = 1.0
        by_token = (rest + emit_RBU + log_beta[1:, :, 1:]).exp_()
        back = (torch.arange(frames)[:, None] + torch.arange(columns)).expand(batch, -1, -1)
        shares = (x.transpose(0, 1).gather(1, back) for x in (by_blank, by_token))
        ctx.save_for_backward(logits_BNUV, total, labels, *shares)
        ctx.blank = blank
        return -score_B

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient_B] = gradients
        logits_BNUV, total, labels, by_blank, by_token = ctx.saved_tensors
        vocab = logits_BNUV.shape[3]
        by_blank, by_token = (x * gradient_B[:, None, None] for x in (by_blank, by_token))
        result = torch.empty_like(logits_BNUV)
        parts = (result, logits_BNUV, total, labels, by_blank, by_token)
        widths = (vocab, vocab, 1, 1, 1, 1)
        rows = (x.reshape(-1, width) for x, width in zip(parts, widths, strict=True))
        pieces = (torch.split(x, _PIECE) for x in rows)
        for out, logits, sums, label, blank, token in zip(*pieces, strict=True):
            own = (logits.float() - sums).exp_().mul_(blank + token)
            own[:, ctx.blank] -= blank[:, 0]
            out.copy_(own.scatter_add_(1, label, -token))
        return result, None, None, None, None, None


def _lattice_loss(
    logits_BNUV: Tensor,
    targets_BU: Tensor,
    frames_B: Tensor,
    targets_B: Tensor,
    blank: int,
    delay_penalty: float,
) -> Tensor:
    loss: Tensor = _Lattice.apply(  # type: ignore[no-untyped-call]
        logits_BNUV, targets_BU, frames_B, targets_B, blank, delay_penalty
    )
    return loss
