"""Writes a bundle from a student: graphs, features, tokens and the manifest that ties them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loquent.engine.bundle import (
    BLANK_PIECE,
    META_FEATURES,
    META_SCHEMA,
    META_TOKENS,
    SCHEMA,
    Bundle,
)
from loquent.engine.features import FeatureSpec
from loquent.engine.fields import MANIFEST
from loquent.engine.level import LevelRules
from loquent.engine.spelling import SpellingRules
from loquent.export.graphs import export_encoder, export_joiner, export_predictor, set_metadata
from loquent.export.quantise import quantise_int8, store_half
from loquent.models.student import Student

CHUNKS_MS = (40, 80, 160, 320, 640, 1280)
RIGHT_CONTEXTS_MS = (0, 40, 80, 160, 240, 480)


@dataclass(frozen=True, kw_only=True)
class BundleSpec:
    """What a bundle says about itself beyond the shapes.

    Attributes:
        name, version: of the bundle.
        features: what the student was trained on.
        pieces: the vocabulary in id order.
        spm: the SentencePiece model, if the vocabulary has one.
        languages: language code -> head.
        chunks_ms, chunk_ms: chunk sizes on offer, and the default.
        right_contexts_ms, right_context_ms: the same for the right context.
        default_decoder: one of ``engine.bundle.DECODERS``.
        lm: a word language model of ``loquent lm`` for beam search.
        level: what speech is quiet and is to be raised.
        beams: rules of the beam searches by decoder, as `loquent tune` found them.
        training, scores, licence: for people.
    """

    name: str
    features: FeatureSpec
    pieces: Sequence[str]
    spm: bytes | None
    licence: str
    version: str = "0.1.0"
    languages: Mapping[str, str] = field(default_factory=lambda: {"en": "default"})
    chunks_ms: Sequence[int] = CHUNKS_MS
    chunk_ms: int = 320
    right_contexts_ms: Sequence[int] = RIGHT_CONTEXTS_MS
    right_context_ms: int = 40
    default_decoder: str = "rnnt"
    lm: bytes | None = None
    level: LevelRules | None = None
    beams: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)


def write_bundle(student: Student, spec: BundleSpec, folder: Path) -> Bundle:
    """Write a float bundle into ``folder`` (replaced as a whole) and load it back, checked.

    Raises:
        ValueError: the vocabulary, the features or a chunk size does not fit the student.
    """
    config = student.config
    if len(spec.pieces) != config.vocab:
        raise ValueError(f"got {len(spec.pieces)} pieces, expected {config.vocab}")
    if spec.features.n_mels != config.encoder.frontend.features:
        raise ValueError(
            f"got {spec.features.n_mels} features a frame, expected "
            f"{config.encoder.frontend.features}"
        )
    lengths = _lengths(spec, config.encoder.subsampling)
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    student = student.eval()
    export_encoder(student, partial / "encoder.onnx")
    pieces = [BLANK_PIECE if i == config.blank else p for i, p in enumerate(spec.pieces)]
    (partial / "tokens.txt").write_bytes(("\n".join(pieces) + "\n").encode())
    tokens: dict[str, Any] = file_entry(partial, "tokens.txt")
    if spec.spm is not None:
        (partial / "tokens.spm").write_bytes(spec.spm)
        tokens |= {"spm": "tokens.spm", "spm_sha256": _sha256(partial / "tokens.spm")}
    with (partial / "features.npz").open("wb") as out:
        np.savez(out, **spec.features.arrays())  # type: ignore[arg-type]
    graphs = ["encoder.onnx"]
    if config.joiner_dim:
        export_predictor(student, partial / "predictor.onnx")
        export_joiner(student, partial / "joiner.onnx")
        graphs += ["predictor.onnx", "joiner.onnx"]
    for graph in graphs:
        set_metadata(
            partial / graph,
            {
                META_SCHEMA: str(SCHEMA),
                META_FEATURES: spec.features.digest(),
                META_TOKENS: tokens["sha256"],
            },
        )
    manifest = {
        "schema": SCHEMA,
        "name": spec.name,
        "version": spec.version,
        "licence": spec.licence,
        "languages": dict(spec.languages),
        "precision": "fp32",
        "sample_rate": spec.features.sample_rate,
        "features": {"spec": spec.features.to_dict(), **file_entry(partial, "features.npz")},
        "encoder": _encoder(student, lengths, partial),
        "heads": {
            "ctc": config.ctc,
            "rnnt": _rnnt(student, partial) if config.joiner_dim else None,
        },
        **_language_model(spec, partial),
        **({"level": dataclasses.asdict(spec.level)} if spec.level else {}),
        "beams": {name: dict(rules) for name, rules in spec.beams.items()},
        "default_decoder": spec.default_decoder,
        "vocab_size": config.vocab,
        "blank": config.blank,
        "tokens": tokens,
        "training": dict(spec.training),
        "scores": dict(spec.scores),
    }
    _write_manifest(partial, manifest)
    return _put(partial, folder)


def write_int8(source: Path, folder: Path) -> Bundle:
    """Write the int8 twin of the float bundle at ``source`` into ``folder``.

    Only the encoder is quantised: predictor and joiner are small and run once per symbol. Their
    weights are stored in half precision, but computed with in single.
    """
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    manifest = json.loads((partial / MANIFEST).read_text())
    quantise_int8(source / "encoder.onnx", partial / "encoder.onnx")
    manifest["encoder"] |= file_entry(partial, "encoder.onnx")
    if rnnt := manifest["heads"]["rnnt"]:
        for part in ("predictor", "joiner"):
            store_half(partial / f"{part}.onnx")
            rnnt[part] |= file_entry(partial, f"{part}.onnx")
    manifest["precision"] = "int8"
    _write_manifest(partial, manifest)
    return _put(partial, folder)


def update_manifest(folder: Path, **fields: object) -> None:
    """Replace top-level fields (scores, say) of a bundle's manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    _write_manifest(folder, manifest | fields)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def _put(partial: Path, folder: Path) -> Bundle:
    """Check the new folder as the engine would, then put it in the old one's place."""
    Bundle.load(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return Bundle.load(folder)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def file_entry(folder: Path, name: str) -> dict[str, str]:
    """What a manifest says of a file."""
    return {"file": name, "sha256": _sha256(folder / name)}


def _frames(spec: BundleSpec, milliseconds: int, subsampling: int) -> int:
    samples = milliseconds * spec.features.sample_rate
    frames, rest = divmod(samples, 1000 * spec.features.hop)
    if rest or frames % subsampling:
        raise ValueError(
            f"{milliseconds} ms is no multiple of the {subsampling} feature frames of one output "
            "frame; choose other chunk sizes"
        )
    return frames


def _lengths(spec: BundleSpec, subsampling: int) -> dict[str, Any]:
    return {
        "segments": [_frames(spec, ms, subsampling) for ms in spec.chunks_ms],
        "segment": _frames(spec, spec.chunk_ms, subsampling),
        "right_contexts": [_frames(spec, ms, subsampling) for ms in spec.right_contexts_ms],
        "right_context": _frames(spec, spec.right_context_ms, subsampling),
    }


def _encoder(student: Student, lengths: dict[str, Any], folder: Path) -> dict[str, Any]:
    encoder = student.encoder
    states = encoder.initial_state(1)
    return {
        **file_entry(folder, "encoder.onnx"),
        "subsampling": encoder.config.subsampling,
        "lookahead": encoder.config.lookahead,
        **lengths,
        "states": [
            {
                "name": name,
                "shape": list(shape),
                "dtype": str(states[name].dtype).removeprefix("torch."),
                **({"ring": 1, "every": encoder.ring_every} if name in encoder.rings else {}),
            }
            for name, shape in encoder.state_shapes().items()
        ],
    }


def _language_model(spec: BundleSpec, folder: Path) -> dict[str, Any]:
    if spec.lm is None:
        return {}
    (folder / "lm.npz").write_bytes(spec.lm)
    return {"lm": file_entry(folder, "lm.npz") | {"spelling": dataclasses.asdict(SpellingRules())}}


def _rnnt(student: Student, folder: Path) -> dict[str, Any]:
    states = [
        {
            "name": name,
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "init": student.config.blank if dtype == torch.int64 else 0,
        }
        for name, (shape, dtype) in student.predictor.state_shapes().items()
    ]
    return {
        "joiner_dim": student.config.joiner_dim,
        "predictor": {**file_entry(folder, "predictor.onnx"), "states": states},
        "joiner": file_entry(folder, "joiner.onnx"),
    }
