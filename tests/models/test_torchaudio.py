"""Our Emformer and transducer against torchaudio's, with the same weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchaudio
from torch import Tensor, nn
from torchaudio.models import Emformer as TheirEmformer
from torchaudio.models import emformer_rnnt_base

from loquent.models import torchaudio_weights
from loquent.models.emformer import Emformer, EmformerConfig, State
from loquent.models.student import Student
from loquent.models.torchaudio_weights import student_from_torchaudio

TOLERANCE = 1e-4
STEPS = 20
Perturb = Callable[[nn.Module], None]


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of torchaudio's Emformer with our names."""
    out = {}
    for name, tensor in weights.items():
        name = f"transcriber.transformer.{name}"
        for pattern, replacement in torchaudio_weights._RENAMES:
            name = re.sub(pattern, replacement, name)
        out[name.removeprefix("encoder.emformer.")] = tensor
    return out


# Layers alone, small


SHAPES = [  # segment, right context, left context, activation
    pytest.param(4, 1, 30, "gelu", id="base"),
    pytest.param(4, 1, 6, "relu", id="left-shorter-than-past"),
    pytest.param(1, 0, 3, "silu", id="one-frame"),
    pytest.param(5, 3, 7, "relu", id="odd"),
    pytest.param(2, 4, 4, "gelu", id="right-longer-than-segment"),
]


def pair(
    segment: int, right: int, left: int, activation: Any, perturb: Perturb
) -> tuple[TheirEmformer, Emformer]:
    torch.manual_seed(0)
    theirs = TheirEmformer(
        32,
        4,
        64,
        2,
        segment,
        activation=activation,
        left_context_length=left,
        right_context_length=right,
    ).eval()
    perturb(theirs)
    config = EmformerConfig(
        dim=32, heads=4, ffn_dim=64, layers=2, left_context=left, activation=activation
    )
    ours = Emformer(config).eval()
    ours.load_state_dict(renamed(theirs.state_dict()))
    return theirs, ours


@pytest.mark.parametrize(("segment", "right", "left", "activation"), SHAPES)
@pytest.mark.parametrize("lengths", [[20], [20, 17, 9, 4]], ids=["batch-1", "batch-4"])
@torch.no_grad()
def test_forward_is_torchaudios(
    segment: int, right: int, left: int, activation: str, lengths: list[int], perturb: Perturb
) -> None:
    theirs, ours = pair(segment, right, left, activation, perturb)
    x = torch.randn(len(lengths), 20 + right, 32)
    expected, valid = theirs(x, torch.tensor(lengths))
    got = ours(x, torch.tensor(lengths), segment, right)
    assert got.shape == expected.shape
    for row, count in enumerate(valid.tolist()):
        torch.testing.assert_close(got[row, :count], expected[row, :count], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("segment", "right", "left", "activation"), SHAPES)
@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_infer_is_torchaudios(
    segment: int, right: int, left: int, activation: str, batch: int, perturb: Perturb
) -> None:
    theirs, ours = pair(segment, right, left, activation, perturb)
    state: State = {n: torch.zeros(batch, *s) for n, s in ours.state_shapes().items()}
    their_state = None
    for step in range(STEPS):
        x = torch.randn(batch, segment + right, 32)
        expected, _, their_state = theirs.infer(
            x, torch.full((batch,), segment + right), their_state
        )
        processed = torch.full((batch,), step * segment)
        got, state = ours.step(x, state, processed, torch.tensor(right))
        torch.testing.assert_close(got[:, :segment], expected, atol=TOLERANCE, rtol=0)


def test_torchaudio_itself_cannot_mix_ages(perturb: Perturb) -> None:
    """Why the layers are written anew: one new stream takes the left context from all others."""
    theirs, _ours = pair(4, 1, 8, "relu", perturb)
    torch.manual_seed(1)
    lengths = torch.tensor([5])
    with torch.no_grad():
        _, _, old = theirs.infer(torch.randn(1, 5, 32), lengths)
        window = torch.randn(2, 5, 32)
        alone, _, _ = theirs.infer(window[1:], lengths, old)
        _, _, new = theirs.infer(torch.zeros(1, 5, 32), lengths)
        for layer in new:
            for tensor in layer:
                tensor.zero_()  # the state of a stream that has just begun
        mixed = [
            [torch.cat([a, b], dim=1) for a, b in zip(*layers, strict=True)]
            for layers in zip(new, old, strict=True)
        ]
        together, _, _ = theirs.infer(window, torch.tensor([5, 5]), mixed)
    assert not torch.allclose(together[1], alone[0], atol=1e-2)


# The whole model, at its own size


@pytest.fixture(scope="module")
def base() -> tuple[Any, Student]:
    torch.manual_seed(0)
    theirs = emformer_rnnt_base(33).eval()
    return theirs, student_from_torchaudio(theirs.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_base_encoder_is_torchaudios(base: tuple[Any, Student], batch: int) -> None:
    theirs, ours = base
    x = torch.randn(batch, 16 * 6 + 4, 80)
    # Multiples of 4: torchaudio cuts a rest off, ours keeps it.
    lengths = torch.tensor([96, 88, 52, 32][:batch])
    expected, valid = theirs.transcriber(x, lengths)
    got, count = ours.encoder(x, lengths, 16, 4)
    assert count.tolist() == valid.tolist()
    for row, frames in enumerate(valid.tolist()):
        torch.testing.assert_close(
            got[row, :frames], expected[row, :frames], atol=TOLERANCE, rtol=0
        )
    state, their_state = ours.encoder.initial_state(batch), None
    for _ in range(STEPS):
        x = torch.randn(batch, 20, 80)
        expected, _, their_state = theirs.transcriber.infer(
            x, torch.full((batch,), 20), their_state
        )
        got, state = ours.encoder.step(x, torch.tensor(4), state)
        torch.testing.assert_close(got[:, :4], expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_base_predictor_and_joiner_are_torchaudios(base: tuple[Any, Student]) -> None:
    theirs, ours = base
    tokens = torch.randint(0, 32, (3, 6))
    blank = 32
    start = torch.full((3, 1), blank)
    expected, _, _ = theirs.predictor(torch.cat([start, tokens], 1), torch.full((3,), 7))
    got = ours.predictor(tokens, blank)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    frames = torch.randn(3, 5, 1024)
    logits, _, _ = theirs.joiner(frames, torch.full((3,), 5), expected, torch.full((3,), 7))
    ours_logits = ours.joiner(ours.encoder_projection(frames)[:, :, None], got[:, None])
    torch.testing.assert_close(ours_logits, logits, atol=TOLERANCE, rtol=0)
    assert ours.config.blank == blank


def test_other_weights_are_refused(base: tuple[Any, Student]) -> None:
    weights = base[0].state_dict()
    with pytest.raises(ValueError, match=r"no joiner\.linear\.weight"):
        student_from_torchaudio({})
    weights.pop("predictor.embedding.weight")
    with pytest.raises(ValueError, match=r"(?s)not the weights of emformer_rnnt_base.*embedding"):
        student_from_torchaudio(weights)


def test_torch_and_torchaudio_are_a_pair() -> None:
    assert torch.__version__.split("+")[0] == torchaudio.__version__.split("+")[0]
