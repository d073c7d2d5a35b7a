"""From recordings to captions: trained, exported, streamed."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import pytest

from loquent.engine.audio import load_audio
from loquent.engine.recognizer import Recognizer
from loquent.models.data import read_manifest

pytestmark = pytest.mark.slow


def test_the_loss_falls_and_the_training_set_is_learnt(run: Path) -> None:
    with (run / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    ctc, rnnt = ([float(row[loss]) for row in rows] for loss in ("ctc", "rnnt"))
    assert ctc == sorted(ctc, reverse=True)
    assert ctc[-1] < 0.2
    assert rnnt[-1] < 0.5 * max(rnnt)  # a running mean, which begins with the first steps' zeros
    assert float(rows[0]["wer"]) > 0.5
    assert float(rows[-1]["wer"]) == 0


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("decoder", ["rnnt", "ctc"])
@pytest.mark.parametrize("chunk_ms", [80, 320])
def test_a_clip_that_it_was_trained_on_is_transcribed(
    precision: str, decoder: str, chunk_ms: int, corpus: Path, request: pytest.FixtureRequest
) -> None:
    exported: Any = request.getfixturevalue(precision)
    recognizer = Recognizer.load(exported.folder)
    assert recognizer.bundle.precision == precision
    for utterance in read_manifest(corpus)[:6]:
        finals = recognizer.transcribe(
            load_audio(utterance.audio), chunk_ms=chunk_ms, decoder=decoder
        )
        assert " ".join(final.text for final in finals) == utterance.text
        words = [word for final in finals for word in final.words]
        assert all(0 <= a.start < a.end <= utterance.duration for a in words)
        assert all(a.start < b.start for a, b in itertools.pairwise(words))
