"""Two tiny models: real ONNX graphs in real bundles, no training and no torch.

``tiny`` hears tones: every one of ``TONES`` is a token of ``PIECES``, silence is blank. ``babble``
hears anything: its weights are random, so that whatever goes wrong with a window or a state changes
its words. Both encoders have everything that makes streaming hard: look-ahead, subsampling, right
context, a cached left context with an age mask made from ``processed_frames``. The predictor
forbids its last token, so the transducer hears a held tone once; it hears the same tone again after
another one, or after a reset.

Shapes: B streams, T feature frames, F mel bins, K encoder frames, V tokens, L left context.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

from loquent.engine.bundle import META_FEATURES, META_SCHEMA, META_TOKENS
from loquent.engine.events import Event
from loquent.engine.features import FeatureSpec, whisper_spec
from loquent.engine.recognizer import Recognizer
from loquent.engine.stream import Stream

Float32 = NDArray[np.float32]
Speak = Callable[..., Float32]

PIECES = ["<blank>", "▁ba", "na", "▁ki", "wi", "▁so", "▁", "lo", "▁mu"]
TONES = [300, 480, 720, 1050, 1450, 1950, 2550, 3300]  # Hz, of tokens 1 to 8; all below 4 kHz
SUBSAMPLING, LOOKAHEAD, LEFT = 4, 1, 6
SEGMENTS, RIGHT_CONTEXTS = [4, 8, 16, 32, 64, 128], [0, 4, 8]
V, F = len(PIECES), 80


def _bands(spec: FeatureSpec) -> list[int]:
    return [int(spec.mel[round(hz * spec.n_fft / spec.sample_rate)].argmax()) for hz in TONES]


def _graph(
    nodes: Sequence[Any],
    inputs: dict[str, tuple[int, Sequence[Any]]],
    outputs: dict[str, tuple[int, Sequence[Any]]],
    constants: dict[str, NDArray[Any]],
    metadata: dict[str, str],
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, metadata)
    checker.check_model(model, full_check=True)
    return model


def encoder(
    spec: FeatureSpec,
    metadata: dict[str, str],
    *,
    left: int = LEFT,
    late: bool = False,
    babble: bool = False,
) -> ModelProto:
    """Smoothed band energies, one logit per tone; ``late``: of the frame before."""
    node = helper.make_node
    head = np.zeros((F, V), np.float32)
    for token, band in enumerate(_bands(spec), 1):
        head[band, token] = 6.0
    bias = np.zeros(V, np.float32)
    bias[0] = 4.5
    if babble:
        head = np.random.default_rng(3).normal(0, 0.4, (F, V)).astype(np.float32)
        bias[0] = 2.0
    # A steep and winding function: a hundredth more or less in a band is another word.
    babbling = (
        [node("Mul", ["y", "steep"], ["steep_y"]), node("Sin", ["steep_y"], ["z"])]
        if babble
        else [node("Identity", ["y"], ["z"])]
    )
    nodes = [
        # Look-ahead: the mean of every frame and the next one.
        node("Slice", ["window", "0", "-1", "1"], ["now"]),
        node("Slice", ["window", "1", "end", "1"], ["soon"]),
        node("Add", ["now", "soon"], ["sum"]),
        node("Mul", ["sum", "half"], ["conv"]),
        # Subsampling: the mean of four.
        node("Reshape", ["conv", "by_four"], ["fours"]),
        node("ReduceMean", ["fours"], ["h"], axes=[2], keepdims=0),
        # Right context: a little of the next frame, where the window has one.
        node("Slice", ["h", "1", "end", "1"], ["next_h"]),
        node("Pad", ["next_h", "one_behind", "zero"], ["right"]),
        # Left context: the mean of the cache's frames that are there yet, and of this window's.
        node("Concat", ["state.left", "h"], ["all"], axis=1),
        node("Shape", ["all"], ["count"], start=1, end=2),
        node("Squeeze", ["count"], ["length"]),
        node("Range", ["0s", "length", "1s"], ["position"]),
        node("Unsqueeze", ["state.processed_frames", "1"], ["features_B1"]),
        node("Div", ["features_B1", "subsampling"], ["frames_B1"]),
        node("Add", ["position", "frames_B1"], ["age"]),
        node("GreaterOrEqual", ["age", "left"], ["seen"]),
        node("Cast", ["seen"], ["mask"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["mask", "2"], ["mask_BL1"]),
        node("Mul", ["all", "mask_BL1"], ["kept"]),
        node("Transpose", ["kept"], ["kept_BFL"], perm=[0, 2, 1]),
        node("Conv", ["kept_BFL", "ones_F"], ["total"], group=F),
        node("Transpose", ["mask_BL1"], ["mask_B1L"], perm=[0, 2, 1]),
        node("Conv", ["mask_B1L", "ones_1"], ["number"]),
        node("Div", ["total", "number"], ["mean"]),
        node("Transpose", ["mean"], ["past"], perm=[0, 2, 1]),
        node("Mul", ["past", "little"], ["past_little"]),
        node("Mul", ["right", "little"], ["right_little"]),
        node("Slice", ["all", "late_start", "late_end", "1"], ["heard"]),
        node("Add", ["heard", "past_little"], ["with_past"]),
        node("Add", ["with_past", "right_little"], ["y"]),
        *babbling,
        node("MatMul", ["z", "head"], ["scores"]),
        node("Add", ["scores", "bias"], ["joiner"]),
        node("LogSoftmax", ["joiner"], ["ctc"], axis=2),
        # Next state: the last frames before the right context, and how many there were in all.
        node("Div", ["right_context", "subsampling_s"], ["right_frames"]),
        node("Sub", ["length", "right_frames"], ["stop_s"]),
        node("Unsqueeze", ["stop_s", "0"], ["stop"]),
        node("Sub", ["stop", "left"], ["start"]),
        node("Slice", ["all", "start", "stop", "1"], ["next_left"]),
        node("Reshape", ["next_left", "left_shape"], ["next.left"]),
        node("Sub", ["stop_s", "left_s"], ["new"]),
        node("Mul", ["new", "subsampling_s"], ["new_features"]),
        node("Add", ["state.processed_frames", "new_features"], ["next.processed_frames"]),
    ]
    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    return _graph(
        nodes,
        {
            "window": (f32, ["B", "T", F]),
            "right_context": (i64, []),
            "state.left": (f32, ["B", left, F]),
            "state.processed_frames": (i64, ["B"]),
        },
        {
            "ctc": (f32, ["B", "K", V]),
            "joiner": (f32, ["B", "K", V]),
            "next.left": (f32, ["B", left, F]),
            "next.processed_frames": (i64, ["B"]),
        },
        {
            "0": np.array([0]),
            "1": np.array([1]),
            "2": np.array([2]),
            "-1": np.array([-1]),
            "0s": np.array(0),
            "1s": np.array(1),
            "end": np.array([2**31]),
            "half": np.array(0.5, np.float32),
            "little": np.array(1.0 if babble else 0.1, np.float32),
            "steep": np.array(20.0, np.float32),
            "zero": np.array(0.0, np.float32),
            "by_four": np.array([0, -1, SUBSAMPLING, F]),
            "one_behind": np.array([0, 0, 0, 0, 1, 0]),
            "late_start": np.array([left - late]),
            "late_end": np.array([-1 if late else 2**31]),
            "left": np.array([left]),
            "left_s": np.array(left),
            "left_shape": np.array([0, left, F]),
            "subsampling": np.array([SUBSAMPLING]),
            "subsampling_s": np.array(SUBSAMPLING),
            "ones_F": np.ones((F, 1, left + 1), np.float32),
            "ones_1": np.ones((1, 1, left + 1), np.float32),
            "head": head,
            "bias": bias,
        },
        metadata,
    )


def predictor(metadata: dict[str, str], *, babble: bool = False) -> ModelProto:
    """A table of the last two tokens: the last is forbidden, the one before matters less."""
    rng = np.random.default_rng(7)
    node, i64, f32 = helper.make_node, TensorProto.INT64, TensorProto.FLOAT
    forbid = -100 * np.eye(V, dtype=np.float32)
    forbid[0, 0] = 0.0
    nodes = [
        node("Gather", ["forbid", "token"], ["last"]),
        node("Squeeze", ["state.context", "1"], ["before"]),
        node("Gather", ["little", "before"], ["prior"]),
        node("Add", ["last", "prior"], ["pred"]),
        node("Unsqueeze", ["token", "1"], ["next.context"]),
    ]
    return _graph(
        nodes,
        {"token": (i64, ["B"]), "state.context": (i64, ["B", 1])},
        {"pred": (f32, ["B", V]), "next.context": (i64, ["B", 1])},
        {
            "forbid": forbid,
            "little": rng.normal(0, 2.0 if babble else 0.05, (V, V)).astype(np.float32),
            "1": np.array([1]),
        },
        metadata,
    )


def joiner(metadata: dict[str, str]) -> ModelProto:
    """The sum."""
    f32 = TensorProto.FLOAT
    return _graph(
        [helper.make_node("Add", ["enc", "pred"], ["logits"])],
        {"enc": (f32, ["B", V]), "pred": (f32, ["B", V])},
        {"logits": (f32, ["B", V])},
        {},
        metadata,
    )


def write_bundle(
    folder: Path,
    *,
    left: int = LEFT,
    late: bool = False,
    babble: bool = False,
    pieces: Sequence[str] = PIECES,
    change: Callable[[dict[str, Any]], None] = lambda manifest: None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a bundle.

    Args:
        folder: to be made.
        left: left context of the graph; the manifest always says LEFT.
        babble: random weights.
        late: the encoder says everything one frame late, as trained transducers do.
        pieces: lines of tokens.txt.
        change: applied to the manifest before it is written.
        metadata: entries that replace the graphs' true ones.
    """
    folder.mkdir(parents=True)
    spec = whisper_spec()
    arrays = io.BytesIO()
    np.savez(arrays, **spec.arrays())  # type: ignore[arg-type]
    tokens = "\n".join(pieces).encode() + b"\n"
    facts = {
        META_SCHEMA: "1",
        META_FEATURES: spec.digest(),
        META_TOKENS: hashlib.sha256(tokens).hexdigest(),
        **(metadata or {}),
    }
    files = {
        "encoder.onnx": encoder(
            spec, facts, left=left, late=late, babble=babble
        ).SerializeToString(),
        "predictor.onnx": predictor(facts, babble=babble).SerializeToString(),
        "joiner.onnx": joiner(facts).SerializeToString(),
        "tokens.txt": tokens,
        "features.npz": arrays.getvalue(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)

    def entry(name: str) -> dict[str, Any]:
        return {"file": name, "sha256": hashlib.sha256(files[name]).hexdigest()}

    manifest: dict[str, Any] = {
        "schema": 1,
        "name": "tiny",
        "version": "1",
        "sample_rate": 16000,
        "features": {"spec": spec.to_dict(), **entry("features.npz")},
        "encoder": {
            **entry("encoder.onnx"),
            "subsampling": SUBSAMPLING,
            "lookahead": LOOKAHEAD,
            "segments": SEGMENTS,
            "segment": 32,
            "right_contexts": RIGHT_CONTEXTS,
            "right_context": 4,
            "states": [
                {"name": "left", "shape": [LEFT, F], "dtype": "float32"},
                {"name": "processed_frames", "shape": [], "dtype": "int64"},
            ],
        },
        "heads": {
            "ctc": True,
            "rnnt": {
                "joiner_dim": V,
                "predictor": {
                    **entry("predictor.onnx"),
                    "states": [{"name": "context", "shape": [1], "dtype": "int64", "init": 0}],
                },
                "joiner": entry("joiner.onnx"),
            },
        },
        "default_decoder": "rnnt",
        "vocab_size": V,
        "blank": 0,
        "tokens": entry("tokens.txt"),
        "languages": {"xx": "default"},
        "precision": "fp32",
        "training": {},
        "scores": {},
        "licence": "Apache-2.0",
    }
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def tones(
    tokens: Sequence[tuple[int, float]],
    *,
    sample_rate: int = 16000,
    ramp: float = 0.01,
    noise: float = 0.0,
) -> Float32:
    """Audio of (token, seconds) pairs; token 0 is silence. Every tone fades in and out.

    ``noise`` is the level of a noise over everything, the same for the same length.
    """
    parts = []
    for token, seconds in tokens:
        n = round(seconds * sample_rate)
        t = np.arange(n) / sample_rate
        wave = 0.3 * np.sin(2 * np.pi * TONES[token - 1] * t) if token else np.zeros(n)
        fade = np.minimum(1.0, np.minimum(t, t[::-1]) / ramp)
        parts.append((wave * fade).astype(np.float32))
    pcm = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    hiss = np.random.default_rng(len(pcm)).normal(0, noise, len(pcm))
    return pcm + hiss.astype(np.float32)


def run(
    recognizer: Recognizer, stream: Stream, pcm: Float32, packets: Sequence[int]
) -> list[Event]:
    """All events of a stream fed in packets of these sizes, over and over."""
    events: list[Event] = []
    position = turn = 0
    while position < len(pcm):
        size = packets[turn % len(packets)]
        turn += 1
        stream.accept(pcm[position : position + size])
        position += size
        while stream.ready:
            recognizer.step([stream])
        events += stream.events()
    stream.finish()
    while stream.ready:
        recognizer.step([stream])
    return events + stream.events()


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a bundle that hears tones."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_bundle: Path) -> Recognizer:
    """A recogniser that hears tones."""
    return Recognizer.load(tiny_bundle)


@pytest.fixture(scope="session")
def babble(tmp_path_factory: pytest.TempPathFactory) -> Recognizer:
    """A recogniser whose words depend on every number."""
    folder = tmp_path_factory.mktemp("bundles") / "babble"
    # A tone is raised by 5 dB, what is softer by up to 25.
    level = {"level": {"quiet": 40.0, "most": 25.0}}
    return Recognizer.load(write_bundle(folder, babble=True, change=lambda m: m.update(level)))


@pytest.fixture(scope="session", name="write_bundle")
def _write_bundle() -> Callable[..., Path]:
    return write_bundle


@pytest.fixture(scope="session", name="tones")
def _tones() -> Speak:
    return tones


@pytest.fixture(scope="session", name="run")
def _run() -> Callable[..., list[Event]]:
    return run
