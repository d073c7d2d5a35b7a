"""The ring buffer against the plainest model of it: a growing list."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loquent.engine.errors import BufferFull
from loquent.engine.ring import Ring


@given(
    capacity=st.integers(2, 40),
    moves=st.lists(st.tuples(st.booleans(), st.integers(0, 50)), max_size=80),
)
def test_ring_holds_what_a_list_would(capacity: int, moves: list[tuple[bool, int]]) -> None:
    ring = Ring(capacity, high=capacity, low=capacity // 2)
    signal: list[float] = []
    tail = 0
    for push, count in moves:
        if push:
            new = np.arange(len(signal), len(signal) + count, dtype=np.float32)
            if count > capacity - (len(signal) - tail):
                with pytest.raises(BufferFull, match=f"got {count} samples"):
                    ring.push(new)
            else:
                ring.push(new)
                signal.extend(new)
        else:
            count = min(count, ring.fill)
            np.testing.assert_array_equal(ring.read(count), signal[tail : tail + count])
            ring.drop(count)
            tail += count
        assert (ring.tail, ring.head) == (tail, len(signal))
        assert ring.free == capacity - ring.fill


def test_overflow_consumes_nothing() -> None:
    ring = Ring(8, high=6, low=2)
    ring.push(np.arange(5, dtype=np.float32))
    with pytest.raises(BufferFull, match=r"got 4 samples, expected no more than 3 .*5 of 8"):
        ring.push(np.full(4, -1, np.float32))
    assert (ring.tail, ring.head) == (0, 5)
    ring.push(np.arange(5, 8, dtype=np.float32))
    np.testing.assert_array_equal(ring.read(8), np.arange(8))


def test_reads_across_the_seam_are_contiguous() -> None:
    ring = Ring(8, high=8, low=0)
    ring.push(np.arange(6, dtype=np.float32))
    ring.drop(5)
    ring.push(np.arange(6, 12, dtype=np.float32))
    samples = ring.read(7)
    np.testing.assert_array_equal(samples, np.arange(5, 12))
    assert samples.flags.c_contiguous


def test_water_marks_have_hysteresis() -> None:
    ring = Ring(10, high=8, low=3)
    wants = []
    ring.push(np.zeros(7, np.float32))
    wants.append(ring.wants_audio)
    ring.push(np.zeros(1, np.float32))
    wants.append(ring.wants_audio)
    ring.drop(4)
    wants.append(ring.wants_audio)
    ring.drop(1)
    wants.append(ring.wants_audio)
    assert wants == [True, False, False, True]


def test_reading_does_not_let_the_reader_write() -> None:
    ring = Ring(4, high=4, low=0)
    ring.push(np.ones(4, np.float32))
    with pytest.raises(ValueError, match="read-only"):
        ring.read(2)[0] = 5
