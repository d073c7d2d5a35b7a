"""What hours of audio must not change: memory, and what is heard."""

from __future__ import annotations

import gc
import importlib.util
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from loquent.engine.recognizer import Recognizer
from loquent.export import hours

Float32 = NDArray[np.float32]
Speak = Callable[..., Float32]
# Sentences with pauses that end them; 19.88 s, so that the chunks fall differently every time.
TALK = [(0, 0.2), (1, 0.12), (2, 0.1), (0, 0.1), (3, 0.2), (0, 2.4), (5, 0.3), (7, 0.2), (0, 3.3)]
LOOP = [*TALK, (4, 0.1), *TALK, (0, 5.94)]


@pytest.mark.parametrize(("decoder", "vad"), [("rnnt", None), ("joint", None), ("ctc", "silero")])
def test_memory_is_flat(tiny: Recognizer, tones: Speak, decoder: str, vad: str | None) -> None:
    if vad and importlib.util.find_spec("silero_vad") is None:
        pytest.skip("needs silero-vad")
    # As long as 16 chunks: buffers are as full each time it is over.
    loop = tones([*LOOP, (0, 0.6)], noise=0.001)
    assert len(loop) == 16 * 20480
    stream = tiny.stream(decoder=decoder, chunk_ms=1280, vad=vad)

    def listen(times: int) -> None:
        for _ in range(times):
            for at in range(0, len(loop), 16000):
                stream.accept(loop[at : at + 16000])
                while stream.ready:
                    tiny.step([stream])
                stream.events()
            stream.finalize()

    listen(3)  # the detector's second state and every buffer have had their turn
    tracemalloc.start()
    try:
        listen(1)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        listen(12)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 4 minutes; a byte for every sample would be 3.9 million, an int for every frame 180,000. What
    # bounded memos take, once, is 50,000 after other tests have filled them with untraced things.
    assert after - before < 90_000


# A beam may still weigh what it half heard in the pause, and how much quiet speech is raised
# depends on what was loud before it, so parts are not bound to be the same with these.
@pytest.mark.parametrize("decoder", ["rnnt", "ctc"])
def test_parts_that_begin_where_the_encoder_starts_anew_are_heard_the_same(
    write_bundle: Callable[..., Path], tones: Speak, tmp_path: Path, decoder: str
) -> None:
    babble = Recognizer.load(write_bundle(tmp_path / "babble", babble=True))
    audio: Sequence[Float32] = [tones(LOOP)]
    run = hours.listen(
        babble, audio, hours=0.05, decoder=decoder, chunk_ms=320, vad=None, parts=5, stretches=4
    )
    assert run.parts >= 4
    assert run.part_words > 20
    assert (run.same, run.part_errors) == (run.parts, 0)
    assert len(run.stretches) == 4
    assert "parts are the same alone" in hours.table(run)
