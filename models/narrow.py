"""Feed-forward modules with fewer hidden units, before a student learns.

Most units of a pretrained encoder say little that the others do not. Those that move the output
most are kept, the rest is taken for its mean, and the kept ones take over, by least squares, what
can be told from them: layer by layer, each on what the narrower layers below it give (Frantar and
Alistarh, arXiv 2208.11580, prune weights in this way).

Shapes: N frames, H hidden units, K kept ones, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loquent.models.data import Batch
from loquent.models.emformer import EmformerLayer
from loquent.models.student import Student, StudentConfig
from loquent.models.training import WHOLE

_RIDGE = 1e-3  # of the mean variance, for units that always agree


def narrowed(student: Student, units: int, batches: Sequence[Batch]) -> Student:
    """A student with only so many hidden units in each feed-forward module.

    Args:
        student: as wide as its pretrained encoder; it is used up.
        units: hidden units to keep.
        batches: some hundred utterances of the kind that it will hear, heard as a whole.

    Raises:
        ValueError: it has not so many.
    """
    result = Student(narrow_shape(student.config, units))
    student.eval()
    for layer in student.encoder.emformer.layers:
        assert isinstance(layer, EmformerLayer)
        mean_H, covariance_HH = _statistics(student, layer, batches)
        _narrow(layer, units, mean_H, covariance_HH)
    result.load_state_dict(student.state_dict())
    return result


def narrow_shape(config: StudentConfig, units: int) -> StudentConfig:
    """The shape with so many hidden units. Raises ValueError if it has not so many."""
    shape = config.encoder.emformer
    if not 0 < units <= shape.ffn_dim:
        raise ValueError(f"got {units} units, expected 1 to {shape.ffn_dim}")
    encoder = dataclasses.replace(
        config.encoder, emformer=dataclasses.replace(shape, ffn_dim=units)
    )
    return dataclasses.replace(config, encoder=encoder)


def _statistics(
    student: Student, layer: EmformerLayer, batches: Sequence[Batch]
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a layer's hidden units over the frames of the batches."""
    size = layer.ffn_out.in_features
    count, sum_H, square_HH = 0, torch.zeros(size), torch.zeros(size, size)
    seen: list[Tensor] = []
    handle = layer.ffn_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    factor = student.config.encoder.layer_subsampling
    try:
        for batch in batches:
            with torch.no_grad():
                student(batch.x_BTF, batch.lengths_B, WHOLE, 0)
            hidden_BTH = seen.pop()
            frames_B = torch.div(batch.lengths_B + factor - 1, factor, rounding_mode="floor")
            real_BT = torch.arange(hidden_BTH.shape[1]) < frames_B[:, None]
            hidden_NH = hidden_BTH[real_BT].float()
            count += len(hidden_NH)
            sum_H += hidden_NH.sum(0)
            square_HH += hidden_NH.T @ hidden_NH
    finally:
        handle.remove()
    mean_H = sum_H / count
    return mean_H, square_HH / count - mean_H[:, None] * mean_H


def _narrow(layer: EmformerLayer, units: int, mean_H: Tensor, covariance_HH: Tensor) -> None:
    into, out = layer.ffn_in, layer.ffn_out
    with torch.no_grad():
        worth_H = covariance_HH.diagonal().clamp(min=0).sqrt() * out.weight.norm(dim=0)
        kept_K = worth_H.topk(units).indices.sort().values
        ridge = _RIDGE * covariance_HH.diagonal().mean() * torch.eye(units)
        among_KK = covariance_HH[kept_K][:, kept_K] + ridge
        weight_DK = torch.linalg.solve(among_KK, covariance_HH[kept_K] @ out.weight.T).T
        bias_D = out.bias + out.weight @ mean_H - weight_DK @ mean_H[kept_K]
        layer.ffn_in = nn.Linear(into.in_features, units)
        layer.ffn_in.weight.copy_(into.weight[kept_K])
        layer.ffn_in.bias.copy_(into.bias[kept_K])
        layer.ffn_out = nn.Linear(units, out.out_features)
        layer.ffn_out.weight.copy_(weight_DK)
        layer.ffn_out.bias.copy_(bias_D)
