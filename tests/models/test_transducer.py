"""The transducer loss against torchaudio's, and the predictors' two paths."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchaudio.functional import rnnt_loss

from loquent.models.transducer import (
    Joiner,
    LstmPredictor,
    PredictorConfig,
    StatelessPredictor,
    make_predictor,
    transducer_loss,
)

VOCAB = 7


def case(
    frames: list[int], tokens: list[int], blank: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns = max(tokens)
    logits = 2 * torch.randn(
        len(frames), max(frames), columns + 1, VOCAB, generator=generator, dtype=torch.float32
    )
    labels = torch.randint(0, VOCAB - 1, (len(frames), columns), generator=generator)
    if blank == 0:
        labels += 1
    return logits.requires_grad_(), labels, torch.tensor(frames), torch.tensor(tokens)


CASES = [
    pytest.param([12], [4], id="one"),
    pytest.param([30, 11, 1, 20, 9], [9, 3, 0, 5, 9], id="mixed"),
    pytest.param([1], [0], id="one-frame-no-token"),
    pytest.param([1, 1], [1, 3], id="one-frame"),
    pytest.param([6, 3], [0, 0], id="no-token"),
    pytest.param([5, 8], [8, 5], id="more-tokens-than-frames"),
]


@pytest.mark.parametrize(("frames", "tokens"), CASES)
@pytest.mark.parametrize("blank", [0, VOCAB - 1], ids=["blank-first", "blank-last"])
def test_loss_and_gradient_are_torchaudios(
    frames: list[int], tokens: list[int], blank: int
) -> None:
    logits, labels, frames_B, tokens_B = case(frames, tokens, blank)
    weight = torch.rand(len(frames)) + 0.5
    losses, gradients = [], []
    ours = transducer_loss(logits, labels, frames_B, tokens_B, blank)
    theirs = rnnt_loss(
        logits, labels.int(), frames_B.int(), tokens_B.int(), blank=blank, reduction="none"
    )
    for loss in (ours, theirs):
        (gradient,) = torch.autograd.grad((loss * weight).sum(), logits)
        losses.append(loss.detach())
        gradients.append(gradient)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("blank", [0, VOCAB - 1])
def test_loss_is_minus_log_of_the_sum_over_all_paths(blank: int) -> None:
    frames, tokens = 4, 3
    logits, labels, frames_B, tokens_B = case([frames], [tokens], blank)
    log_p = logits[0].log_softmax(-1)
    total = torch.tensor(-torch.inf)
    # A path is the number of the frame at which each token comes.
    for when in itertools.combinations_with_replacement(range(frames), tokens):
        score = torch.tensor(0.0)
        said = 0
        for frame in range(frames):
            while said < tokens and when[said] == frame:
                score = score + log_p[frame, said, labels[0, said]]
                said += 1
            score = score + log_p[frame, said, blank]
        total = torch.logaddexp(total, score)
    loss = transducer_loss(logits, labels, frames_B, tokens_B, blank)
    torch.testing.assert_close(loss[0], -total)


def test_gradient_is_the_slope() -> None:
    logits, labels, frames_B, tokens_B = case([5, 3, 1], [2, 0, 2], 0)

    def loss(shift: Tensor) -> Tensor:
        return transducer_loss(logits.detach() + shift, labels, frames_B, tokens_B, 0).sum()

    shift = torch.zeros_like(logits).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(shift), shift)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        direction = torch.randn(logits.shape, generator=generator)
        step = 1e-2 * direction
        slope = (loss(step) - loss(-step)) / 2e-2
        torch.testing.assert_close((gradient * direction).sum(), slope, atol=2e-2, rtol=1e-2)


def test_padding_has_neither_loss_nor_gradient() -> None:
    logits, labels, frames_B, tokens_B = case([6, 4], [3, 1], 0)
    alone = transducer_loss(logits[1:, :4, :2], labels[1:, :1], frames_B[1:], tokens_B[1:], 0)
    both = transducer_loss(logits, labels, frames_B, tokens_B, 0)
    torch.testing.assert_close(both[1], alone[0])
    (gradient,) = torch.autograd.grad(both[1], logits)
    assert gradient[1, :4, :2].abs().min() > 0
    assert not gradient[0].any()
    assert not gradient[1, 4:].any()
    assert not gradient[1, :, 2:].any()


def test_confident_logits_keep_the_loss_finite() -> None:
    logits, labels, frames_B, tokens_B = case([9, 5], [4, 2], 0)
    sharp = (1000 * logits.detach()).requires_grad_()
    loss = transducer_loss(sharp, labels, frames_B, tokens_B, 0)
    (gradient,) = torch.autograd.grad(loss.sum(), sharp)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


# Predictors

PREDICTORS = [
    pytest.param(PredictorConfig(embedding=6, context=1), id="bigram"),
    pytest.param(PredictorConfig(embedding=6, context=2), id="trigram"),
    pytest.param(PredictorConfig(embedding=6, context=4), id="five-gram"),
    pytest.param(PredictorConfig(kind="lstm", embedding=6, layers=1, hidden=8), id="lstm"),
    pytest.param(PredictorConfig(kind="lstm", embedding=6, layers=3, hidden=8), id="lstm-3"),
]


@pytest.mark.parametrize("config", PREDICTORS)
@pytest.mark.parametrize("blank", [0, VOCAB - 1])
@torch.no_grad()
def test_step_is_forward(
    config: PredictorConfig, blank: int, perturb: Callable[[nn.Module], None]
) -> None:
    torch.manual_seed(0)
    predictor: Any = make_predictor(config, VOCAB, 5)
    perturb(predictor)
    tokens = torch.randint(0, VOCAB, (3, 9))
    expected = predictor(tokens, blank)
    assert expected.shape == (3, 10, 5)
    state = {
        name: torch.full((3, *shape), blank if dtype == torch.int64 else 0, dtype=dtype)
        for name, (shape, dtype) in predictor.state_shapes().items()
    }
    fed = torch.cat([torch.full((3, 1), blank), tokens], dim=1)
    for u in range(10):
        got, state = predictor.step(fed[:, u], state)
        torch.testing.assert_close(got, expected[:, u], atol=1e-6, rtol=1e-5)


def test_stateless_predictor_forgets_what_is_behind_its_context() -> None:
    torch.manual_seed(0)
    predictor = StatelessPredictor(PredictorConfig(embedding=6, context=2), VOCAB, 5)
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 3, 4]])
    out = predictor(tokens, 0)
    torch.testing.assert_close(out[0, 4], out[1, 4])
    assert not torch.allclose(out[0, 3], out[1, 3])


def test_kinds() -> None:
    assert isinstance(make_predictor(PredictorConfig(), VOCAB, 5), StatelessPredictor)
    lstm = PredictorConfig(kind="lstm", embedding=6, hidden=8)
    assert isinstance(make_predictor(lstm, VOCAB, 5), LstmPredictor)


@pytest.mark.parametrize(("activation", "function"), [("tanh", torch.tanh), ("relu", torch.relu)])
def test_joiner(activation: Any, function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    joiner = Joiner(5, VOCAB, activation)
    encoder, predictor = torch.randn(2, 4, 1, 5), torch.randn(2, 1, 3, 5)
    got = joiner(encoder, predictor)
    assert got.shape == (2, 4, 3, VOCAB)
    torch.testing.assert_close(got, joiner.linear(function(encoder + predictor)))
