"""Int8 weights per output channel, activations quantised row by row.

ONNX Runtime's own dynamic quantisation takes one scale over the whole activation tensor, so in a
batch of streams the result of one session depends on what the others say. Here every row is
divided by its own largest magnitude, quantised with a constant scale, multiplied in integers and
scaled back; integer sums have no rounding, so a row's result does not depend on its neighbours.

The product is one ``MatMulIntegerToFloat`` (a ``com.microsoft`` operator): the plain ONNX chain of
``MatMulInteger``, ``Cast`` and ``Mul`` costs a tenth more time. Weights use 7 of their 8 bits,
because without VNNI instructions a pair of full-range products overflows 16 bits and saturates
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). Everything else is
computed in float. Convolutions, which hear the raw features, are so too, but their weights are
stored as int8 with a scale for each channel: ONNX Runtime makes floats of them when it loads.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

_WEIGHT_LIMIT = 63
_STORED_LIMIT = 127
_ACTIVATION_LIMIT = 127
_DOMAIN = "com.microsoft"


def _constants(graph: onnx.GraphProto) -> None:
    for name, value in {
        "q8.scale": np.float32(1 / _ACTIVATION_LIMIT),
        "q8.zero": np.uint8(128),
        "q8.weight_zero": np.int8(0),
        # Keeps a row of zeros from being divided by zero.
        "q8.tiny": np.float32(1e-12),
        "q8.last_axis": np.array([-1], np.int64),
    }.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))


def _quantise_rows(source: str) -> list[onnx.NodeProto]:
    """Nodes that make ``source.q8`` (uint8) and ``source.peak`` (a factor per row)."""
    return [
        helper.make_node("Abs", [source], [f"{source}.abs"]),
        helper.make_node("ReduceMax", [f"{source}.abs", "q8.last_axis"], [f"{source}.max"]),
        helper.make_node("Add", [f"{source}.max", "q8.tiny"], [f"{source}.peak"]),
        helper.make_node("Div", [source, f"{source}.peak"], [f"{source}.unit"]),
        helper.make_node(
            "QuantizeLinear", [f"{source}.unit", "q8.scale", "q8.zero"], [f"{source}.q8"]
        ),
    ]


def quantise_int8(source: Path, target: Path) -> int:
    """Write ``source`` with the constant weights of its matrix products as int8.

    Returns:
        Number of products converted.

    Raises:
        ValueError: nothing could be converted.
    """
    model = onnx.load(str(source))
    graph = model.graph
    weights = {i.name: i for i in graph.initializer}
    transposed = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in weights
    }
    nodes: list[onnx.NodeProto] = []
    rows: set[str] = set()
    converted = 0
    for node in graph.node:
        found = _constant_weight(node, weights, transposed)
        if found is None:
            nodes.append(node)
            continue
        name, weight = found
        scale = np.abs(weight).max(axis=0) / _WEIGHT_LIMIT
        scale[scale == 0] = 1.0
        quantised = np.rint(weight / scale).astype(np.int8)
        graph.initializer.append(numpy_helper.from_array(quantised, f"{name}.q8"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
        x, out = node.input[0], node.output[0]
        if x not in rows:
            nodes += _quantise_rows(x)
            rows.add(x)
        biased = node.op_type == "Gemm" and len(node.input) == 3
        product = f"{out}.product"
        nodes.append(
            helper.make_node(
                "MatMulIntegerToFloat",
                [f"{x}.q8", f"{name}.q8", "q8.scale", f"{name}.scale", "q8.zero", "q8.weight_zero"],
                [product],
                domain=_DOMAIN,
            )
        )
        scaled = f"{out}.scaled" if biased else out
        nodes.append(helper.make_node("Mul", [product, f"{x}.peak"], [scaled]))
        if biased:
            nodes.append(helper.make_node("Add", [scaled, node.input[2]], [out]))
        converted += 1
    nodes = _store_convolutions(graph, nodes, weights)
    if not converted:
        raise ValueError(f"{source}: no matrix product with a constant weight to quantise")
    _constants(graph)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    if not any(o.domain == _DOMAIN for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    onnx.save(model, str(target))
    return converted


def _store_convolutions(
    graph: onnx.GraphProto, nodes: list[onnx.NodeProto], weights: dict[str, onnx.TensorProto]
) -> list[onnx.NodeProto]:
    """Keep the weights of convolutions as int8; returns the nodes with those that unpack them."""
    result: list[onnx.NodeProto] = []
    for node in nodes:
        name = node.input[1] if node.op_type == "Conv" else ""
        if name in weights and weights[name].data_type == onnx.TensorProto.FLOAT:
            weight = numpy_helper.to_array(weights[name])
            channels = tuple(range(1, weight.ndim))
            scale = np.abs(weight).max(axis=channels, keepdims=True) / _STORED_LIMIT
            scale[scale == 0] = 1.0
            small, cast, unpacked = f"{name}.q8", f"{name}.cast", f"{name}.unpacked"
            stored = np.rint(weight / scale).astype(np.int8)
            graph.initializer.append(numpy_helper.from_array(stored, small))
            graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
            result += [
                helper.make_node("Cast", [small], [cast], to=onnx.TensorProto.FLOAT),
                # Not DequantizeLinear, which ONNX Runtime leaves for every run.
                helper.make_node("Mul", [cast, f"{name}.scale"], [unpacked]),
            ]
            node.input[1] = unpacked
        result.append(node)
    return result


def store_half(path: Path, *, least: int = 4096) -> None:
    """Keep the constants of a graph with ``least`` elements and more in half precision.

    They are computed with in single precision: ONNX Runtime makes floats of them when it loads.
    """
    model = onnx.load(str(path))
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    for initializer in list(graph.initializer):
        value = numpy_helper.to_array(initializer)
        if value.dtype != np.float32 or value.size < least:
            continue
        name = initializer.name
        graph.initializer.remove(initializer)
        small = numpy_helper.from_array(value.astype(np.float16), f"{name}.half")
        graph.initializer.append(small)
        nodes.append(helper.make_node("Cast", [small.name], [name], to=onnx.TensorProto.FLOAT))
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, str(path))


def _constant_weight(
    node: onnx.NodeProto,
    weights: dict[str, onnx.TensorProto],
    transposed: dict[str, onnx.NodeProto],
) -> tuple[str, NDArray[np.float32]] | None:
    """Name and (K, N) value of the second operand of a product, when it is a constant matrix."""
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    name = node.input[1]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if attributes.get("transA") or attributes.get("alpha", 1.0) != 1.0:
        return None
    flip = bool(attributes.get("transB", 0))
    if name in transposed:
        name, flip = transposed[name].input[0], not flip
    if name not in weights:
        return None
    value = numpy_helper.to_array(weights[name])
    if value.ndim != 2 or value.dtype != np.float32:
        return None
    return name, np.ascontiguousarray(value.T if flip else value)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and weights that nothing reads any more."""
    outputs = {o.name for o in graph.output}
    while True:
        used = {name for node in graph.node for name in node.input} | outputs
        dead = [n for n in graph.node if not any(o in used for o in n.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    for initializer in [i for i in graph.initializer if i.name not in used]:
        graph.initializer.remove(initializer)
