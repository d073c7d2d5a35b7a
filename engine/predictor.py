"""The transducer's predictor and joiner as functions of plain arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from loquent.engine.bundle import Bundle, RnntSpec
from loquent.engine.session import Array, Device, Graph, State, initial_state, state_tensors

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


class OnnxPredictor:
    """Predictor and joiner graphs of a bundle. Holds no state of any stream.

    Shapes: B streams, J joiner size, V tokens.

    Raises:
        BundleError: a graph does not belong to the manifest.
        MissingExtra: ONNX Runtime is not installed.
    """

    def __init__(
        self, bundle: Bundle, spec: RnntSpec, *, threads: int = 1, device: Device = "cpu"
    ) -> None:
        vector = ("float32", (None, spec.joiner_dim))
        self._names = [state.name for state in spec.states]
        self._outputs = ["pred", *("next." + name for name in self._names)]
        self._predictor = Graph(
            bundle,
            spec.predictor,
            inputs={"token": ("int64", (None,)), **state_tensors("state.", spec.states)},
            outputs={"pred": vector, **state_tensors("next.", spec.states)},
            threads=threads,
            device=device,
        )
        self._joiner = Graph(
            bundle,
            spec.joiner,
            inputs={"enc": vector, "pred": vector},
            outputs={"logits": ("float32", (None, len(bundle.tokens)))},
            threads=threads,
            device=device,
        )
        self.initial: State = initial_state(spec.states)
        pred, state = self.step(np.array([bundle.blank], np.int64), self.initial)
        self._predictor.check_result({"pred": pred}, {"pred": ("float32", (1, spec.joiner_dim))})
        self._predictor.check_result(state, state_tensors("", spec.states, batch=1))
        self._joiner.check_result(
            {"logits": self.join(pred, pred)}, {"logits": ("float32", (1, len(bundle.tokens)))}
        )

    def step(self, token: Int64, state: Mapping[str, Array]) -> tuple[Float32, State]:
        """Take one token per stream, (B,) and state -> (B, J) and the next state."""
        inputs: dict[str, Array] = {"state." + name: array for name, array in state.items()}
        result = self._predictor.run(self._outputs, {"token": token, **inputs})
        return result["pred"], {name: result["next." + name] for name in self._names}

    def join(self, enc: Float32, pred: Float32) -> Float32:
        """Logits (B, V) of encoder frames (B, J) and predictions (B, J)."""
        return self._joiner.run(["logits"], {"enc": enc, "pred": pred})["logits"]
