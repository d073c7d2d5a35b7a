"""A toy student, trained here in seconds, and the bundles that the command line makes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loquent.engine.bundle import Bundle
from loquent.engine.features import kaldi_spec, whisper_spec
from loquent.export import cli
from loquent.export.bundle import BundleSpec, write_bundle
from loquent.models.data import Augment, FeatureCache, read_manifest
from loquent.models.student import Student, StudentConfig
from loquent.models.tokens import Tokenizer
from loquent.models.training import TrainConfig, Trainer
from loquent.models.transducer import PredictorConfig


def _shapes() -> Any:
    path = Path(__file__).parent.parent / "models" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_shapes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shapes = _shapes()
_one_thread = shapes._one_thread
corpus = shapes.corpus


VOCAB = 11


def _student_config(name: str) -> StudentConfig:
    encoder = shapes.ENCODERS["whisper" if name == "whisper" else "everything"]
    if name in ("torchaudio", "ctc-only"):
        encoder = shapes.ENCODERS["stack-projected"]
    config = StudentConfig(encoder=encoder, vocab=VOCAB, joiner_dim=16)
    if name == "torchaudio":
        return dataclasses.replace(
            config,
            blank=VOCAB - 1,
            joiner_dim=24,
            encoder_projection=False,
            joiner_activation="relu",
            predictor=PredictorConfig(kind="lstm", embedding=8, layers=2, hidden=12),
            ctc=False,
        )
    if name == "ctc-only":
        layers = dataclasses.replace(encoder.emformer, layers=1)
        encoder = dataclasses.replace(encoder, emformer=layers)
        return dataclasses.replace(config, encoder=encoder, joiner_dim=0)
    return config


@pytest.fixture(scope="session")
def student_of() -> Callable[[str], Student]:
    """A student by name (whisper, everything, torchaudio, ctc-only) with random weights."""

    def student(name: str) -> Student:
        torch.manual_seed(0)
        student = Student(_student_config(name))
        shapes._perturb(student)
        return student.eval()

    return student


@pytest.fixture(scope="session")
def bundle_spec() -> BundleSpec:
    """For the students of ``student_of``."""
    return BundleSpec(
        name="t",
        features=kaldi_spec(n_mels=8),
        pieces=[f"▁p{i}" for i in range(VOCAB)],
        spm=None,
        licence="none",
    )


@pytest.fixture(scope="session")
def bundle_of(
    student_of: Callable[[str], Student],
    bundle_spec: BundleSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Student, Bundle, Path]]:
    """Such a student, its bundle and where that lies; exported once, for that takes seconds."""

    @functools.cache
    def written(name: str) -> tuple[Student, Bundle, Path]:
        student = student_of(name)
        folder = tmp_path_factory.mktemp("bundle") / name
        decoder = "rnnt" if student.config.joiner_dim else "ctc"
        spec = dataclasses.replace(bundle_spec, default_decoder=decoder)
        return student, write_bundle(student, spec, folder), folder

    return written


@pytest.fixture(scope="session")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that has learnt the toy corpus by heart."""
    folder = tmp_path_factory.mktemp("run")
    rows = read_manifest(corpus)
    tokenizer = Tokenizer.train([u.text for u in rows], 16)  # every word is a piece
    torch.manual_seed(0)
    student = Student(shapes.tiny_student(tokenizer.size))
    cache = FeatureCache(rows, whisper_spec(), corpus.parent / "features", workers=1)
    config = TrainConfig(
        steps=400,
        batch_seconds=8,
        lr=0.01,
        head_lr=0.005,
        warmup=20,
        rnnt_from=30,
        ctc_weight=0.3,
        ema=0.95,
        segments=((8, 0.3), (32, 0.7)),
        right_contexts=((0, 0.5), (4, 0.5)),
        save_every=400,
        eval_every=100,
        bf16=False,
        augment=Augment(tempo=0.05, warp=0.0, gain=3.0, freq_masks=0, time_masks=0),
    )
    origin = {"start": "random weights"}
    Trainer(folder, student, tokenizer, cache, cache, [1.0] * len(rows), config, origin).fit()
    return folder


@dataclass(frozen=True)
class Exported:
    """What ``loquent export`` wrote and said."""

    folder: Path
    out: str


Export = Callable[..., Exported]


@pytest.fixture(scope="session")
def export(run: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Runs ``loquent export`` on the toy run."""

    def export_it(*options: str) -> Exported:
        folder = tmp_path_factory.mktemp("bundles") / "toy"
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = cli.main(
                [
                    str(run / "last"),
                    *("-o", str(folder)),
                    *("--weights", str(folder.with_name("weights"))),
                    *("--dev", str(corpus)),
                    *options,
                ]
            )
        assert status == 0
        return Exported(folder, out.getvalue())

    return export_it


@pytest.fixture(scope="session")
def fp32(export: Export) -> Exported:
    """The float bundle of the toy run."""
    return export("--name", "toy", "--licence", "none", "--decoder", "ctc")


@pytest.fixture(scope="session")
def int8(export: Export) -> Exported:
    """Its int8 bundle, through the gate."""
    return export("--name", "toy", "--int8")
