"""Int8: a row of the result depends on that row alone.

Which is why the export does not use ONNX Runtime's own dynamic quantisation; the last test shows
what that does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from loquent.engine.bundle import Bundle
from loquent.engine.encoder import OnnxEncoder
from loquent.export.bundle import write_int8
from loquent.export.parity import compare
from loquent.export.quantise import quantise_int8, store_half
from loquent.models.student import Student

Array = NDArray[np.float32]


def run(path: Path, inputs: dict[str, Any]) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(  # type: ignore[no-any-return]
        str(path), options, providers=["CPUExecutionProvider"]
    ).run(None, inputs)


# Products alone


K, N = 48, 20


@pytest.fixture(scope="module")
def weight() -> Array:
    weight = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    weight *= np.logspace(-2, 1, N, dtype=np.float32)  # columns of very different size
    weight[:, 3] = 0
    return weight


BIAS = np.linspace(-1, 1, N).astype(np.float32)


def graph(path: Path, kind: str, weight: Array) -> Path:
    """One product of x with constant weights, in the forms that exporters write it."""
    node = helper.make_node
    constants = {"w": weight, "b": BIAS}
    if kind == "matmul":
        nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])]
    elif kind == "gemm":
        nodes = [node("Gemm", ["x", "w", "b"], ["y"])]
    elif kind == "gemm-transposed":
        nodes = [node("Gemm", ["x", "w", "b"], ["y"], transB=1)]
        constants["w"] = weight.T.copy()
    elif kind == "transpose-node":
        nodes = [
            node("Transpose", ["w"], ["wt"], perm=[1, 0]),
            node("MatMul", ["x", "wt"], ["p"]),
            node("Add", ["p", "b"], ["y"]),
        ]
        constants["w"] = weight.T.copy()
    else:  # the same x and another product of it
        nodes = [
            node("MatMul", ["x", "w"], ["p"]),
            node("MatMul", ["x", "w2"], ["p2"]),
            node("Sub", ["p", "p2"], ["q"]),
            node("Add", ["q", "b"], ["y"]),
        ]
        constants["w2"] = -weight
    rank = 2 if "gemm" in kind else 3
    shape = ["B", K] if rank == 2 else ["B", "T", K]
    made = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape[:-1], N])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, path)
    return path


KINDS = ["matmul", "gemm", "gemm-transposed", "transpose-node", "shared"]


@pytest.mark.parametrize("kind", KINDS)
def test_product_is_close_and_its_weights_are_int8(
    kind: str, weight: Array, tmp_path: Path
) -> None:
    source = graph(tmp_path / "a.onnx", kind, weight)
    target = tmp_path / "b.onnx"
    products = 2 if kind == "shared" else 1
    assert quantise_int8(source, target) == products
    model = onnx.load(target)
    onnx.checker.check_model(model)
    shapes = [tuple(i.dims) for i in model.graph.initializer if i.data_type == TensorProto.FLOAT]
    assert (K, N) not in shapes
    assert (N, K) not in shapes
    x = np.random.default_rng(1).standard_normal((5, 3, K)).astype(np.float32)
    x = x[:, 0] if "gemm" in kind else x
    (expected,) = run(source, {"x": x})
    (got,) = run(target, {"x": x})
    # Relative to each column's own size: small columns are not lost beside large ones.
    size = np.abs(expected - BIAS).reshape(-1, N).max(axis=0) + 1e-9
    assert (np.abs(got - expected) / size).max() < 0.05
    np.testing.assert_array_equal(got[..., 3], np.broadcast_to(BIAS[3], got[..., 3].shape))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rows_of_any_size_are_quantised_alike(weight: Array, scale: float, tmp_path: Path) -> None:
    source = graph(tmp_path / "a.onnx", "matmul", weight)
    quantise_int8(source, tmp_path / "b.onnx")
    x = np.random.default_rng(1).standard_normal((1, 4, K)).astype(np.float32)
    big = (x * np.float32(scale)).astype(np.float32)
    (one,) = run(tmp_path / "b.onnx", {"x": x})
    (two,) = run(tmp_path / "b.onnx", {"x": big})
    np.testing.assert_allclose((two - BIAS) / scale, one - BIAS, rtol=0.02, atol=0.05)


def test_silence_is_silence(weight: Array, tmp_path: Path) -> None:
    source = graph(tmp_path / "a.onnx", "matmul", weight)
    quantise_int8(source, tmp_path / "b.onnx")
    (got,) = run(tmp_path / "b.onnx", {"x": np.zeros((1, 2, K), np.float32)})
    np.testing.assert_array_equal(got, np.broadcast_to(BIAS, got.shape))


def test_no_saturation_at_the_extremes(tmp_path: Path) -> None:
    """All inputs and weights at their limits: pairs of products must not overflow 16 bits."""
    source = graph(tmp_path / "a.onnx", "matmul", np.ones((K, N), np.float32))
    quantise_int8(source, tmp_path / "b.onnx")
    for value in (1.0, -1.0):
        (got,) = run(tmp_path / "b.onnx", {"x": np.full((1, 1, K), value, np.float32)})
        np.testing.assert_allclose(got - BIAS, value * K, rtol=0.01)


def test_nothing_to_quantise_is_an_error(tmp_path: Path) -> None:
    info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 2, 2]) for name in ("x", "y")
    ]
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "x"], ["y"])], "g", info[:1], info[1:]
    )
    onnx.save(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "a.onnx"
    )
    with pytest.raises(ValueError, match="no matrix product with a constant weight"):
        quantise_int8(tmp_path / "a.onnx", tmp_path / "b.onnx")


def test_convolutions_are_stored_small_and_computed_in_float(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((16, K, 3)).astype(np.float32)
    kernel *= np.logspace(-2, 1, 16, dtype=np.float32)[:, None, None]
    kernel[5] = 0
    made = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "k"], ["c"]),
            helper.make_node("MatMul", ["c", "w"], ["y"]),
        ],
        "convolution",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", K, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 16, 10])],
        [
            numpy_helper.from_array(kernel, "k"),
            numpy_helper.from_array(np.eye(10, dtype=np.float32), "w"),
        ],
    )
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]), source)
    assert quantise_int8(source, target) == 1
    model = onnx.load(target)
    onnx.checker.check_model(model)
    floats = [i for i in model.graph.initializer if i.data_type == TensorProto.FLOAT]
    assert max(int(np.prod(i.dims)) for i in floats) <= 16
    x = rng.standard_normal((2, K, 12)).astype(np.float32)
    (expected,) = run(source, {"x": x})
    (got,) = run(target, {"x": x})
    size = np.abs(expected).max(axis=(0, 2), keepdims=True) + 1e-9
    assert (np.abs(got - expected) / size).max() < 0.03
    assert not got[:, 5].any()


def test_halves_are_computed_with_in_single_precision(weight: Array, tmp_path: Path) -> None:
    path = graph(tmp_path / "a.onnx", "matmul", weight)
    x = np.random.default_rng(1).standard_normal((1, 4, K)).astype(np.float32)
    before = path.stat().st_size
    store_half(path, least=K * N)
    assert path.stat().st_size < before - K * N  # two bytes less for each, and a node more
    (got,) = run(path, {"x": x})
    np.testing.assert_allclose(got, x @ weight.astype(np.float16) + BIAS, rtol=1e-4, atol=1e-4)
    kept = {i.name: i.data_type for i in onnx.load(path).graph.initializer}
    assert kept == {"w.half": TensorProto.FLOAT16, "b": TensorProto.FLOAT}


# The encoder


Pair = tuple[Student, Path, Path]


@pytest.fixture(scope="module")
def pair(bundle_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A student with its float bundle and its int8 bundle."""
    student, _, fp32 = bundle_of("whisper")
    int8 = tmp_path_factory.mktemp("bundles") / "int8"
    write_int8(fp32, int8)
    return student, fp32, int8


def windows(seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((4, 37, 8)).astype(np.float32)


def step(encoder: OnnxEncoder, x: Array) -> dict[str, Any]:
    """Two steps, so that what went through the caches counts too."""
    state = {name: np.repeat(a, len(x), axis=0) for name, a in encoder.initial.items()}
    _, state = encoder.step(x, 4, state)
    frames, state = encoder.step(x, 4, state)
    return frames | state


def load(folder: Path) -> OnnxEncoder:
    return OnnxEncoder(Bundle.load(folder))


def test_int8_is_smaller_and_near(pair: Pair) -> None:
    student, fp32, int8 = pair
    bundle = Bundle.load(int8)
    assert bundle.precision == "int8"
    sizes = [(folder / "encoder.onnx").stat().st_size for folder in (fp32, int8)]
    assert sizes[1] < sizes[0]
    rows = list(compare(student, bundle, steps=4, batches=(1,)))
    worst = max(max(row.ctc, row.joiner) for row in rows)
    assert 1e-4 < worst < 0.5
    for name in ("features.npz", "tokens.txt"):
        assert (fp32 / name).read_bytes() == (int8 / name).read_bytes()


@pytest.mark.parametrize("loudness", [1.0, 100.0])
def test_a_row_is_bit_for_bit_the_same_whoever_its_neighbours_are(
    pair: Pair, loudness: float
) -> None:
    encoder = load(pair[2])
    x = windows()
    others = x.copy()
    others[1:] = loudness * windows(seed=1)[1:]
    before, after = step(encoder, x), step(encoder, others)
    for name in before:
        np.testing.assert_array_equal(before[name][0], after[name][0], err_msg=name)


def test_batched_is_single(pair: Pair) -> None:
    encoder = load(pair[2])
    x = windows()
    x[2] *= 50  # one session is loud
    together = step(encoder, x)
    for row in range(4):
        alone = step(encoder, x[row : row + 1])
        for name, array in alone.items():
            np.testing.assert_allclose(together[name][row], array[0], atol=1e-4, err_msg=name)


def test_with_onnxruntimes_dynamic_quantisation_neighbours_matter(
    pair: Pair, tmp_path: Path
) -> None:
    """The reason for ``quantise_int8``: one scale for the tensor is one scale for all sessions."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    theirs = tmp_path / "encoder.onnx"
    quantize_dynamic(
        pair[1] / "encoder.onnx",
        theirs,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )
    encoder = load(pair[1])
    x = windows()
    others = x.copy()
    others[1:] *= 1000

    def first(path: Path, window: Array) -> Any:
        inputs: dict[str, Any] = {
            f"state.{name}": np.repeat(a, 4, axis=0) for name, a in encoder.initial.items()
        }
        inputs |= {"window": window, "right_context": np.array(4, np.int64), "rows": np.arange(4)}
        return run(path, inputs)[0][0]

    ours = [first(pair[2] / "encoder.onnx", window) for window in (x, others)]
    dynamic = [first(theirs, window) for window in (x, others)]
    np.testing.assert_array_equal(ours[0], ours[1])
    assert np.abs(dynamic[0] - dynamic[1]).max() > 1e-2


def test_int8_of_a_quantised_bundle_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no matrix product with a constant weight"):
        write_int8(pair[2], tmp_path / "again")
    assert not (tmp_path / "again").exists()
