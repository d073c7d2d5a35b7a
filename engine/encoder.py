"""The encoder as a function: ``step(window, right_context, state) -> (frames, state)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from loquent.engine.bundle import Bundle
from loquent.engine.errors import BundleError
from loquent.engine.session import (
    Array,
    Device,
    Graph,
    State,
    Tensor,
    initial_state,
    state_tensors,
)

Float32 = NDArray[np.float32]


class OnnxEncoder:
    """The encoder graph of a bundle. Holds no state of any stream.

    Shapes: B streams, T = segment + right_context + lookahead feature frames, F features, V tokens,
    J joiner size, K = (segment + right_context) / subsampling encoder frames.

    Raises:
        BundleError: the graph does not belong to the manifest.
        MissingExtra: ONNX Runtime is not installed.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 1, device: Device = "cpu") -> None:
        spec = bundle.encoder
        self._spec = spec
        self._heads = _heads(bundle, batch=None, frames=None)
        self._next = ["next." + state.name for state in spec.states]
        features = bundle.features.n_mels
        self._graph = Graph(
            bundle,
            spec.graph,
            inputs={
                "window": ("float32", (None, None, features)),
                "right_context": ("int64", ()),
                **state_tensors("state.", spec.states),
            },
            outputs={**self._heads, **state_tensors("next.", spec.states)},
            threads=threads,
            device=device,
        )
        self.initial: State = initial_state(spec.states)
        self._try(bundle, features)

    def step(
        self,
        window: Float32,
        right_context: int,
        state: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
    ) -> tuple[dict[str, Float32], State]:
        """Encode one window of each of B streams.

        Args:
            window: (B, T, F) features.
            right_context: feature frames at the end of the window, without look-ahead, that are
                context only and come again in the next window.
            state: named arrays, batch first; ``initial`` for a new stream.
            outputs: names of the heads to fetch, all if None.

        Returns:
            Frames by head, ``ctc`` (B, K, V) log-probabilities and ``joiner`` (B, K, J), of which
            the last ``right_context / subsampling`` are context only; and the next state. The
            arrays passed in are not changed.
        """
        heads = list(self._heads) if outputs is None else list(outputs)
        inputs: dict[str, Array] = {"state." + name: array for name, array in state.items()}
        inputs["window"] = window
        inputs["right_context"] = np.array(right_context, np.int64)
        result = self._graph.run(heads + self._next, inputs)
        frames = {name: result[name] for name in heads}
        return frames, {spec.name: result["next." + spec.name] for spec in self._spec.states}

    def _try(self, bundle: Bundle, features: int) -> None:
        """One run on silence: catches what symbolic axes hide, and warms the session up."""
        spec = self._spec
        segment, right = min(spec.segments), max(spec.right_contexts)
        window = np.zeros((2, segment + right + spec.lookahead, features), np.float32)
        state = {name: np.repeat(array, 2, axis=0) for name, array in self.initial.items()}
        try:
            frames, after = self.step(window, right, state)
        except Exception as exc:  # ONNX Runtime's own errors have no common base class
            raise BundleError(
                f"{self._graph.where}: a trial run with two streams failed ({exc}); export the "
                "bundle again, with a dynamic batch and segment"
            ) from exc
        count = (segment + right) // spec.subsampling
        self._graph.check_result(frames, _heads(bundle, batch=2, frames=count))
        self._graph.check_result(after, state_tensors("", spec.states, batch=2))


def _heads(bundle: Bundle, *, batch: int | None, frames: int | None) -> dict[str, Tensor]:
    heads: dict[str, Tensor] = {}
    if bundle.has_ctc:
        heads["ctc"] = ("float32", (batch, frames, len(bundle.tokens)))
    if bundle.rnnt is not None:
        heads["joiner"] = ("float32", (batch, frames, bundle.rnnt.joiner_dim))
    return heads
