"""Checkpoints: what is saved comes back, a kill loses nothing, and damage has a name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loquent.models.checkpoint import (
    CheckpointError,
    load_checkpoint,
    read_tensors,
    recover,
    save_checkpoint,
    shrink,
)
from loquent.models.student import Student, StudentConfig
from loquent.models.tokens import Tokenizer

Config = Callable[[int], StudentConfig]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["ba kiwi lo mu"] * 9, 12)


@pytest.fixture(scope="module")
def student(tiny_config: Config, tokenizer: Tokenizer) -> Student:
    torch.manual_seed(0)
    return Student(tiny_config(tokenizer.size)).eval()


@pytest.fixture
def folder(student: Student, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "run" / "last"
    weights = dict(student.named_parameters())
    save_checkpoint(path, student.config, tokenizer, weights, {"progress": {"step": 3}})
    return path


def test_round_trip(folder: Path, student: Student, tokenizer: Tokenizer) -> None:
    checkpoint = load_checkpoint(folder)
    assert checkpoint.student.config == student.config
    assert not checkpoint.student.training
    assert checkpoint.tokenizer.pieces() == tokenizer.pieces()
    assert checkpoint.state == {"progress": {"step": 3}}
    for (name, a), (_, b) in zip(
        student.state_dict().items(), checkpoint.student.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    x = torch.randn(1, 33, 80)
    torch.testing.assert_close(
        checkpoint.student(x, torch.tensor([32]), 16, 0)[0],
        student(x, torch.tensor([32]), 16, 0)[0],
    )


def test_half_precision_comes_back_as_float(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(2).half(), "b": torch.ones(2).bfloat16(), "n": torch.ones(1)}, path)
    assert {t.dtype for t in read_tensors(path).values()} == {torch.float32}


def test_small_weights_come_back_as_float(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    torch.manual_seed(0)
    tensors = {
        "matrix": torch.randn(32, 128) * torch.logspace(-6, 2, 32)[:, None],
        "kernel": torch.randn(16, 128, 3),
        "bias": torch.randn(5000),
        "little": torch.randn(4, 4),
    }
    tensors["matrix"][7] = 0
    save_file(shrink(tensors), path)
    assert path.stat().st_size < 32 * 128 + 16 * 128 * 3 + 2 * 5000 + 1000
    back = read_tensors(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        row = tensor.flatten(1) if tensor.dim() > 1 else tensor[None]
        error = (back[name] - tensor).reshape(row.shape).abs()
        assert bool((error <= row.abs().amax(1, keepdim=True) * 0.005 + 1e-7).all()), name
    stored = shrink(tensors)
    del stored["kernel.scale"]
    save_file(stored, path)
    with pytest.raises(CheckpointError, match=r"kernel is int8, but there is no kernel\.scale"):
        read_tensors(path)


def test_only_what_was_asked_for_is_written(folder: Path) -> None:
    assert sorted(f.name for f in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "state.json",
        "tokens.spm",
    ]
    assert [f.name for f in folder.parent.iterdir()] == ["last"]


# Damage


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", r"config\.json: cannot be read as JSON"),
        ("state.json", r"state\.json: cannot be read as JSON"),
        ("model.safetensors", r"model\.safetensors: cannot be read as safetensors"),
        ("tokens.spm", r"tokens\.spm: no subword model"),
    ],
)
@pytest.mark.parametrize("damage", ["garbage", "empty", "truncated"])
def test_a_damaged_file_is_named(folder: Path, file: str, message: str, damage: str) -> None:
    path = folder / file
    data = path.read_bytes()
    path.write_bytes(
        {"garbage": b"\xff\xfe nothing", "empty": b"", "truncated": data[: len(data) // 2]}[damage]
    )
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("file", ["state.json", "model.safetensors", "tokens.spm"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(folder)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json; expected a checkpoint folder as"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"gone: no config\.json"):
        load_checkpoint(tmp_path / "gone")


def test_parts_that_do_not_belong_together_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())

    def change(**changes: object) -> None:
        (folder / "config.json").write_text(json.dumps(config | changes))

    change(vocab=99)
    with pytest.raises(CheckpointError, match=r"(?s)weights do not fit config\.json.*\[99"):
        load_checkpoint(folder)
    change(colour="red")
    with pytest.raises(CheckpointError, match=r"not a student's shape .*colour"):
        load_checkpoint(folder)
    change(encoder=None)
    with pytest.raises(CheckpointError, match="not a student's shape"):
        load_checkpoint(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="got a list, expected a JSON object"):
        load_checkpoint(folder)
    change()
    (folder / "tokens.spm").write_bytes(Tokenizer.train(["ba kiwi lo mu"] * 9, 13).model)
    with pytest.raises(CheckpointError, match="got 13 subwords, expected 12"):
        load_checkpoint(folder)


def test_missing_and_unexpected_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({n: t for n, t in weights.items() if n != "ctc.bias"}, path)
    with pytest.raises(CheckpointError, match=r"(?s)Missing.*ctc\.bias"):
        load_checkpoint(folder)
    save_file(weights | {"more": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"(?s)Unexpected.*more"):
        load_checkpoint(folder)


# Kills

# Saves over an old checkpoint again and again; the n-th time the process ends, as if killed, at the
# n-th thing it does to the file system. Prints what can be loaded afterwards.
KILLED_SAVES = """
import json, os, shutil, sys
from pathlib import Path
import torch
from loquent.models.checkpoint import load_checkpoint, read_tensors, save_checkpoint
from loquent.models.student import Student

torch.set_num_threads(1)
root = Path(sys.argv[1])
old = load_checkpoint(root / "old")
weights = dict(old.student.named_parameters())
changed = {name: torch.full_like(p, 7.0) for name, p in weights.items()}
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def save(folder, tensors, step):
    save_checkpoint(
        folder, old.student.config, old.tokenizer, tensors, {"step": step}, raw=tensors
    )


for n in range(1000):
    folder = root / str(n) / "last"
    save(folder, weights, 1)
    child = os.fork()
    if child == 0:
        seen = 0

        def die(event, arguments):
            global seen
            if event in EVENTS:
                seen += 1
                if seen > n:
                    os._exit(9)

        sys.addaudithook(die)
        save(folder, changed, 2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    checkpoint = load_checkpoint(folder)
    value = checkpoint.student.ctc.bias[0].item()
    raw = read_tensors(folder / "raw.safetensors")["ctc.bias"][0].item()
    step = checkpoint.state["step"]
    whole = (value == raw == 7.0) if step == 2 else (value == raw != 7.0)
    save(folder, changed, 3)  # and the next save works
    assert load_checkpoint(folder).state["step"] == 3
    left = sorted(f.name for f in folder.parent.iterdir())
    print(json.dumps({"code": code, "step": step, "whole": whole, "left": left}), flush=True)
    shutil.rmtree(root / str(n))
    if code == 0:
        break
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one_whole(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "old")
    done = subprocess.run(
        [sys.executable, "-c", KILLED_SAVES, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) > 12
    assert [row["code"] for row in rows] == [9] * (len(rows) - 1) + [0]
    assert all(row["whole"] for row in rows)
    # The old one until some moment, from then on the new one.
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)
    assert {1, 2} == set(steps)
    assert all(row["left"] == ["last"] for row in rows)


def test_recover_does_nothing_without_need(folder: Path) -> None:
    before = sorted(folder.iterdir())
    recover(folder)
    assert sorted(folder.iterdir()) == before
    recover(folder.with_name("gone"))
    assert not folder.with_name("gone").exists()
