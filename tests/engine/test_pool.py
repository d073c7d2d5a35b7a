"""The rows of the encoder's states."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loquent.engine.bundle import StateSpec
from loquent.engine.pool import Pool, Slot

LENGTH = 5
SPECS = (
    StateSpec(name="ring", shape=(2, LENGTH, 3), dtype="float32", init=0, ring=1),
    StateSpec(name="half", shape=(3,), dtype="float32", init=0, ring=0, every=2),
    StateSpec(name="plain", shape=(3,), dtype="float32", init=7),
    StateSpec(name="processed_frames", shape=(), dtype="int64", init=0),
)


def advance(pool: Pool, slots: list[Slot], count: int, ages: list[int]) -> list[Slot]:
    """As an encoder whose frame n is full of n, with a frame of right context behind."""
    owned = pool.own(slots)
    frames = np.array(ages)[:, None] + np.arange(count + 1)
    frames[:, count] = -1
    new = np.broadcast_to(frames[:, None, :, None], (len(slots), 2, count + 1, 3))
    following = {
        "ring": new.astype(np.float32),
        "half": (frames[:, :-1:2] // 2).astype(np.float32),
        "plain": np.repeat(np.array(ages, np.float32)[:, None], 3, axis=1),
        "processed_frames": np.array(ages) + count,
    }
    pool.write(pool.rows(owned), following)
    return owned


@given(
    steps=st.lists(st.tuples(st.sets(st.integers(0, 3), min_size=1), st.integers(1, 7)), max_size=9)
)
def test_the_latest_frames_of_each_stream_are_in_its_own_ring(
    steps: list[tuple[set[int], int]],
) -> None:
    pool = Pool(SPECS)
    slots, ages = [pool.fresh] * 4, [0] * 4
    for members, count in steps:
        chosen = sorted(members)
        after = advance(pool, [slots[i] for i in chosen], 2 * count, [ages[i] for i in chosen])
        for i, slot in zip(chosen, after, strict=True):
            slots[i], ages[i] = slot, ages[i] + 2 * count
    for slot, age in zip(slots, ages, strict=True):
        state = slot.state()
        assert int(state["processed_frames"][0]) == age
        for length, row, count in (
            (LENGTH, state["ring"][0, 1, :, 2], age),
            (3, state["half"][0], age // 2),
        ):
            expected = np.zeros(length)
            for frame in range(max(0, count - length), count):
                expected[frame % length] = frame
            np.testing.assert_array_equal(row, expected)
    assert pool.used == sum(age > 0 for age in ages)


def test_a_row_is_free_once_its_stream_is_gone_and_clean_for_the_next() -> None:
    pool = Pool(SPECS)
    [first] = advance(pool, [pool.fresh], 4, [0])
    row = first.row
    del first
    assert pool.used == 0
    [second] = pool.own([pool.fresh])
    assert second.row == row
    assert not second.state()["ring"].any()
    np.testing.assert_array_equal(second.state()["plain"], [[7, 7, 7]])


def test_a_fork_goes_its_own_way() -> None:
    pool = Pool(SPECS)
    [trunk] = advance(pool, [pool.fresh], 2, [0])
    branch = trunk.fork()
    before = trunk.state()
    advance(pool, [branch], 4, [2])
    for name, array in trunk.state().items():
        np.testing.assert_array_equal(array, before[name])
    assert int(branch.state()["processed_frames"][0]) == 6
    assert pool.fresh.fork() is pool.fresh


def test_it_grows_with_the_streams_and_keeps_their_states() -> None:
    pool = Pool(SPECS)
    new = pool.fresh.state()
    slots = [pool.put(new | {"plain": np.full((1, 3), i, np.float32)}) for i in range(30)]
    for i, slot in enumerate(slots):
        assert float(slot.state()["plain"][0, 0]) == i
    assert pool.used == 30


def test_a_state_that_does_not_fit_is_refused() -> None:
    pool = Pool(SPECS)
    state = pool.put(pool.fresh.state()).state()
    with pytest.raises(ValueError, match="broadcast"):
        pool.put(state | {"plain": np.zeros((1, 4), np.float32)})
    assert pool.used == 0
