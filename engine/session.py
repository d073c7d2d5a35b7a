"""ONNX Runtime: opening a graph of a bundle and holding it against the manifest."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loquent.engine.bundle import (
    META_FEATURES,
    META_SCHEMA,
    META_TOKENS,
    SCHEMA,
    Bundle,
    GraphFile,
    StateSpec,
)
from loquent.engine.errors import BundleError, ConfigError, MissingExtra

Array = NDArray[Any]
State = dict[str, Array]
"""Named arrays, batch first."""
Tensor = tuple[str, tuple[int | None, ...]]
"""Element type and shape; None for an axis of any length."""

Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = ("cpu", "cuda")
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_AGAIN = "export the bundle again"
_ONNX_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


class Graph:
    """One ONNX graph of a bundle, checked and ready to run.

    Args:
        bundle: that it belongs to.
        file: which of its files.
        inputs, outputs: what the graph must take and give; it may give more.
        threads: for the operators of one call. More than one pays only when few streams share
            many cores: batching streams is the better use of them.
        device: ``cpu`` or ``cuda``.

    Raises:
        BundleError: the graph does not belong to the manifest.
        ConfigError: this ONNX Runtime cannot use the device, or not for this bundle.
        MissingExtra: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        bundle: Bundle,
        file: GraphFile,
        *,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        threads: int,
        device: Device = "cpu",
    ) -> None:
        self.where = f"{bundle.files.where}: {file.file}"
        ort = onnxruntime()
        providers = _providers(ort, device)
        if device == "cuda" and bundle.precision == "int8":
            raise ConfigError(
                f"got device cuda and the int8 bundle {bundle.files.where}, whose products ONNX "
                "Runtime computes on the CPU only; use device cpu, or export the bundle without "
                "--int8"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Its warnings are about how a graph was written, which the reader of a log cannot change.
        options.log_severity_level = 3
        # Threads that wait busily would take the cores from the other sessions.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        data = bundle.graph(file)
        try:
            self._session = ort.InferenceSession(data, options, providers=providers)
        except Exception as exc:  # ONNX Runtime's own errors have no common base class
            raise BundleError(f"{self.where}: ONNX Runtime cannot load it ({exc})") from exc
        # Where CUDA's libraries are missing, ONNX Runtime only says so and goes on without.
        if device == "cuda" and _CUDA not in self._session.get_providers():
            raise ConfigError(
                "got device cuda, but ONNX Runtime found no CUDA device or not the CUDA and cuDNN "
                "libraries that it needs; its message is above. Look whether `nvidia-smi` shows a "
                "device and whether the extra [gpu] is installed, or use device cpu"
            )
        self._check_metadata(bundle)
        self._check_tensors("input", self._session.get_inputs(), inputs, closed=True)
        self._check_tensors("output", self._session.get_outputs(), outputs, closed=False)

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The named outputs."""
        return dict(zip(outputs, self._session.run(outputs, inputs), strict=True))

    def _check_metadata(self, bundle: Bundle) -> None:
        found = self._session.get_modelmeta().custom_metadata_map
        for key, expected, what in (
            (META_SCHEMA, str(SCHEMA), "for another bundle format"),
            (META_FEATURES, bundle.features.digest(), "for other features"),
            (META_TOKENS, bundle.tokens_sha256, "with other tokens"),
        ):
            if found.get(key) != expected:
                raise BundleError(
                    f"{self.where}: the graph was exported {what} than the manifest's: its "
                    f"metadata has {key} = {found.get(key)!r}, expected {expected!r}; {_AGAIN}"
                )

    def _check_tensors(
        self, kind: str, found: Sequence[Any], expected: Mapping[str, Tensor], *, closed: bool
    ) -> None:
        tensors = {
            tensor.name: (_ONNX_TYPES.get(tensor.type, tensor.type), tuple(tensor.shape))
            for tensor in found
        }
        if missing := sorted(expected.keys() - tensors.keys()):
            raise BundleError(
                f"{self.where}: the graph has no {kind} {', '.join(missing)}, which the manifest "
                f"asks for (it has {', '.join(sorted(tensors))}); {_AGAIN}"
            )
        if closed and (extra := sorted(tensors.keys() - expected.keys())):
            raise BundleError(
                f"{self.where}: the graph has the {kind} {', '.join(extra)}, of which the manifest "
                f"says nothing; {_AGAIN}"
            )
        for name, (dtype, shape) in expected.items():
            got_dtype, got_shape = tensors[name]
            # Axes with a name instead of a length are held against their values in the trial run.
            fits = len(got_shape) == len(shape) and all(
                want is None or not isinstance(got, int) or got == want
                for got, want in zip(got_shape, shape, strict=True)
            )
            if got_dtype != dtype or not fits:
                raise BundleError(
                    f"{self.where}: the {kind} {name} is {got_dtype} {_show(got_shape)}, expected "
                    f"{dtype} {_show(shape)} from the manifest; {_AGAIN}"
                )

    def check_result(self, result: Mapping[str, Array], expected: Mapping[str, Tensor]) -> None:
        """Hold arrays that came out of a trial run against their full shapes and types."""
        for name, (dtype, shape) in expected.items():
            array = result[name]
            if array.shape != shape or array.dtype != np.dtype(dtype):
                raise BundleError(
                    f"{self.where}: a trial run gave {name} as {array.dtype} {_show(array.shape)}, "
                    f"expected {dtype} {_show(shape)} from the manifest; {_AGAIN}"
                )


def initial_state(specs: Sequence[StateSpec]) -> State:
    """The state of one stream at its start, as a batch of one."""
    return {spec.name: np.full((1, *spec.shape), spec.init, spec.dtype) for spec in specs}


def state_tensors(
    prefix: str, specs: Sequence[StateSpec], batch: int | None = None
) -> dict[str, Tensor]:
    """The graph's inputs or outputs that carry these states."""
    return {prefix + spec.name: (spec.dtype, (batch, *spec.shape)) for spec in specs}


def _show(shape: Sequence[object]) -> str:
    return "[" + ",".join("?" if axis is None else str(axis) for axis in shape) + "]"


def _providers(ort: Any, device: Device) -> list[str]:
    if device not in DEVICES:
        raise ConfigError(f"got device {device!r}, expected {' or '.join(DEVICES)}")
    if device == "cpu":
        return [_CPU]
    if _CUDA not in ort.get_available_providers():
        raise ConfigError(
            "got device cuda, but this ONNX Runtime has only "
            f"{', '.join(ort.get_available_providers())}; `pip uninstall onnxruntime` and "
            "`pip install 'loquent[gpu]'` bring the one that has CUDA, or use device cpu"
        )
    # The libraries that pip installs lie where the loader does not look. It prints what it misses.
    with contextlib.redirect_stdout(sys.stderr):
        ort.preload_dlls()
    return [_CUDA, _CPU]


def onnxruntime() -> Any:
    """The module, with its telemetry off: it would report its use over the network.

    Raises MissingExtra.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        module = import_module("onnxruntime")
    except ImportError as exc:
        raise MissingExtra(
            'ONNX Runtime is not installed; install it with `pip install "loquent[cpu]"`, or '
            '`pip install "loquent[gpu]"` for CUDA (one of the two, never both)'
        ) from exc
    module.disable_telemetry_events()
    return module
