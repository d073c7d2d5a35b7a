"""Several processes train as one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loquent.models.checkpoint import read_tensors

GRADIENTS = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
import conftest as shapes
from loquent.engine.features import whisper_spec
from loquent.models.data import FeatureCache, read_manifest
from loquent.models.student import Student
from loquent.models.tokens import Tokenizer
from loquent.models.training import TrainConfig, Trainer

torch.set_num_threads(1)
corpus, out, accumulate = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
rows = read_manifest(corpus)
tokenizer = Tokenizer.train([u.text for u in rows], 12)
torch.manual_seed(0)
cache = FeatureCache(rows, whisper_spec(), corpus.parent / "features", workers=1)
config = TrainConfig(steps=2, batch_seconds=6, bf16=False, accumulate=accumulate, rnnt_from=1)
trainer = Trainer(out / "run", Student(shapes.tiny_student(tokenizer.size)), tokenizer, cache,
                  cache, [1.0] * len(rows), config, {})
parts = trainer._parts()
for _ in range(2):  # without and with the transducer, whose gradients are missing at first
    step, mine = next(parts)
    shown = trainer._update(step, mine)
if trainer.devices.rank == 0:
    found = {n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}
    save_file(found | {"norm": torch.tensor(shown["norm"])}, out / "gradients.safetensors")
"""


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(corpus: Path, tmp_path: Path) -> None:
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    results = {}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    for name, launch, accumulate in (
        ("one", [sys.executable], 4),
        ("two", [*torchrun, "2"], 2),
    ):
        out = tmp_path / name
        out.mkdir()
        words = [str(script), str(Path(__file__).parent), str(corpus), str(out), str(accumulate)]
        done = subprocess.run(
            [*launch, *words], check=False, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results[name] = read_tensors(out / "gradients.safetensors")
    assert results["one"].keys() == results["two"].keys()
    assert float(results["one"]["norm"]) > 0.1
    for name, gradient in results["one"].items():
        torch.testing.assert_close(results["two"][name], gradient, rtol=1e-3, atol=1e-5)
