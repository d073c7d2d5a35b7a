"""Stable partials: what is committed never changes, whatever the decoder and the knob."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loquent.engine.errors import ConfigError
from loquent.engine.events import Event, Final, Partial
from loquent.engine.recognizer import Recognizer
from loquent.export.stability import Watch, unstable

Float32 = NDArray[np.float32]
Speak = Callable[..., Float32]
Run = Callable[..., list[Event]]

sounds = st.lists(
    st.tuples(st.integers(0, 8), st.sampled_from([0.04, 0.1, 0.15])) | st.just((0, 1.0)),
    min_size=4,
    max_size=16,
)


@settings(max_examples=30, derandomize=True)
@given(
    story=sounds,
    decoder=st.sampled_from(["rnnt", "ctc", "rnnt-beam", "ctc-beam", "joint"]),
    stability=st.sampled_from([0.0, 0.04, 0.2, 0.6]),
    chunk_ms=st.sampled_from([40, 80, 320]),
)
def test_committed_text_never_changes(
    babble: Recognizer,
    tones: Speak,
    run: Run,
    story: list[tuple[int, float]],
    decoder: str,
    stability: float,
    chunk_ms: int,
) -> None:
    watch = Watch()
    stream = babble.stream(decoder=decoder, stability=stability, chunk_ms=chunk_ms)
    for event in run(babble, stream, tones(story, noise=0.01), [1600]):
        watch.see(event, 0.0)
    assert watch.broken == 0
    if decoder in ("rnnt", "ctc"):
        assert watch.unstable == 0  # words only grow


def test_a_shorter_horizon_commits_sooner(babble: Recognizer, tones: Speak, run: Run) -> None:
    pcm = tones([(k % 8 + 1, 0.1) for k in range(40)], noise=0.01)

    def committed(stability: float) -> int:
        stream = babble.stream(decoder="ctc-beam", stability=stability, chunk_ms=80)
        events = run(babble, stream, pcm, [1600])
        return sum(len(event.committed) for event in events if isinstance(event, Partial))

    counts = [committed(stability) for stability in (0.1, 0.5, 1.5, 0.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 1.5 * counts[-1]


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf")])
def test_it_is_a_time(babble: Recognizer, wrong: float) -> None:
    with pytest.raises(ConfigError, match=r"got stability .*, expected seconds, 0 or above"):
        babble.stream(stability=wrong)


@pytest.mark.parametrize(
    ("shown", "after", "expected"),
    [
        ("", "a", (0, 0)),
        ("a b", "a b c", (0, 0)),
        ("a walk", "a walking on", (0, 1)),
        ("a b c", "a x c", (2, 0)),
        ("a b", "a", (1, 0)),
        ("a walk b", "a walking b", (2, 0)),
    ],
)
def test_what_counts_as_unstable(shown: str, after: str, expected: tuple[int, int]) -> None:
    assert unstable(shown.split(), after.split()) == expected


def test_the_watch() -> None:
    from loquent.engine.events import Word

    def words(text: str) -> tuple[Word, ...]:
        return tuple(Word(text=w, start=k, end=k + 1) for k, w in enumerate(text.split()))

    def partial(committed: str, tentative: str) -> Partial:
        both = words(f"{committed} {tentative}")
        return Partial(
            segment=0, start=0, end=2, committed=committed, tentative=tentative, words=both
        )

    watch = Watch()
    watch.see(partial("", "a wal"), 2.0)
    watch.see(partial("a", "walks"), 3.0)
    watch.see(partial("a", "talks"), 4.0)
    final = words("a talks")
    watch.see(Final(segment=0, start=0, end=2, text="A talks.", words=final, reason="end"), 5.0)
    assert (watch.unstable, watch.grown, watch.words, watch.broken) == (1, 1, 2, 0)
    assert watch.lags == [2.0, 3.0]
    watch.see(partial("a", ""), 6.0)
    watch.see(partial("b", ""), 7.0)
    assert watch.broken == 1
