"""Each term of distillation against a naive implementation, its gradient, and the cache on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from loquent.models.checkpoint import CheckpointError
from loquent.models.data import Utterance, collate
from loquent.models.distillation import (
    Distillation,
    Said,
    Signals,
    collate_signals,
    delayed_ctc,
    feature_distance,
    full_sum,
    lattice,
    resample,
    same_frames,
    three_way,
)
from loquent.models.posteriors import Posteriors, PosteriorWriter
from loquent.models.student import Student, StudentConfig
from loquent.models.tokens import Tokenizer
from loquent.models.training import Drawn, Objective, TrainConfig
from loquent.models.transducer import transducer_loss

B, N, V, K = 3, 7, 6, 4


def signals_of(seed: int = 0, dtype: torch.dtype = torch.float64) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    logs = torch.log_softmax(3 * torch.randn(B, N, V, generator=generator, dtype=dtype), -1)
    top = logs.topk(K)
    real = torch.ones(B, N, dtype=torch.bool)
    real[1, 5:] = False  # shorter
    real[2] = False  # the teacher does not know this one
    return Signals(
        ids_BNK=top.indices,
        logs_BNK=top.values.log_softmax(-1),
        real_BN=real,
        text_B=torch.tensor([-3.0, torch.nan, -7.5], dtype=dtype),
    )


def log_probs(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(B, N, V, generator=generator, dtype=torch.float64), -1)


def test_same_frames_is_the_divergence_of_the_real_frames() -> None:
    own, theirs = log_probs(1).requires_grad_(), log_probs(2)
    frames = torch.tensor([N, 4, 0])
    got = same_frames(own, theirs, frames)
    for b, count in enumerate(frames.tolist()):
        expected = sum(
            math.exp(theirs[b, n, v]) * (theirs[b, n, v] - own[b, n, v]).item()
            for n in range(count)
            for v in range(V)
        )
        assert got[b].item() == pytest.approx(expected)
    assert same_frames(theirs, theirs, frames).abs().max() < 1e-12
    got.sum().backward()
    assert own.grad is not None
    assert not own.grad[1, 4:].any()
    assert own.grad[1, :4].all()


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_delayed_ctc_is_the_best_of_all_delays(delay: int) -> None:
    signals, own, frames = signals_of(), log_probs(), torch.tensor([7, 5, 7])
    got = delayed_ctc(own, signals, frames, delay)
    for b in range(B):
        heard = [n for n in range(N) if signals.real_BN[b, n] and n < frames[b]]
        means = []
        for d in range(delay + 1):
            costs = []
            for n in heard:
                if n + d >= frames[b]:
                    continue
                cost = 0.0
                for k in range(K):
                    log = float(signals.logs_BNK[b, n, k])
                    cost += math.exp(log) * (log - float(own[b, n + d, signals.ids_BNK[b, n, k]]))
                costs.append(cost)
            means += [sum(costs) / len(costs)] if costs else []
        expected = min(means) * len(heard) if means else 0.0
        assert float(got[b]) == pytest.approx(expected)


def test_a_student_that_lags_costs_nothing_within_the_delay() -> None:
    signals = signals_of()
    full = torch.full((1, N, V), -1e4, dtype=torch.float64)
    full.scatter_(2, signals.ids_BNK[:1], signals.logs_BNK[:1])
    one = Signals(
        ids_BNK=signals.ids_BNK[:1],
        logs_BNK=signals.logs_BNK[:1],
        real_BN=signals.real_BN[:1],
        text_B=signals.text_B[:1],
    )
    late = torch.cat([full[:, :1], full[:, :1], full[:, :-2]], dim=1)
    frames = torch.tensor([N])
    assert float(delayed_ctc(late, one, frames, 2)) == pytest.approx(0.0, abs=1e-9)
    assert float(delayed_ctc(late, one, frames, 1)) > 1.0


def test_delayed_ctc_gradient() -> None:
    signals, frames = signals_of(), torch.tensor([7, 5, 7])
    x = torch.randn(B, N, V, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: delayed_ctc(x.log_softmax(-1), signals, frames, 2), (x,)
    )


def test_full_sum_skips_unknown_texts() -> None:
    own = torch.tensor([-1.0, -2.0, -9.0], dtype=torch.float64, requires_grad=True)
    signals = signals_of()
    assert full_sum(own, signals.text_B).tolist() == [2.0, 0.0, 1.5]
    assert torch.autograd.gradcheck(lambda x: full_sum(x, signals.text_B), (own,))


def test_feature_distance() -> None:
    real = signals_of().real_BN
    own = torch.randn(B, N, 5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(B, N, 5, dtype=torch.float64)
    a, b = own.detach()[real].numpy(), other[real].numpy()
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    plain = own.detach()
    assert float(feature_distance(plain, other, real, "cosine")) == pytest.approx(
        (1 - cosine).sum()
    )
    expected = ((a - b) ** 2).mean(1).sum()
    assert float(feature_distance(plain, other, real, "l2")) == pytest.approx(expected)
    assert float(feature_distance(other * 3, other, real, "cosine")) == pytest.approx(0, abs=1e-9)
    for metric in ("cosine", "l2"):
        assert torch.autograd.gradcheck(
            lambda x, m=metric: feature_distance(x, other, real, m), (own,)
        )


def test_lattice_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    own, other = (2 * torch.randn(2, 4, 3, V, generator=generator) for _ in range(2))
    targets, frames, lengths = torch.tensor([[2, 3], [4, 0]]), [4, 3], [2, 1]
    args = torch.tensor(frames), torch.tensor(lengths)
    same, theirs = (three_way(x, targets, args[1], 0) for x in (own, other))
    got = lattice(same, theirs, *args)
    for b in range(2):
        total = 0.0
        for n in range(frames[b]):
            for u in range(lengths[b] + 1):
                p, q = (x[b, n, u].softmax(-1).tolist() for x in (other, own))
                tokens = [0] if u == lengths[b] else [0, int(targets[b, u])]
                parts = [(p[t], q[t]) for t in tokens]
                parts.append((1 - sum(x for x, _ in parts), 1 - sum(y for _, y in parts)))
                total += sum(x * math.log(x / y) for x, y in parts)
        assert float(got[b]) == pytest.approx(total / (lengths[b] + 1), rel=1e-4)
    assert lattice(same, same, *args).abs().max() < 1e-5


def test_lattice_gradient() -> None:
    targets, lengths, frames = torch.tensor([[2, 3]]), torch.tensor([2]), torch.tensor([3])
    generator = torch.Generator().manual_seed(3)
    x, other = (torch.randn(1, 3, 3, V, generator=generator) for _ in range(2))
    theirs = three_way(other, targets, lengths, 0)

    def loss(x: Tensor) -> Tensor:
        return lattice(three_way(x, targets, lengths, 0), theirs, frames, lengths).sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    for at in ((0, 1, 1, 3), (0, 2, 2, 0), (0, 0, 0, 5)):
        step = torch.zeros_like(x)
        step[at] = 1e-2
        slope = (loss(x + step) - loss(x - step)).item() / 2e-2
        assert float(gradient[at]) == pytest.approx(slope, rel=2e-2, abs=1e-4)


# Latency of the transducer


def naive_transducer(logs: Tensor, target: list[int], penalty: float) -> float:
    frames = len(logs)
    alpha = {(0, 0): 0.0}

    def add(key: tuple[int, int], value: float) -> None:
        alpha[key] = float(np.logaddexp(alpha.get(key, -np.inf), value))

    for n in range(frames):
        for u in range(len(target) + 1):
            here = alpha[n, u]
            if u < len(target):
                gain = penalty * ((frames - 1) / 2 - n)
                add((n, u + 1), here + float(logs[n, u, target[u]]) + gain)
            add((n + 1, u), here + float(logs[n, u, 0]))
    return -alpha[frames, len(target)]


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_delay_penalty_against_loops(penalty: float) -> None:
    logits = torch.randn(2, 5, 4, V, requires_grad=True)
    targets, frames, lengths = torch.tensor([[1, 2, 3], [4, 5, 0]]), [5, 4], [3, 2]
    args = targets, torch.tensor(frames), torch.tensor(lengths), 0, penalty
    got = transducer_loss(logits, *args)
    costs = got.tolist()
    for b in range(2):
        logs = logits[b, : frames[b]].log_softmax(-1).detach()
        expected = naive_transducer(logs, targets[b, : lengths[b]].tolist(), penalty)
        assert costs[b] == pytest.approx(expected, rel=1e-4)
    # What an accelerator runs gives the same, gradient included.
    from loquent.models.transducer import _torchaudio_loss

    (ours,) = torch.autograd.grad(got.sum(), logits)
    (theirs,) = torch.autograd.grad(_torchaudio_loss(logits, *args).sum(), logits)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_the_penalty_favours_early_tokens() -> None:
    """Of two lattices, each with one sure path, the early one costs less."""
    costs = {}
    for frame in (0, 3):
        logits = torch.zeros(1, 4, 2, 3)
        logits[..., 0] = 20.0
        logits[0, frame, 0] = torch.tensor([0.0, 20.0, 0.0])
        args = torch.tensor([[1]]), torch.tensor([4]), torch.tensor([1]), 0
        costs[frame] = [float(transducer_loss(logits, *args, p)) for p in (0.0, 0.2)]
    assert costs[0][0] == pytest.approx(costs[3][0], abs=1e-3)
    assert costs[3][1] - costs[0][1] == pytest.approx(0.2 * 3, abs=1e-3)


# Bringing a teacher to the student's frames


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=60)
def test_resampling_keeps_every_spike(frames: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blank = np.zeros(frames)
    # Spikes farther apart than the frames that fall into one.
    spikes = np.arange(int(rng.integers(0, 3)), frames, 2 * -(-frames // count))
    blank[spikes] = -5.0
    at = resample(blank, count)
    assert len(at) == count
    assert (np.diff(at) >= 0).all()
    assert at.min() >= 0
    assert at.max() < frames
    if frames >= count:
        assert set(spikes) <= set(at.tolist())


def said(frames: int, offset: int, features: bool = False) -> Said:
    ids = np.arange(offset, offset + frames)[:, None] + np.zeros((1, 2), int)
    logs = np.log(np.full((frames, 2), 0.5))
    wide = np.linspace(0, 1, frames, dtype=np.float16)[:, None] if features else None
    return Said(ids_NK=ids, logs_NK=logs, blank_N=np.zeros(frames), text=-1.0, features_NE=wide)


def test_joined_utterances_stand_side_by_side() -> None:
    rows = [
        [(said(5, 10, True), 0, 20), (said(3, 50, True), 0, 12)],
        [(None, 0, 8), (said(2, 70, True), 4, 8)],
    ]
    signals = collate_signals(rows, 8, 4)
    assert signals is not None
    assert signals.ids_BNK[0, :, 0].tolist() == [10, 11, 12, 13, 14, 50, 51, 52]
    assert signals.ids_BNK[1, 3:5, 0].tolist() == [70, 71]
    assert signals.real_BN[1].tolist() == [False] * 3 + [True] * 2 + [False] * 3
    assert signals.text_B[0] == -2.0
    assert torch.isnan(signals.text_B[1])
    assert signals.features_BNE is not None
    expected = torch.linspace(0, 1, 5)[:, None]
    torch.testing.assert_close(signals.features_BNE[0, :5], expected, atol=1e-3, rtol=0)
    assert collate_signals([[(None, 0, 8)]], 2, 4) is None


def test_batches_name_the_same_terms_heard_or_not(
    tiny_config: Callable[[int], StudentConfig],
) -> None:
    """Processes add up what they log, name by name; one more or less would hang them all."""
    torch.manual_seed(0)
    distil = Distillation(ctc=1.0, full_sum=0.5, features=0.5)
    config = TrainConfig(steps=1, rnnt_from=0, distil=distil)
    objective = Objective(Student(tiny_config(12)), config, teacher_width=1)
    batch = collate([torch.randn(32, 80)], [[1, 2]], [0], torch.zeros(80), multiple=4, room=1)
    signals = collate_signals([[(said(8, 1, True), 0, 32)]], 8, 4)
    with torch.no_grad():
        heard = objective(Drawn(batch, 16, 0, signals), 0)
        unheard = objective(Drawn(batch, 16, 0), 0)
    assert heard.keys() == unheard.keys() >= {"kd_ctc", "kd_text", "kd_features"}
    assert float(heard["kd_features"]) > 0
    assert float(unheard["kd_features"]) == 0
    assert float(unheard["loss"]) < float(heard["loss"])


# The cache


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["ba lo mu", "kiwi lo ba", "mu ba kiwi"], 12)


def utterance(i: int) -> Utterance:
    return Utterance(audio=Path(f"/nowhere/{i}.wav"), text="ba", source="s", duration=1.0)


def outputs(i: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(i)
    logs = torch.log_softmax(torch.from_numpy(4 * rng.standard_normal((5 + i, vocab))), -1)
    return logs.numpy().astype(np.float32), rng.standard_normal((5 + i, 3)).astype(np.float32)


def write(folder: Path, tokenizer: Tokenizer, which: range, **changes: int) -> None:
    with PosteriorWriter(folder, tokenizer, {"by": "t"}, **{"kept": 4, "width": 3, **changes}) as w:
        for i in which:
            if str(utterance(i).audio) not in w.done:
                logs, features = outputs(i, tokenizer.size)
                w.add([utterance(i)], [logs], [features], [{"text_log": -float(i)}])


def test_the_cache_gives_back_what_went_in(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, tokenizer, range(4))
    cache = Posteriors(tmp_path)
    assert len(cache) == 4
    assert cache.tokenizer.model == tokenizer.model
    logs, features = outputs(2, tokenizer.size)
    got = cache.get(utterance(2))
    assert got is not None
    order = np.argsort(-logs, axis=1)[:, :4]
    assert np.array_equal(got.ids_NK, order)
    kept = np.take_along_axis(logs, order, 1)
    kept = kept - np.log(np.exp(kept).sum(1, keepdims=True))
    np.testing.assert_allclose(got.logs_NK, kept, atol=0.02)
    np.testing.assert_allclose(got.blank_N, logs[:, 0], rtol=1e-3)
    assert got.features_NE is not None
    np.testing.assert_allclose(got.features_NE, features, atol=2e-3)
    assert got.text == -2.0
    assert cache.get(utterance(9)) is None


def test_a_killed_cache_goes_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "whole", tokenizer, range(6))
    write(tmp_path / "cut", tokenizer, range(3))
    # Killed in the middle of the fourth: data without their line, and half a line.
    for name in ("logs.bin", "features.bin"):
        with (tmp_path / "cut" / name).open("ab") as file:
            file.write(b"half a rec")
    with (tmp_path / "cut" / "index.jsonl").open("a") as file:
        file.write('{"audio": "/nowhe')
    assert len(Posteriors(tmp_path / "cut")) == 3
    write(tmp_path / "cut", tokenizer, range(6))
    for name in ("logs.bin", "features.bin", "index.jsonl", "teacher.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_cache_of_another_teacher_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path, tokenizer, range(1))
    with pytest.raises(CheckpointError, match="another teacher or of other settings"):
        write(tmp_path, tokenizer, range(1), kept=3)
    with pytest.raises(CheckpointError, match=r"no teacher\.json; expected a folder"):
        Posteriors(tmp_path / "gone")
    assert json.loads((tmp_path / "teacher.json").read_text())["by"] == "t"


def test_terms_do_not_touch_what_the_teacher_does_not_know() -> None:
    signals = signals_of()
    x = torch.randn(B, N, V, dtype=torch.float64, requires_grad=True)
    loss = delayed_ctc(F.log_softmax(x, -1), signals, torch.tensor([7, 5, 7]), 2)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert not gradient[2].any()
    assert gradient[0].any()


def test_a_map_to_a_teacher_of_another_width_learns_alone_at_first(
    tiny_config: Callable[[int], StudentConfig],
) -> None:
    torch.manual_seed(0)
    distil = Distillation(features=1.0, metric="l2")
    config = TrainConfig(steps=9, warmup=2, rnnt_from=9, distil=distil)
    batch = collate([torch.randn(32, 80)], [[1, 2]], [0], torch.zeros(80), multiple=4, room=1)
    signals = collate_signals([[(said(8, 1, True), 0, 32)]], 8, 4)
    for step, pulls in ((3, False), (4, True)):
        objective = Objective(Student(tiny_config(12)), config, teacher_width=1)
        assert objective.features is not None
        objective(Drawn(batch, 16, 0, signals), step)["kd_features"].backward()
        assert objective.features.weight.grad is not None
        encoder = objective.student.encoder.parameters()
        assert any(p.grad is not None and bool(p.grad.any()) for p in encoder) == pulls
