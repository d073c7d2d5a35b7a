"""State on its way into batches and out of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loquent.engine.session import Slot, State, stack, unstack


def batch(count: int, first: int) -> State:
    rows = np.arange(first, first + count)
    return {"a": rows.astype(np.float32)[:, None] * np.ones((1, 3), np.float32), "b": rows}


def values(state: State) -> list[int]:
    np.testing.assert_array_equal(state["a"], state["b"][:, None] * np.ones((1, 3)))
    return [int(value) for value in state["b"]]


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_any_rows_in_any_order(sizes: list[int], data: st.DataObject) -> None:
    slots: dict[int, Slot] = {}
    for i, size in enumerate(sizes):
        slots.update(
            zip(range(10 * i, 10 * i + size), unstack(batch(size, 10 * i), size), strict=True)
        )
    order = data.draw(st.permutations(sorted(slots)))
    chosen = order[: data.draw(st.integers(1, len(order)))]
    assert values(stack([slots[key] for key in chosen])) == chosen


def test_a_lone_stream_is_not_copied() -> None:
    state = batch(3, 0)
    slots = unstack(state, 3)
    assert np.shares_memory(stack([slots[1]])["a"], state["a"])


def test_the_same_batch_again_is_not_copied() -> None:
    state = batch(3, 0)
    slots = unstack(state, 3)
    assert stack(slots) is state
    assert stack(slots[::-1]) is not state
