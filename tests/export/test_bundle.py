"""Bundles: what is written loads, and its graphs compute what the torch model does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from loquent.engine.bundle import META_FEATURES, META_SCHEMA, META_TOKENS, Bundle
from loquent.engine.encoder import OnnxEncoder
from loquent.engine.errors import BundleError
from loquent.engine.features import kaldi_spec, whisper_spec
from loquent.engine.pool import Slot
from loquent.engine.predictor import OnnxPredictor
from loquent.engine.recognizer import Recognizer
from loquent.export.bundle import BundleSpec, update_manifest, write_bundle, write_int8
from loquent.export.cli import ExportRefused, check_parity
from loquent.export.graphs import set_metadata
from loquent.export.parity import compare
from loquent.models.student import Student

TOLERANCE = 1e-3
VOCAB = 11


Written = tuple[Student, Bundle, Path]


@pytest.fixture(params=["whisper", "everything", "torchaudio", "ctc-only"])
def written(request: pytest.FixtureRequest, bundle_of: Callable[[str], Written]) -> Written:
    """Each kind of student with its bundle."""
    return bundle_of(request.param)


# 3: ONNX == torch


def test_graphs_are_the_torch_model_over_carried_state(written: Written) -> None:
    student, bundle, _ = written
    rows = list(compare(student, bundle, steps=8))
    settings = {(row.batch, row.segment, row.right_context) for row in rows}
    assert settings == {
        (batch, segment, right)
        for batch in (1, 4)
        for segment in (4, 8, 16, 32, 64, 128)
        for right in (0, 4, 8, 16, 24, 48)
    }
    for row in rows:
        assert max(row.ctc, row.joiner, row.state) < TOLERANCE, row
        assert row.flips == 0, row
        assert (row.frames > 0) is student.config.ctc
    assert max(row.state for row in rows) > 0  # and it is not the same code that ran twice


def test_predictor_and_joiner_are_the_torch_modules(written: Written) -> None:
    student, bundle, _ = written
    if bundle.rnnt is None:
        assert not student.config.joiner_dim
        return
    blank = student.config.blank
    graph = OnnxPredictor(bundle, bundle.rnnt)
    tokens = torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = student.predictor(tokens, blank)
    state = {name: np.repeat(array, 3, axis=0) for name, array in graph.initial.items()}
    fed = np.concatenate([np.full((3, 1), blank), tokens.numpy()], axis=1)
    enc = np.random.default_rng(0).standard_normal((3, student.config.joiner_dim))
    enc = enc.astype(np.float32)
    for u in range(10):
        got, state = graph.step(fed[:, u], state)
        np.testing.assert_allclose(got, expected[:, u], atol=1e-5)
        with torch.no_grad():
            logits = student.joiner(torch.from_numpy(enc), expected[:, u])
        np.testing.assert_allclose(graph.join(enc, got), logits, atol=1e-4)


# 4: batched == single


def test_streams_of_mixed_age_in_one_batch_are_like_single_ones(written: Written) -> None:
    _, bundle, _ = written
    graph = OnnxEncoder(bundle)
    rng = np.random.default_rng(0)
    segment, right = 8, 4
    frames = 6 * segment + right + bundle.encoder.lookahead
    streams = rng.standard_normal((3, frames, 8)).astype(np.float32)

    def window(stream: int, step: int) -> Any:
        return streams[
            stream, step * segment : (step + 1) * segment + right + bundle.encoder.lookahead
        ]

    keep = segment // bundle.encoder.subsampling
    single: list[list[Any]] = [[], [], []]
    for stream in range(3):
        state = graph.initial
        for step in range(6):
            got, state = graph.step(window(stream, step)[None], right, state)
            # The right context's frames come again and are not computed here.
            assert {array.shape[1] for array in got.values()} == {keep}
            single[stream].append({head: array[0] for head, array in got.items()})
    states = [graph.initial] * 3
    for round_ in range(8):
        active = [i for i in range(3) if i <= round_ < i + 6]
        batch = {n: np.concatenate([states[i][n] for i in active]) for n in graph.initial}
        got, after = graph.step(np.stack([window(i, round_ - i) for i in active]), right, batch)
        for row, i in enumerate(active):
            states[i] = {n: array[row : row + 1] for n, array in after.items()}
            for head, array in got.items():
                np.testing.assert_allclose(
                    array[row, :keep], single[i][round_ - i][head], atol=1e-4
                )


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "for a device of its own"])
def test_states_in_the_pool_give_what_states_in_hand_give(written: Written, in_place: bool) -> None:
    _, bundle, _ = written
    graph = OnnxEncoder(bundle)
    graph._in_place = in_place
    rng = np.random.default_rng(0)
    segment, right = 8, 4
    length = segment + right + bundle.encoder.lookahead
    state = {n: np.repeat(a, 3, axis=0) for n, a in graph.initial.items()}
    other = graph.pool.own([graph.pool.fresh])  # a row between
    slots: Sequence[Slot] = [graph.pool.fresh] * 3
    for _ in range(8):
        window = rng.standard_normal((3, length, 8)).astype(np.float32)
        expected, state = graph.step(window, right, state)
        got, advance = graph.advance(window[::-1], right, slots[::-1], graph.heads)
        slots = advance.keep()[::-1]
        for head, array in got.items():
            np.testing.assert_array_equal(array[::-1], expected[head])
    for name, array in graph.pool.read(slots).items():
        np.testing.assert_array_equal(array, state[name])
    assert not any(array.any() for array in other[0].state().values())


# Mistakes that the parity check is there for


def test_parity_is_refused_for_other_weights(
    bundle_of: Callable[[str], Written], capsys: pytest.CaptureFixture[str]
) -> None:
    student, bundle, _ = bundle_of("whisper")
    check_parity(student, bundle, TOLERANCE)
    table = capsys.readouterr().out
    assert table.count("\n| 1 |") == table.count("\n| 4 |") == 36
    other = Student(student.config).eval()
    with pytest.raises(ExportRefused, match=r"the graph differs .* nothing was written"):
        check_parity(other, bundle, TOLERANCE)
    check_parity(other, bundle, None)


def test_parity_is_refused_for_numbers_that_are_none(
    bundle_of: Callable[[str], Written],
) -> None:
    student, bundle, _ = bundle_of("whisper")
    broken = Student(student.config).eval()
    broken.load_state_dict(student.state_dict())
    with torch.no_grad():
        next(broken.encoder.emformer.parameters()).fill_(torch.nan)
    with pytest.raises(ExportRefused, match="differs from the torch model by nan"):
        check_parity(broken, bundle, TOLERANCE)


# The manifest


def test_manifest_says_what_the_student_is(written: Written) -> None:
    student, bundle, folder = written
    config = student.config
    assert Bundle.load(folder).tokens == bundle.tokens
    assert bundle.blank == config.blank
    assert bundle.tokens[config.blank] == "<blank>"
    assert bundle.has_ctc is config.ctc
    assert (bundle.rnnt is not None) is bool(config.joiner_dim)
    assert bundle.encoder.subsampling == config.encoder.subsampling
    assert bundle.encoder.lookahead == config.encoder.lookahead
    assert bundle.chunks_ms == (40, 80, 160, 320, 640, 1280)
    assert bundle.right_contexts_ms == (0, 40, 80, 160, 240, 480)
    shapes = {state.name: state.shape for state in bundle.encoder.states}
    assert shapes == student.encoder.state_shapes()
    assert {state.name for state in bundle.encoder.states if state.ring} == student.encoder.rings
    for graph in folder.glob("*.onnx"):
        assert str(Path(__file__).parents[2]).encode() not in graph.read_bytes()
        properties = {p.key: p.value for p in onnx.load(graph).metadata_props}
        assert properties[META_FEATURES] == bundle.features.digest()
        assert properties[META_TOKENS] == bundle.tokens_sha256


def test_streams_run_on_it(written: Written) -> None:
    _, bundle, folder = written
    recognizer = Recognizer.load(folder)
    pcm = (0.1 * np.random.default_rng(0).standard_normal(24000)).astype(np.float32)
    for chunk_ms in (40, 320, 1280):
        for decoder in bundle.decoders:
            recognizer.transcribe(pcm, chunk_ms=chunk_ms, decoder=decoder)


def test_a_graph_of_other_features_is_refused(
    bundle_of: Callable[[str], Written], tmp_path: Path
) -> None:
    """What ties a graph to its manifest: nothing else would notice."""
    folder = tmp_path / "b"
    shutil.copytree(bundle_of("whisper")[2], folder)
    graph = folder / "encoder.onnx"
    louder = kaldi_spec(n_mels=8, input_scale=2.0).digest()
    set_metadata(graph, {META_SCHEMA: "1", META_FEATURES: louder, META_TOKENS: "x"})
    encoder = json.loads((folder / "manifest.json").read_text())["encoder"]
    encoder["sha256"] = hashlib.sha256(graph.read_bytes()).hexdigest()
    update_manifest(folder, encoder=encoder)
    with pytest.raises(BundleError, match="for other features than the manifest's"):
        Recognizer.load(folder)


def test_an_old_bundle_is_replaced_as_a_whole(
    bundle_of: Callable[[str], Written], tmp_path: Path
) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    write_int8(bundle_of("whisper")[2], folder)
    assert not (folder / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pieces": ["a", "b"]}, "got 2 pieces, expected 11"),
        ({"features": whisper_spec()}, "got 80 features a frame, expected 8"),
        ({"chunks_ms": (40, 50), "chunk_ms": 40}, "50 ms is no multiple of the 4 feature frames"),
        ({"right_contexts_ms": (0, 15)}, "15 ms is no multiple"),
        ({"chunk_ms": 60}, "60 ms is no multiple"),
    ],
    ids=["pieces", "features", "chunk", "right", "default"],
)
def test_what_does_not_fit_is_refused_at_once(
    student_of: Callable[[str], Student],
    bundle_spec: BundleSpec,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    spec = dataclasses.replace(bundle_spec, **changes)
    with pytest.raises(ValueError, match=message):
        write_bundle(student_of("whisper"), spec, tmp_path / "b")
    assert not list(tmp_path.iterdir())
