"""Evaluation streams clips side by side and adds up what jiwer would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jiwer
import pytest

from loquent.engine.audio import load_audio
from loquent.engine.recognizer import Recognizer
from loquent.export.evaluate import Result, as_json, evaluate, main, table, transcribe_all
from loquent.models.data import Utterance, read_manifest
from loquent.models.scoring import Score

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recognizer(fp32: Any) -> Recognizer:
    return Recognizer.load(fp32.folder)


@pytest.fixture(scope="module")
def utterances(corpus: Path) -> list[Utterance]:
    return read_manifest(corpus)


@pytest.mark.parametrize("decoder", ["rnnt", "ctc"])
@pytest.mark.parametrize("batch", [1, 5, 100])
def test_clips_side_by_side_are_clips_one_by_one(
    recognizer: Recognizer, utterances: list[Utterance], decoder: str, batch: int
) -> None:
    expected = [
        " ".join(
            final.text
            for final in recognizer.transcribe(load_audio(u.audio), chunk_ms=80, decoder=decoder)
        )
        for u in utterances
    ]
    got = transcribe_all(recognizer, utterances, decoder=decoder, chunk_ms=80, batch=batch)
    assert got == expected


def test_scores_are_jiwers_by_source(recognizer: Recognizer, utterances: list[Utterance]) -> None:
    # Wrong transcripts for some, so that there is something to count.
    wrong = [
        Utterance(u.audio, "ba ba kiwi" if i % 3 == 0 else u.text, u.source, u.duration)
        for i, u in enumerate(utterances)
    ]
    result = evaluate(recognizer, wrong, decoder="ctc", chunk_ms=320)
    heard = transcribe_all(recognizer, wrong, decoder="ctc", chunk_ms=320)
    for source in ("even", "odd"):
        pairs = [(u.text, h) for u, h in zip(wrong, heard, strict=True) if u.source == source]
        references, hypotheses = (list(side) for side in zip(*pairs, strict=True))
        score = result.scores[source]
        assert score.utterances == len(pairs) == 12
        assert score.wer == pytest.approx(jiwer.wer(references, hypotheses))
        assert score.cer == pytest.approx(jiwer.cer(references, hypotheses))
        assert score.wer > 0
    assert result.total.words == sum(len(u.text.split()) for u in wrong)
    assert (result.bundle, result.precision, result.chunk_ms) == ("toy", "fp32", 320)


RESULTS = [
    Result(
        bundle="en",
        precision=precision,
        decoder="rnnt",
        chunk_ms=160.0,
        scores={"b": Score(1, 4, 2, 16, 1), "a": Score(1, 2, 3, 8, 2)},
    )
    for precision in ("fp32", "int8")
]


def test_table() -> None:
    assert table(RESULTS).splitlines() == [
        "| precision | decoder | chunk ms | a | b | all |",
        "|---|---|---|---|---|---|",
        "| fp32 | rnnt | 160 | 50.0 / 37.5 | 25.0 / 12.5 | 33.3 / 20.8 |",
        "| int8 | rnnt | 160 | 50.0 / 37.5 | 25.0 / 12.5 | 33.3 / 20.8 |",
    ]


def test_json_is_one_line_with_the_numbers_of_the_table() -> None:
    text = as_json(RESULTS)
    assert "\n" not in text
    first = json.loads(text)["results"][0]
    assert first == {
        "precision": "fp32",
        "decoder": "rnnt",
        "chunk_ms": 160.0,
        "wer": 0.33333,
        "cer": 0.20833,
        "sources": {
            "a": {"wer": 0.5, "cer": 0.375, "words": 2},
            "b": {"wer": 0.25, "cer": 0.125, "words": 4},
        },
    }


def test_command(fp32: Any, int8: Any, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--chunk-ms", "80", "--chunk-ms", "320", "--decoder", "ctc"]
    bundles = ["--bundle", str(fp32.folder), "--bundle", str(int8.folder)]
    assert main([str(corpus), *bundles, *options]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells[0] == ["precision", "decoder", "chunk ms", "even", "odd", "all"]
    assert [row[:3] for row in cells[2:]] == [
        [precision, "ctc", chunk] for precision in ("fp32", "int8") for chunk in ("80", "320")
    ]
    assert [row["wer"] for row in json.loads(last)["results"]] == [0.0] * 4


def test_everything_the_bundle_offers_is_the_default(
    fp32: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "one.jsonl"
    first = json.loads(corpus.read_text().splitlines()[0])
    manifest.write_text(json.dumps(first | {"audio": str(corpus.parent / first["audio"])}))
    assert main([str(manifest), "--bundle", str(fp32.folder)]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert {(row["decoder"], row["chunk_ms"]) for row in rows} == {
        (decoder, chunk)
        for decoder in ("rnnt", "ctc", "ctc-beam")
        for chunk in (40, 80, 160, 320, 640, 1280)
    }


def test_mistakes(
    fp32: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*argv: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([str(a) for a in argv])
        assert exit_.value.code == 1
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("loquent evaluate: ")
        return message

    bundle = ("--bundle", fp32.folder)
    assert "gone.jsonl: no such manifest" in error("gone.jsonl", *bundle)
    assert "gone" in error(corpus, "--bundle", tmp_path / "gone")
    assert "got chunk_ms 50.0, expected one of 40, 80" in error(corpus, *bundle, "--chunk-ms", 50)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl: no usable row" in error(empty, *bundle)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"audio": "gone.wav", "text": "a", "duration": 1}')
    assert "gone.wav: No such file" in error(broken, *bundle)
