"""Windows: where they lie, and that the last frame of every signal leaves the encoder."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loquent.engine.chunker import Chunker, flush_frames

PAD = np.array([-1.0], np.float32)


@given(
    total=st.integers(0, 200),
    segment=st.sampled_from([4, 8, 32, 128]),
    right=st.integers(0, 12),
    packets=st.lists(st.integers(0, 50), min_size=1, max_size=5),
)
def test_windows_cover_the_signal_once(
    total: int, segment: int, right: int, packets: list[int]
) -> None:
    flush = 5
    chunker = Chunker(segment=segment, right=right, flush=flush, pad_frame=PAD)
    signal = np.arange(total, dtype=np.float32)[:, None]
    padded = np.concatenate([signal, np.tile(PAD, (segment + right + flush + 1, 1))])
    encoded = count = 0

    def drain() -> None:
        nonlocal encoded, count
        while chunker.ready:
            window = chunker.window()
            start = count * segment
            assert window.shape == (segment + right, 1)
            np.testing.assert_array_equal(window, padded[start : start + segment + right])
            assert chunker.start == start
            assert chunker.padded == (start + segment + right > total)
            encoded += chunker.valid
            chunker.advance()
            count += 1

    position = 0
    for turn in range(1000):
        size = packets[turn % len(packets)] or 1
        chunker.accept(signal[position : position + size])
        position += size
        drain()
        if position >= total:
            break
    assert not chunker.exhausted
    chunker.finish()
    chunker.finish()
    drain()
    assert chunker.exhausted
    # Every real frame and the flush, not one frame more: that would make the end depend on the
    # chunk size. Nothing at all for no audio.
    assert encoded == (total + flush if total else 0)


def test_flush_grows_with_what_the_model_looks_ahead() -> None:
    lengths = [
        flush_frames(subsampling=4, right_context=right, lookahead=ahead)
        for right, ahead in ((0, 0), (0, 1), (8, 1))
    ]
    assert lengths == [4, 5, 13]


def test_window_may_be_asked_for_again() -> None:
    chunker = Chunker(segment=4, right=1, flush=4, pad_frame=PAD)
    chunker.accept(np.arange(6, dtype=np.float32)[:, None])
    np.testing.assert_array_equal(chunker.window(), chunker.window())
    assert chunker.needed == 5
    chunker.advance()
    assert chunker.needed == 9
    assert not chunker.ready


def test_frames_after_finish_are_our_mistake() -> None:
    chunker = Chunker(segment=4, right=1, flush=4, pad_frame=PAD)
    chunker.finish()
    with pytest.raises(AssertionError, match="after finish"):
        chunker.accept(np.zeros((1, 1), np.float32))
