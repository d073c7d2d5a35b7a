"""A stream that is written down and read elsewhere goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loquent.engine import Hotword, snapshot
from loquent.engine.endpoint import EndpointRules
from loquent.engine.errors import SnapshotError
from loquent.engine.events import Event, Final, Finalized
from loquent.engine.ngram import Ngram
from loquent.engine.recognizer import Recognizer
from loquent.engine.stream import Stream

Float32 = NDArray[np.float32]
Speak = Callable[..., Float32]

SPEECH = [(1 + i % 8, 0.2) for i in range(8)] + [(0, 1.1)] + [(1 + i % 7, 0.15) for i in range(12)]


@pytest.fixture(scope="module")
def again(tiny_bundle: Path) -> Recognizer:
    """Another process's recogniser of the same bundle."""
    return Recognizer.load(tiny_bundle)


def run(
    recognizer: Recognizer,
    stream: Stream,
    pcm: Float32,
    packet: int,
    finalize_at: int,
    cuts: dict[int, Recognizer] | None = None,
) -> list[Event]:
    """Events of the whole; before packets in `cuts` the stream moves to another recogniser."""
    events: list[Event] = []
    for number, at in enumerate(range(0, len(pcm), packet)):
        if cuts and number in cuts:
            data = recognizer.snapshot(stream)
            recognizer = cuts[number]
            stream = recognizer.restore(data)
        stream.accept(pcm[at : at + packet])
        if at <= finalize_at < at + packet:
            stream.finalize()
        if number % 3:  # so that some cuts come while chunks wait
            while stream.ready:
                recognizer.step([stream])
        if number % 2:  # ... and some while events do
            events += stream.events()
    stream.finish()
    while stream.ready:
        recognizer.step([stream])
    return events + stream.events()


@pytest.mark.parametrize("decoder", ["rnnt", "ctc", "ctc-beam", "rnnt-beam", "joint"])
@pytest.mark.parametrize("seed", range(3))
def test_moved_anywhere_the_events_are_the_same(
    tiny: Recognizer, again: Recognizer, tones: Speak, decoder: str, seed: int
) -> None:
    if decoder not in tiny.bundle.decoders:
        pytest.skip(f"the bundle has no {decoder}")
    rng = random.Random(f"{decoder} {seed}")
    pcm = tones(SPEECH)
    options: dict[str, Any] = {"decoder": decoder, "chunk_ms": rng.choice([80, 160, 320])}
    if seed:
        options["hotwords"] = [Hotword(phrase="bana kiwi", boost=2.0)]
        options["blank_penalty"] = 0.5
    packet, finalize_at = rng.randrange(900, 4000), rng.choice([-1, rng.randrange(len(pcm))])
    whole = run(tiny, tiny.stream(**options), pcm, packet, finalize_at)
    assert sum(isinstance(event, Final) for event in whole) >= 2
    assert any(isinstance(event, Finalized) for event in whole) == (finalize_at >= 0)
    count = len(pcm) // packet
    cuts = {number: rng.choice([tiny, again]) for number in rng.sample(range(count), 5)}
    assert run(tiny, tiny.stream(**options), pcm, packet, finalize_at, cuts) == whole
    everywhere = dict.fromkeys(range(count), again)
    assert run(tiny, tiny.stream(**options), pcm, packet, finalize_at, everywhere) == whole


def test_rules_that_changed_stay_changed(tiny: Recognizer, again: Recognizer, tones: Speak) -> None:
    def stream() -> Stream:
        fresh = tiny.stream(chunk_ms=80)
        fresh.set_endpoint(EndpointRules(trailing_silence=2.0))
        return fresh

    pcm = tones(SPEECH)
    whole = run(tiny, stream(), pcm, 2000, -1)
    assert sum(isinstance(event, Final) for event in whole) == 1
    assert run(tiny, stream(), pcm, 2000, -1, dict.fromkeys(range(5, 20, 3), again)) == whole


def test_words_put_right_stay_right(
    write_bundle: Callable[..., Path], tmp_path: Path, tones: Speak
) -> None:
    nothing = np.zeros(4, np.float16)
    lm = Ngram(["<unk>", "<s>", "banne", "kiwi"], nothing - 3, nothing, ()).to_bytes()

    def spelling(manifest: dict[str, Any]) -> None:
        (tmp_path / "spelt" / "lm.npz").write_bytes(lm)
        manifest["lm"] = {"file": "lm.npz", "sha256": hashlib.sha256(lm).hexdigest()}
        manifest["lm"]["spelling"] = {"reach": 0.25}

    folder = write_bundle(tmp_path / "spelt", change=spelling)
    one, other = Recognizer.load(folder), Recognizer.load(folder)
    pcm = tones(SPEECH)

    def stream() -> Stream:
        return one.stream(decoder="joint", chunk_ms=160)

    whole = run(one, stream(), pcm, 2000, len(pcm) // 3)
    texts = [event.text for event in whole if isinstance(event, Final)]
    assert any("banne kiwi" in text for text in texts), texts
    cuts = dict.fromkeys(range(len(pcm) // 2000), other)
    assert run(one, stream(), pcm, 2000, len(pcm) // 3, cuts) == whole
    # A session's own hotwords go along, and what they name is right.
    options: dict[str, Any] = {"hotwords": [Hotword(phrase="bana", boost=1.0)], "decoder": "joint"}
    whole = run(one, one.stream(**options), pcm, 2000, -1)
    assert any("bana" in event.text for event in whole if isinstance(event, Final))
    assert run(one, one.stream(**options), pcm, 2000, -1, cuts) == whole


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_a_resampled_stream_says_the_same(
    tiny: Recognizer, again: Recognizer, tones: Speak, rate: int
) -> None:
    """soxr's filter starts anew a little earlier: samples agree to float32's last bits."""
    pcm = tones(SPEECH, sample_rate=rate)
    packet = rate // 7
    whole = run(tiny, tiny.stream(sample_rate=rate), pcm, packet, -1)
    cuts = dict.fromkeys(range(1, len(pcm) // packet, 4), again)
    moved = run(tiny, tiny.stream(sample_rate=rate), pcm, packet, -1, cuts)
    texts = [
        [(e.text, e.start, e.end) for e in es if isinstance(e, Final)] for es in (whole, moved)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) >= 2


def test_another_bundle_or_version_is_refused(
    tiny: Recognizer, babble: Recognizer, tones: Speak, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = tiny.stream()
    stream.accept(tones(SPEECH))
    data = tiny.snapshot(stream)
    with pytest.raises(SnapshotError, match="another bundle"):
        babble.restore(data)
    monkeypatch.setattr(snapshot, "VERSION", 99)
    with pytest.raises(SnapshotError, match="version 3, expected 99"):
        tiny.restore(data)


def test_damage_is_one_kind_of_error(tiny: Recognizer, tones: Speak) -> None:
    stream = tiny.stream(decoder="rnnt")
    stream.accept(tones(SPEECH))
    tiny.step([stream])
    data = tiny.snapshot(stream)
    rng = random.Random(3)
    for bad in (b"", b"PK", data[: len(data) // 2], bytes(100)):
        with pytest.raises(SnapshotError):
            tiny.restore(bad)
    for _ in range(40):
        changed = bytearray(data)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        with contextlib.suppress(SnapshotError):
            tiny.restore(bytes(changed))
    with pytest.raises(SnapshotError, match="at most"):
        tiny.restore(bytes(snapshot.MAX_BYTES + 1))


def forged(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    with np.load(io.BytesIO(data)) as archive:
        arrays = {name: archive[name] for name in archive.files}
    head = json.loads(arrays.pop("json").tobytes())
    change(head)
    buffer = io.BytesIO()
    np.savez(buffer, json=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
    return buffer.getvalue()


def test_nothing_but_known_classes_comes_out_of_a_snapshot(tiny: Recognizer) -> None:
    data = tiny.snapshot(tiny.stream())

    def foreign(head: dict[str, Any]) -> None:
        head["objects"][0][1] = "subprocess:Popen"

    def fewer(head: dict[str, Any]) -> None:
        del head["objects"][0][2]["_received"]

    with pytest.raises(SnapshotError, match="damaged"):
        tiny.restore(forged(data, foreign))
    with pytest.raises(SnapshotError, match=r"another release.*_received"):
        tiny.restore(forged(data, fewer))
    assert isinstance(tiny.restore(forged(data, lambda head: None)), Stream)


def test_a_new_field_is_covered_or_an_error(tiny: Recognizer) -> None:
    """Whoever adds state to a stream finds it in the snapshot, or hears that it is not."""
    stream = tiny.stream()
    stream.transcript._segment = 7
    stream.transcript._echo._said = (5, 6)
    moved = tiny.restore(tiny.snapshot(stream))
    assert (moved.transcript._segment, moved.transcript._echo._said) == (7, (5, 6))

    class Novelty:
        pass

    stream.transcript._echo._said = (Novelty(),)  # type: ignore[assignment]
    with pytest.raises(SnapshotError, match="Novelty"):
        tiny.snapshot(stream)


def test_a_snapshot_is_small_and_leaves_the_stream_alone(tiny: Recognizer, tones: Speak) -> None:
    pcm = tones(SPEECH)
    stream = tiny.stream()
    stream.accept(pcm[:16000])
    tiny.step([stream])
    data = tiny.snapshot(stream)
    assert data == tiny.snapshot(stream)
    assert len(data) < 200_000
    # No table that all streams share is in it.
    assert "ngram" not in json.dumps(_head(data)).lower()


def _head(data: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(data)) as archive:
        return json.loads(archive["json"].tobytes())  # type: ignore[no-any-return]
