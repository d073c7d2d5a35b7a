"""ONNX graphs of a student: encoder, predictor, joiner.

Batch and window length are dynamic in one graph, so one bundle serves every chunk size. States are
named inputs ``state.<name>`` with outputs ``next.<name>``, batch first. States that are rings are
read where they lie: the input has a row for every stream there is, ``rows`` says which are meant,
and the output is the window's own frames, which whoever holds the rings writes into them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from loquent.models.frontend import ConvFrontend
from loquent.models.student import Student

OPSET = 20


class _EncoderGraph(nn.Module):
    """Window and states in; CTC log-probabilities, joiner projection and what follows out."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        self.names = list(student.encoder.state_shapes())

    def forward(
        self, window: Tensor, right_context: Tensor, rows: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        encoded, following = self.student.encoder.window(
            window, right_context, dict(zip(self.names, states, strict=True)), rows
        )
        heads = []
        if self.student.ctc is not None:
            heads.append(self.student.ctc_log_probs(encoded))
        if self.student.config.joiner_dim:
            heads.append(self.student.encoder_projection(encoded))
        return (*heads, *(following[name] for name in self.names))


class _Product(nn.Module):
    """A convolution over time as one matrix product, which int8 can have, and a batch is one.

    As a float convolution ONNX Runtime runs it stream by stream, for as long as half a layer takes.
    """

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        width, features, self.kernel = conv.weight.shape
        self.stride = conv.stride[0]
        self.linear = nn.Linear(self.kernel * features, width)
        with torch.no_grad():
            self.linear.weight.copy_(conv.weight.transpose(1, 2).flatten(1))
            assert conv.bias is not None, "those of the front end have one"
            self.linear.bias.copy_(conv.bias)

    def forward(self, x_BFT: Tensor) -> Tensor:
        x_BTF = x_BFT.transpose(1, 2)
        count = (x_BTF.shape[1] - self.kernel) // self.stride + 1
        first = torch.arange(count, device=x_BTF.device) * self.stride
        at = first[:, None] + torch.arange(self.kernel, device=x_BTF.device)
        windows = x_BTF.index_select(1, at.flatten())
        out: Tensor = self.linear(windows.reshape(x_BTF.shape[0], count, -1))
        return out.transpose(1, 2)


def _with_product(student: Student) -> Student:
    """A copy whose front end's second convolution is a product.

    The first stays one: it is a fifth of the work, and its input, a logarithm, does not take to
    int8 (half a point of WER).
    """
    frontend = student.encoder.frontend
    if not isinstance(frontend, ConvFrontend):
        return student
    product = _Product(frontend.conv2)
    student = copy.deepcopy(student)
    student.encoder.frontend.conv2 = product
    return student


class _PredictorGraph(nn.Module):
    def __init__(self, student: Student) -> None:
        super().__init__()
        self.predictor = student.predictor
        self.names = list(student.predictor.state_shapes())

    def forward(self, token: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        out, following = self.predictor.step(token, dict(zip(self.names, states, strict=True)))
        return (out, *(following[name] for name in self.names))


def export_graph(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    axes: tuple[object, ...],
    path: Path,
) -> None:
    """One graph, checked, with its weights inside the file.

    ``axes`` names the dynamic axes of each argument; those of the states form one tuple.
    """
    # The exporter reports its passes on stdout and through the root logger.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=axes,
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=False)
    onnx.checker.check_model(str(path))


class _JoinerGraph(nn.Module):
    """The joiner, whose inputs are no states."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.joiner = student.joiner

    def forward(self, enc: Tensor, pred: Tensor) -> Tensor:
        out: Tensor = self.joiner(enc, pred)
        return out


def export_encoder(student: Student, path: Path) -> None:
    """Write the encoder graph; its inputs and outputs are those of the bundle's manifest."""
    student = _with_product(student)
    encoder = student.encoder
    config = encoder.config
    batch, pool = Dim("batch", min=1), Dim("pool", min=1)
    time = Dim("time", min=config.subsampling + config.lookahead)
    window = torch.zeros(2, 3 * config.subsampling + config.lookahead, config.frontend.features)
    state = encoder.initial_state(2) | {n: encoder.initial_state(3)[n] for n in encoder.rings}
    names = list(state)
    heads = ["ctc"] if student.ctc is not None else []
    heads += ["joiner"] if student.config.joiner_dim else []
    export_graph(
        _EncoderGraph(student),
        (window, torch.tensor(config.subsampling), torch.arange(2), *state.values()),
        ["window", "right_context", "rows", *(f"state.{n}" for n in names)],
        [*heads, *(f"next.{n}" for n in names)],
        (
            {0: batch, 1: time},
            {},
            {0: batch},
            tuple({0: pool if n in encoder.rings else batch} for n in names),
        ),
        path,
    )


def export_predictor(student: Student, path: Path) -> None:
    """Write the predictor graph: ``token`` (B,) and states to ``pred`` (B, J) and states."""
    batch = Dim("batch", min=1)
    shapes = student.predictor.state_shapes()
    states = [torch.zeros((2, *shape), dtype=dtype) for shape, dtype in shapes.values()]
    export_graph(
        _PredictorGraph(student),
        (torch.zeros(2, dtype=torch.int64), *states),
        ["token", *(f"state.{n}" for n in shapes)],
        ["pred", *(f"next.{n}" for n in shapes)],
        ({0: batch}, tuple({0: batch} for _ in shapes)),
        path,
    )


def export_joiner(student: Student, path: Path) -> None:
    """Write the joiner graph: ``enc`` and ``pred`` (B, J) to ``logits`` (B, V)."""
    batch = Dim("batch", min=1)
    width = student.config.joiner_dim
    example = (torch.zeros(2, width), torch.zeros(2, width))
    export_graph(
        _JoinerGraph(student),
        example,
        ["enc", "pred"],
        ["logits"],
        ({0: batch}, {0: batch}),
        path,
    )


def set_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Store ``metadata`` in the graph's ``metadata_props``, in place of what the exporter notes.

    It notes for every node where in which source file it comes from: paths of this machine, which
    are nobody's business.
    """
    model = onnx.load(str(path))
    graph = model.graph
    values = (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer)
    for noted in (graph, *values):
        del noted.metadata_props[:]
        noted.ClearField("doc_string")
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, str(path))
