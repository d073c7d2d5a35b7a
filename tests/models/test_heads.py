"""Heads that learn alone, on what a teacher's encoder has said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from loquent.models.data import DataError, Utterance
from loquent.models.heads import learn_heads
from loquent.models.posteriors import Posteriors, PosteriorWriter
from loquent.models.scoring import ctc_greedy
from loquent.models.student import Student, StudentConfig
from loquent.models.tokens import Tokenizer

TEXTS = ["ba lo mu", "kiwi lo ba", "mu ba kiwi", "lo", "mu mu kiwi ba"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 12)


def utterances() -> list[Utterance]:
    return [
        Utterance(audio=Path(f"/nowhere/{i}.wav"), text=text, source="s", duration=1.0)
        for i, text in enumerate(TEXTS)
    ]


def encoded(tokens: list[int], width: int) -> np.ndarray:
    """Two frames a token, each token a direction of its own."""
    directions = np.random.default_rng(0).standard_normal((40, width)).astype(np.float32)
    frames = [directions[39]]
    for token in tokens:
        frames += [directions[token], directions[39]]
    return np.stack(frames)


def write(folder: Path, tokenizer: Tokenizer, width: int, which: list[Utterance]) -> Posteriors:
    with PosteriorWriter(folder, tokenizer, {"by": "t"}, kept=1, width=width) as writer:
        for u in which:
            features = encoded(tokenizer.encode(u.text), width)
            logs = np.full((len(features), tokenizer.size), -3.0, np.float32)
            writer.add([u], [logs], [features] if width else None, [{}])
    return Posteriors(folder)


def test_heads_read_what_the_teacher_said(
    tiny_config: Callable[[int], StudentConfig], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    student = Student(tiny_config(tokenizer.size))
    width = student.config.encoder.width
    rows = utterances()
    # The teacher has not heard the last one.
    heard = write(tmp_path, tokenizer, width, rows[:-1])
    targets = [tokenizer.encode(u.text) for u in rows]
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    ends = learn_heads(student, heard, rows, targets, steps=300)
    for name, p in student.named_parameters():
        assert p.requires_grad
        assert torch.equal(p, before[name]) == name.startswith("encoder."), name
    assert ends["ctc"] < 1.0  # nats a token, smoothed over the steps before
    assert ends["rnnt"] < 1.0
    for u in rows[:-1]:
        with torch.no_grad():
            x = torch.from_numpy(encoded(tokenizer.encode(u.text), width))[None]
            best = student.ctc_log_probs(x)[0].argmax(-1)
        assert tokenizer.decode(ctc_greedy(best.tolist(), 0)) == u.text


def test_the_same_twice(
    tiny_config: Callable[[int], StudentConfig], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = utterances()
    targets = [tokenizer.encode(u.text) for u in rows]
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        student = Student(tiny_config(tokenizer.size))
        heard = write(tmp_path, tokenizer, student.config.encoder.width, rows)
        learn_heads(student, heard, rows, targets, steps=5)
        results.append(student.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_mistakes(
    tiny_config: Callable[[int], StudentConfig], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    student = Student(tiny_config(tokenizer.size))
    width = student.config.encoder.width
    rows = utterances()
    targets = [tokenizer.encode(u.text) for u in rows]
    for name, kept, message in (
        ("other", width + 1, rf"of width {width + 1}, expected the student's {width}"),
        ("none", 0, "not kept"),
    ):
        heard = write(tmp_path / name, tokenizer, kept, rows[:1])
        with pytest.raises(DataError, match=message):
            learn_heads(student, heard, rows, targets, steps=1)
    heard = write(tmp_path / "right", tokenizer, width, rows[:1])
    with pytest.raises(DataError, match="heard none of the utterances"):
        learn_heads(student, heard, rows[1:], targets[1:], steps=1)
