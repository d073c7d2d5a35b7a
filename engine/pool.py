"""Where the encoder's states of all streams lie: one array for each state, a row for each stream.

A row stays where it is for as long as its stream lives. States that are rings (most of the bytes:
the attention's keys and values) are read there by the graph, and a step writes its own frames into
them, so nothing is gathered or copied for whoever shares a batch, and memory is flat: a row per
stream, used again by the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from loquent.engine.bundle import PROCESSED, StateSpec
from loquent.engine.session import Array, State

_FIRST = 8  # rows to begin with; there are as many again whenever they run out


class Slot:
    """One stream's state: its row, which is free again once the slot is gone.

    ``Pool.fresh`` is that of every new stream and has no row yet.
    """

    __slots__ = ("__weakref__", "_pool", "row")

    def __init__(self, pool: Pool, row: int | None) -> None:
        self._pool, self.row = pool, row

    def __del__(self) -> None:
        if self.row is not None:
            self._pool._free.append(self.row)  # atomic: the last owner may be any thread

    def state(self) -> State:
        """A copy, as a batch of one."""
        return self._pool.read([self])

    def fork(self) -> Slot:
        """The same state in a row of its own."""
        return self if self.row is None else self._pool.put(self.state())


class Pool:
    """The states of all streams of one encoder. For the thread that runs the encoder.

    Args:
        specs: of the states.
    """

    def __init__(self, specs: Sequence[StateSpec]) -> None:
        self._specs = specs
        self._rings = {spec.name: spec for spec in specs if spec.ring is not None}
        self._arrays: State = {}
        self._free: list[int] = []
        self._size = 0
        self.fresh = Slot(self, None)

    @property
    def used(self) -> int:
        """Rows that belong to a stream."""
        return self._size - len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return sum(int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in self._specs)

    def own(self, slots: Sequence[Slot]) -> list[Slot]:
        """The same with a row for each that has none."""
        return [self._new() if slot.row is None else slot for slot in slots]

    def put(self, state: Mapping[str, Array]) -> Slot:
        """A new row with this state, a batch of one."""
        slot = self._new()
        for name, array in self._arrays.items():
            array[slot.row] = state[name][0]
        return slot

    def read(self, slots: Sequence[Slot]) -> State:
        """Copies of these streams' states, batch first."""
        rows = self.rows(self.own(slots)) if slots else np.zeros(0, np.int64)
        return {name: array[rows] for name, array in self._arrays.items()}

    def inputs(
        self, rows: NDArray[np.int64], *, in_place: bool = True
    ) -> tuple[State, NDArray[np.int64]]:
        """For the graph: rings as they lie, the other states of these rows as a batch; and rows.

        Args:
            rows: of the batch's streams.
            in_place: the graph can read this memory. A device of its own would copy all of it, so
                it gets the rings of the batch only.
        """
        state = {
            name: array if in_place and name in self._rings else array[rows]
            for name, array in self._arrays.items()
        }
        return state, rows if in_place else np.arange(len(rows))

    def write(self, rows: NDArray[np.int64], following: Mapping[str, Array]) -> None:
        """What came out of the graph: frames to go into the rings, and the next other states."""
        if self._rings:
            before = self._arrays[PROCESSED][rows]
            write_rings(self._rings.values(), self._arrays, rows, before, following)
        for name, array in self._arrays.items():
            if name not in self._rings:
                array[rows] = following[name]

    @staticmethod
    def rows(slots: Sequence[Slot]) -> NDArray[np.int64]:
        """Their rows, (B,)."""
        return np.array([slot.row for slot in slots], np.int64)

    def _new(self) -> Slot:
        if not self._free:
            self._grow()
        slot = Slot(self, self._free.pop())
        for spec in self._specs:
            self._arrays[spec.name][slot.row] = spec.init
        return slot

    def _grow(self) -> None:
        size = max(_FIRST, 2 * self._size)
        for spec in self._specs:
            array = np.zeros((size, *spec.shape), spec.dtype)
            if self._size:
                array[: self._size] = self._arrays[spec.name]
            self._arrays[spec.name] = array
        self._free += range(size - 1, self._size - 1, -1)
        self._size = size


def write_rings(
    specs: Iterable[StateSpec],
    rings: Mapping[str, Array],
    rows: NDArray[np.int64],
    before: NDArray[np.int64],
    following: Mapping[str, Array],
) -> None:
    """Write a window's frames, but for its right context's, to where they belong.

    Args:
        specs: of the rings.
        rings: (P, ...) each, to be written to.
        rows: (B,) that are meant.
        before: (B,) ``processed_frames`` before the window.
        following: what the graph gave out.
    """
    counted = int((following[PROCESSED] - before)[0])
    spans: dict[tuple[int, int], list[tuple[int, slice, slice]]] = {}
    for spec in specs:
        assert spec.ring is not None, "a ring"
        axis = spec.ring + 1
        ring, new = rings[spec.name].swapaxes(1, axis), following[spec.name].swapaxes(1, axis)
        key = ring.shape[1], spec.every
        if key not in spans:
            spans[key] = list(_spans(key[0], counted // spec.every, before // spec.every))
        for i, to, part in spans[key]:
            ring[rows[i], to] = new[i, part]


def _spans(
    length: int, count: int, before: NDArray[np.int64]
) -> Iterator[tuple[int, slice, slice]]:
    """Stream, slots of a ring and the frames that go there: in one piece, or two at the end."""
    first = max(0, count - length)  # no more fit
    for i, start in enumerate(((before + first) % length).tolist()):
        middle = first + min(count - first, length - start)
        yield i, slice(start, start + middle - first), slice(first, middle)
        if middle < count:
            yield i, slice(0, count - middle), slice(middle, count)
