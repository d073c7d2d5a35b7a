"""The recurrent word model of a bundle as a function of plain arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from loquent.engine.bundle import Bundle, NeuralSpec
from loquent.engine.errors import BundleError
from loquent.engine.ngram import Ngram
from loquent.engine.session import Array, Device, Graph, State, initial_state, state_tensors

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


def words_sha256(words: Sequence[str]) -> str:
    """What ties a network to an n-gram, whose words it takes by their places."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


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
        if spec.words_sha256 != words_sha256(ngram.words):
            raise BundleError(
                f"{bundle.files.where}: {spec.graph.file} is made for an n-gram of other words "
                "than the bundle's; make it again with `loquent lm neural --write`"
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
        # A batch, and the last word there is.
        words = np.array([ngram.start[-1], len(ngram.words) - 1], np.int64)
        twice = {name: np.concatenate([array, array]) for name, array in self.initial.items()}
        try:
            logp, state = self.step(words, twice)
        except Exception as exc:  # ONNX Runtime's own errors have no common base class
            raise BundleError(f"{self._graph.where}: a trial run failed ({exc})") from exc
        self._graph.check_result({"logp": logp}, {"logp": ("float32", (2,))})
        self._graph.check_result(state, state_tensors("", spec.states, batch=2))

    def step(self, word: Int64, state: Mapping[str, Array]) -> tuple[Float32, State]:
        """Words (N,) and states before them -> their log-probabilities (N,) and states."""
        inputs: dict[str, Array] = {"state." + name: array for name, array in state.items()}
        result = self._graph.run(self._outputs, {"word": word, **inputs})
        return result["logp"], {name: result["next." + name] for name in self._names}
