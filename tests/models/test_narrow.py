"""Feed-forward modules with fewer units: what the others can tell is not lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from loquent.models.data import Batch, collate
from loquent.models.narrow import narrowed
from loquent.models.student import Student, StudentConfig

Config = Callable[[int], StudentConfig]


@pytest.fixture
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        collate(
            [torch.randn(length, 80, generator=generator) for length in lengths],
            [[] for _ in lengths],
            range(len(lengths)),
            torch.zeros(80),
            multiple=4,
            room=1,
        )
        for lengths in ([81, 100], [60, 63, 40])
    ]


def _student(config: StudentConfig) -> Student:
    torch.manual_seed(0)
    return Student(config).eval()


def _heard(student: Student, batches: list[Batch]) -> torch.Tensor:
    outs = []
    with torch.no_grad():
        for batch in batches:
            out, frames = student(batch.x_BTF, batch.lengths_B, 1 << 20, 0)
            outs += [row[:n] for row, n in zip(out, frames.tolist(), strict=True)]
    return torch.cat(outs)


def test_units_that_say_the_same_cost_nothing(tiny_config: Config, batches: list[Batch]) -> None:
    student = _student(tiny_config(12))
    with torch.no_grad():
        for layer in student.encoder.emformer.layers:
            # Every second unit is the one before it, with another weight in what comes out.
            layer.ffn_in.weight[1::2] = layer.ffn_in.weight[::2]
            layer.ffn_in.bias[1::2] = layer.ffn_in.bias[::2]
    before = _heard(student, batches)
    narrow = narrowed(student, 40, batches)
    assert narrow.config.encoder.emformer.ffn_dim == 40
    assert narrow.encoder.emformer.layers[0].ffn_in.weight.shape == (40, 32)
    # 32 units would do; the strongest 40 hold at least one of nearly every two.
    kept = torch.nn.functional.cosine_similarity(_heard(narrow, batches), before, dim=1)
    assert kept.min() > 0.99


def test_units_that_never_change_become_a_bias(tiny_config: Config, batches: list[Batch]) -> None:
    student = _student(tiny_config(12))
    with torch.no_grad():
        for layer in student.encoder.emformer.layers:
            layer.ffn_in.weight[:24] = 0
            layer.ffn_in.bias[:24] = 2.0
    before = _heard(student, batches)
    narrow = narrowed(student, 40, batches)
    torch.testing.assert_close(_heard(narrow, batches), before, rtol=0, atol=0.02)


def test_the_rest_is_told_from_those_that_stay(tiny_config: Config, batches: list[Batch]) -> None:
    """Nearer to the wide encoder than the same number of units picked at random."""
    before = _heard(_student(tiny_config(12)), batches)
    narrow = narrowed(_student(tiny_config(12)), 24, batches)
    state = _student(tiny_config(12)).state_dict()
    for name in list(state):
        if ".ffn_in." in name:
            state[name] = state[name][:24]
        elif name.endswith(".ffn_out.weight"):
            state[name] = state[name][:, :24]
    cut = Student(narrow.config).eval()
    cut.load_state_dict(state)
    far = (_heard(cut, batches) - before).square().mean()
    assert (_heard(narrow, batches) - before).square().mean() < 0.5 * far


def test_it_cannot_have_more_units_than_there_are(
    tiny_config: Config, batches: list[Batch]
) -> None:
    for units in (0, 65):
        with pytest.raises(ValueError, match=f"got {units} units, expected 1 to 64"):
            narrowed(_student(tiny_config(12)), units, batches)
