"""The student: one streaming encoder with a CTC head and a transducer head.

Shape suffixes: B utterances, T feature frames, F features, N output frames, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loquent.models.emformer import EmformerConfig
from loquent.models.encoder import Encoder, EncoderConfig
from loquent.models.frontend import FrontendConfig
from loquent.models.transducer import Joiner, PredictorConfig, make_predictor, transducer_loss


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Shape of the student.

    Attributes:
        encoder: the streaming encoder.
        vocab: number of tokens, blank included.
        blank: id of the blank.
        joiner_dim: width J of the joiner. 0 leaves the transducer out.
        encoder_projection: a linear layer in front of the joiner (torchaudio has none: its
            encoder's output already has width J).
        joiner_activation: tanh (icefall) or relu (torchaudio).
        predictor: shape of the predictor.
        ctc: whether there is a CTC head.
    """

    encoder: EncoderConfig
    vocab: int
    blank: int = 0
    joiner_dim: int = 256
    encoder_projection: bool = True
    joiner_activation: Literal["tanh", "relu"] = "tanh"
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    ctc: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StudentConfig:
        """Inverse of :meth:`to_dict`."""
        encoder = dict(data["encoder"])
        front = dict(encoder["frontend"])
        front["strides"] = tuple(front["strides"])
        encoder["frontend"] = FrontendConfig(**front)
        encoder["emformer"] = EmformerConfig(**encoder["emformer"])
        return cls(
            **{
                **data,
                "encoder": EncoderConfig(**encoder),
                "predictor": PredictorConfig(**data["predictor"]),
            }
        )


@dataclass(frozen=True)
class Losses:
    """Sums over the batch, in nats, with the number of target tokens they belong to.

    Attributes:
        ctc, rnnt: the losses.
        tokens: target tokens of the utterances that count.
        ctc_B: CTC loss of each utterance, whether it counts or not.
        log_probs_BNV: of the CTC head.
        logits_BNUV: of the transducer, if it has run.
    """

    ctc: Tensor
    rnnt: Tensor
    tokens: int
    ctc_B: Tensor
    log_probs_BNV: Tensor | None
    logits_BNUV: Tensor | None


class Student(nn.Module):
    """Encoder, CTC head, predictor and joiner."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        width = config.encoder.width
        self.ctc = nn.Linear(width, config.vocab) if config.ctc else None
        if config.joiner_dim:
            if not config.encoder_projection and width != config.joiner_dim:
                raise ValueError(
                    f"without a projection the joiner needs width {width}, got {config.joiner_dim}"
                )
            self.encoder_projection = (
                nn.Linear(width, config.joiner_dim) if config.encoder_projection else nn.Identity()
            )
            self.predictor = make_predictor(config.predictor, config.vocab, config.joiner_dim)
            self.joiner = Joiner(config.joiner_dim, config.vocab, config.joiner_activation)

    def ctc_log_probs(self, encoded: Tensor) -> Tensor:
        """(..., E) -> (..., V) float32 log-probabilities."""
        if self.ctc is None:
            raise ValueError("this student has no CTC head")
        return F.log_softmax(self.ctc(encoded).float(), dim=-1)

    def forward(
        self,
        x_BTF: Tensor,
        lengths_B: Tensor,
        segment: int,
        right_context: int,
        start_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encoder frames of whole utterances; see :meth:`Encoder.forward`."""
        out: tuple[Tensor, Tensor] = self.encoder(x_BTF, lengths_B, segment, right_context, start_B)
        return out

    def lattice(self, encoded_BNE: Tensor, targets_BU: Tensor) -> Tensor:
        """Transducer logits at every frame behind every token: (B, N, U + 1, V)."""
        predicted = self.predictor(targets_BU, self.config.blank)
        projected = self.encoder_projection(encoded_BNE)
        logits: Tensor = self.joiner(projected[:, :, None], predicted[:, None])
        return logits

    def losses(
        self,
        encoded_BNE: Tensor,
        frames_B: Tensor,
        targets_BU: Tensor,
        targets_B: Tensor,
        *,
        rnnt: bool,
        drop_above: float = math.inf,
        delay_penalty: float = 0.0,
    ) -> Losses:
        """CTC and transducer loss of encoded utterances, summed over the batch.

        Args:
            encoded_BNE: output of :meth:`forward`.
            frames_B: its valid lengths.
            targets_BU: (B, U) int64 tokens, padded with the blank.
            targets_B: valid lengths of the targets.
            rnnt: compute the transducer loss (zero otherwise).
            drop_above: utterances with a larger CTC loss a token, in nats, do not count; all do
                if none has a smaller one.
            delay_penalty: see :func:`transducer_loss`.
        """
        c = self.config
        zero = encoded_BNE.new_zeros((), dtype=torch.float32)
        ctc = zero
        ctc_B = zero.expand(len(targets_B))
        log_probs = logits = None
        kept_B = torch.ones_like(targets_B, dtype=torch.bool)
        if self.ctc is not None:
            log_probs = self.ctc_log_probs(encoded_BNE)
            ctc_B = F.ctc_loss(
                log_probs.transpose(0, 1),
                targets_BU,
                frames_B,
                targets_B,
                blank=c.blank,
                reduction="none",
                zero_infinity=True,
            )
            small_B = ctc_B.detach() <= drop_above * targets_B
            kept_B = small_B if bool(small_B.any()) else kept_B
            ctc = ctc_B[kept_B].sum()
        transducer = zero
        if rnnt and c.joiner_dim:
            logits = self.lattice(encoded_BNE, targets_BU)
            each_B = transducer_loss(
                logits, targets_BU, frames_B, targets_B, c.blank, delay_penalty
            )
            transducer = each_B[kept_B].sum()
        return Losses(
            ctc=ctc,
            rnnt=transducer,
            tokens=int(targets_B[kept_B].sum()),
            ctc_B=ctc_B,
            log_probs_BNV=log_probs,
            logits_BNUV=logits,
        )
