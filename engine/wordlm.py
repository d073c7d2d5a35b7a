"""The recurrent word model of a bundle as a function of plain arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from loquent.engine.bundle import Bundle, NeuralSpec
from loquent.engine.errors import BundleError
from loquent.engine.ngram import Ngram
from loquent.engine.session import Array, Device, Graph, State, initial_state, state_tensors

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


class OnnxWordModel:
    """The graph, see :class:`~loquent.engine.decode.neural.WordModel`. Holds no stream's state.

    Raises:
        BundleError: the graph belongs neither to the manifest nor to the n-gram.
        MissingExtra: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        bundle: Bundle,
        spec: NeuralSpec,
        ngram: Ngram,
        *,
        threads: int = 1,
        device: Device = "cpu",
    ) -> None:
        if spec.words != len(ngram.words):
            raise BundleError(
                f"{bundle.files.where}: {spec.graph.file} is made for an n-gram of {spec.words} "
                f"words, expected one for {len(ngram.words)}; make it again with `loquent lm "
                "neural --write`"
            )
        self._names = [state.name for state in spec.states]
        self._outputs = ["logp", *("next." + name for name in self._names)]
        self._graph = Graph(
            bundle,
            spec.graph,
            inputs={"word": ("int64", (None,)), **state_tensors("state.", spec.states)},
            outputs={"logp": ("float32", (None,)), **state_tensors("next.", spec.states)},
            threads=threads,
            device=device,
        )
        self.initial: State = initial_state(spec.states)
        # The last word there is, which a graph for fewer words would not have.
        logp, state = self.step(np.array([spec.words - 1], np.int64), self.initial)
        self._graph.check_result({"logp": logp}, {"logp": ("float32", (1,))})
        self._graph.check_result(state, state_tensors("", spec.states, batch=1))

    def step(self, word: Int64, state: Mapping[str, Array]) -> tuple[Float32, State]:
        """Words (N,) and states before them -> their log-probabilities (N,) and states."""
        inputs: dict[str, Array] = {"state." + name: array for name, array in state.items()}
        result = self._graph.run(self._outputs, {"word": word, **inputs})
        return result["logp"], {name: result["next." + name] for name in self._names}
