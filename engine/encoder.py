"""The encoder as a function: ``step(window, right_context, state) -> (frames, state)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from loquent.engine.bundle import PROCESSED, Bundle, StateSpec
from loquent.engine.errors import BundleError
from loquent.engine.pool import Pool, Slot, write_rings
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
Int64 = NDArray[np.int64]

# Feature frames, of all streams together, that go through the graph at once.
_FRAMES = 480


class OnnxEncoder:
    """The encoder graph of a bundle. Holds no state of any stream.

    Shapes: B streams, T = segment + right_context + lookahead feature frames, F features, V tokens,
    J joiner size, K = segment / subsampling encoder frames.

    Raises:
        BundleError: the graph does not belong to the manifest.
        MissingExtra: ONNX Runtime is not installed.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 1, device: Device = "cpu") -> None:
        spec = bundle.encoder
        self._spec = spec
        self._heads = _heads(bundle, batch=None, frames=None)
        self._next = ["next." + state.name for state in spec.states]
        self._rings = [state for state in spec.states if state.ring is not None]
        self._in_place = device == "cpu"
        features = bundle.features.n_mels
        self._graph = Graph(
            bundle,
            spec.graph,
            inputs={
                "window": ("float32", (None, None, features)),
                "right_context": ("int64", ()),
                **({"rows": ("int64", (None,))} if self._rings else {}),
                **state_tensors("state.", spec.states),
            },
            outputs={**self._heads, **_following("next.", spec.states)},
            threads=threads,
            device=device,
        )
        self.initial: State = initial_state(spec.states)
        self._try(bundle, features)
        self.pool = Pool(spec.states)

    @property
    def heads(self) -> list[str]:
        """Names of all there are."""
        return list(self._heads)

    def advance(
        self, window: Float32, right_context: int, slots: Sequence[Slot], outputs: Sequence[str]
    ) -> tuple[dict[str, Float32], Advance]:
        """Encode one window of each of B streams whose states are in the pool.

        Args:
            window, right_context, outputs: as of ``step``.
            slots: of the pool, each once.

        Returns:
            Frames by head, and what is to be kept. Until it is, nothing has changed.
        """
        owned = self.pool.own(slots)
        rows = self.pool.rows(owned)
        parts: list[tuple[dict[str, Float32], Int64, State]] = []
        # A batch that the processor's cache does not hold is slower than two that it holds.
        most = max(1, _FRAMES // window.shape[1])
        count = -(-len(rows) // most)
        for part in np.array_split(np.arange(len(rows)), count):
            at = slice(part[0], part[-1] + 1)
            state, inside = self.pool.inputs(rows[at], in_place=self._in_place)
            frames, following = self._run(window[at], right_context, state, inside, outputs)
            parts.append((self._own(frames, window, right_context), rows[at], following))
        heads = {
            name: np.concatenate([frames[name] for frames, _, _ in parts])
            if count > 1
            else parts[0][0][name]
            for name in outputs
        }
        return heads, Advance(self.pool, owned, [(at, following) for _, at, following in parts])

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
            Frames by head, ``ctc`` (B, K, V) log-probabilities and ``joiner`` (B, K, J); and the
            next state. The arrays passed in are not changed.
        """
        heads = self.heads if outputs is None else list(outputs)
        rows = np.arange(len(window))
        frames, following = self._run(window, right_context, state, rows, heads)
        after = following | {spec.name: state[spec.name].copy() for spec in self._rings}
        if self._rings:
            write_rings(self._rings, after, rows, state[PROCESSED], following)
        return self._own(frames, window, right_context), after

    def _own(
        self, frames: Mapping[str, Float32], window: Float32, right_context: int
    ) -> dict[str, Float32]:
        """Without the right context's frames, which older graphs give out, too."""
        segment = window.shape[1] - right_context - self._spec.lookahead
        count = segment // self._spec.subsampling
        return {name: rows[:, :count] for name, rows in frames.items()}

    def _run(
        self,
        window: Float32,
        right_context: int,
        state: Mapping[str, Array],
        rows: Int64,
        heads: Sequence[str],
    ) -> tuple[dict[str, Float32], State]:
        inputs: dict[str, Array] = {"state." + name: array for name, array in state.items()}
        inputs["window"] = window
        inputs["right_context"] = np.array(right_context, np.int64)
        if self._rings:
            inputs["rows"] = rows
        result = self._graph.run([*heads, *self._next], inputs)
        frames = {name: result[name] for name in heads}
        return frames, {spec.name: result["next." + spec.name] for spec in self._spec.states}

    def _try(self, bundle: Bundle, features: int) -> None:
        """One run on silence: catches what symbolic axes hide, and warms the session up."""
        spec = self._spec
        segment, right = min(spec.segments), max(spec.right_contexts)
        window = np.zeros((2, segment + right + spec.lookahead, features), np.float32)
        state = {name: np.repeat(array, 2, axis=0) for name, array in self.initial.items()}
        try:
            frames, _ = self._run(window, right, state, np.arange(2), self.heads)
            _, after = self.step(window, right, state)
        except Exception as exc:  # ONNX Runtime's own errors have no common base class
            raise BundleError(
                f"{self._graph.where}: a trial run with two streams failed ({exc}); export the "
                "bundle again, with a dynamic batch and segment"
            ) from exc
        own, whole = segment // spec.subsampling, (segment + right) // spec.subsampling
        count = own if all(rows.shape[1:2] == (own,) for rows in frames.values()) else whole
        self._graph.check_result(frames, _heads(bundle, batch=2, frames=count))
        self._graph.check_result(after, state_tensors("", spec.states, batch=2))


class Advance:
    """What a window brought the states of some streams, not yet written."""

    def __init__(
        self, pool: Pool, slots: Sequence[Slot], parts: Sequence[tuple[Int64, Mapping[str, Array]]]
    ) -> None:
        self._pool, self._slots, self._parts = pool, slots, parts

    def keep(self) -> Sequence[Slot]:
        """Write it; the streams' slots from here on."""
        for rows, following in self._parts:
            self._pool.write(rows, following)
        return self._slots


def _following(prefix: str, specs: Sequence[StateSpec]) -> dict[str, Tensor]:
    """The graph's outputs that follow the states; of rings, frames of the window."""
    return {
        prefix + spec.name: (
            spec.dtype,
            (None, *(None if axis == spec.ring else n for axis, n in enumerate(spec.shape))),
        )
        for spec in specs
    }


def _heads(bundle: Bundle, *, batch: int | None, frames: int | None) -> dict[str, Tensor]:
    heads: dict[str, Tensor] = {}
    if bundle.has_ctc:
        heads["ctc"] = ("float32", (batch, frames, len(bundle.tokens)))
    if bundle.rnnt is not None:
        heads["joiner"] = ("float32", (batch, frames, bundle.rnnt.joiner_dim))
    return heads
