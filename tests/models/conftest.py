"""Tiny seeded models and a toy corpus whose words are tones. ``tests/export`` uses them too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from torch import nn

from loquent.models.emformer import EmformerConfig
from loquent.models.encoder import Encoder, EncoderConfig
from loquent.models.frontend import FrontendConfig
from loquent.models.student import StudentConfig
from loquent.models.transducer import PredictorConfig

Float32 = NDArray[np.float32]

FEATURES = 8
TONES = {"ba": 400, "kiwi": 900, "lo": 1500, "mu": 2400}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def _perturb(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)


@pytest.fixture
def perturb() -> Callable[[nn.Module], None]:
    """Moves every parameter off the 0 or 1 that it starts from, behind which a mistake hides."""
    return _perturb


# Encoders


def _front(**changes: object) -> FrontendConfig:
    return dataclasses.replace(
        FrontendConfig(kind="conv", features=FEATURES, dim=32),
        **changes,  # type: ignore[arg-type]
    )


def _layers(**changes: object) -> EmformerConfig:
    return dataclasses.replace(
        EmformerConfig(dim=32, heads=4, ffn_dim=48, layers=2, left_context=6),
        **changes,  # type: ignore[arg-type]
    )


# Positions count modulo 11 here, so that they wrap around within a test.
_WHISPER = _front(strides=(1, 2), positions=11)
_PLAIN = _layers(activation="gelu", output_norm=False)
ENCODERS = {
    "stack": EncoderConfig(frontend=_front(kind="stack"), emformer=_layers()),
    "stack-projected": EncoderConfig(
        frontend=_front(kind="stack", strides=(2, 1)), emformer=_layers(), output_dim=24
    ),
    "memory": EncoderConfig(frontend=_front(kind="stack"), emformer=_layers(memory=3)),
    "conv-module": EncoderConfig(
        frontend=_front(kind="stack", strides=(1, 1)),
        emformer=_layers(conv_kernel=5, activation="silu"),
    ),
    "subsampling": EncoderConfig(frontend=_front(), emformer=_layers()),
    "everything": EncoderConfig(
        frontend=_front(positions=7), emformer=_layers(memory=2, conv_kernel=3), output_dim=16
    ),
    "stride-1": EncoderConfig(frontend=_front(strides=(1, 1)), emformer=_layers()),
    "stride-2-1": EncoderConfig(frontend=_front(strides=(2, 1)), emformer=_layers()),
    "whisper": EncoderConfig(frontend=_WHISPER, emformer=_PLAIN, pool=2, final_norm=True),
    "whisper-pooled-first": EncoderConfig(
        frontend=_WHISPER, emformer=_PLAIN, pool=2, pool_first=True, final_norm=True
    ),
    "whisper-memory-conv": EncoderConfig(
        frontend=_WHISPER,
        emformer=dataclasses.replace(_PLAIN, memory=3, conv_kernel=4),
        pool=2,
        final_norm=True,
    ),
}


def make_encoder(config: EncoderConfig) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(config)
    _perturb(encoder)
    return encoder.eval()


@pytest.fixture(scope="session", params=ENCODERS.values(), ids=ENCODERS.keys())
def encoder(request: pytest.FixtureRequest) -> Encoder:
    """Each kind of encoder in turn, with random weights."""
    return make_encoder(request.param)


# A student for features of 80 mels, and recordings that it can learn in seconds


def tiny_student(vocab: int) -> StudentConfig:
    """The shipped student's shape, but tiny."""
    return StudentConfig(
        encoder=EncoderConfig(
            frontend=FrontendConfig(
                kind="conv", features=80, dim=32, strides=(1, 2), positions=1500
            ),
            emformer=EmformerConfig(
                dim=32,
                heads=2,
                ffn_dim=64,
                layers=2,
                left_context=32,
                activation="gelu",
                output_norm=False,
            ),
            pool=2,
            final_norm=True,
        ),
        vocab=vocab,
        joiner_dim=32,
        predictor=PredictorConfig(embedding=32),
    )


@pytest.fixture(scope="session")
def tiny_config() -> Callable[[int], StudentConfig]:
    """Shape of a tiny student, given the size of the vocabulary."""
    return tiny_student


def _say(text: str, rng: np.random.Generator) -> Float32:
    time = np.arange(round(0.16 * 16000)) / 16000
    envelope = 0.3 * np.hanning(len(time)) ** 0.3
    parts = [np.zeros(3200)]
    for word in text.split():
        parts += [envelope * np.sin(2 * np.pi * TONES[word] * time), np.zeros(2400)]
    pcm = np.concatenate([*parts, np.zeros(3200)])
    return (pcm + 0.003 * rng.standard_normal(len(pcm))).astype(np.float32)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of 24 recordings of three words each."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        text = " ".join(rng.permutation(list(TONES))[:3])
        pcm = _say(text, rng)
        soundfile.write(folder / f"{i}.wav", pcm, 16000)
        rows.append(
            {
                "audio": f"{i}.wav",
                "text": text,
                "duration": len(pcm) / 16000,
                "source": "even" if i % 2 == 0 else "odd",
                "licence": "CC0-1.0",
            }
        )
    manifest = folder / "corpus.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest
