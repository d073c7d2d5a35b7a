"""``loquent data score``: wrong labels score worst, and a killed call goes on."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from loquent.clients.cli import main
from loquent.engine.audio import load_audio


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """The bundled clip's first seconds, with its text, with another, and with far too much."""
    with as_file(files("loquent.engine") / "samples" / "morning.flac") as path:
        pcm = load_audio(path)
    soundfile.write(tmp_path / "clip.wav", pcm[: 4 * 16000], 16000)
    soundfile.write(tmp_path / "tiny.wav", np.zeros(1600), 16000)
    rows = [("right", "clip.wav", 4.0), ("the cat sat on the mat all day", "clip.wav", 4.0)]
    rows.append(("far more than a tenth of a second can hold", "tiny.wav", 0.1))
    out = tmp_path / "in.jsonl"
    out.write_text(
        "".join(
            json.dumps({"audio": a, "text": t, "duration": d, "speaker": "x", "source": "s"}) + "\n"
            for t, a, d in rows
        )
    )
    return out


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_wrong_labels_score_worst(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, kept = tmp_path / "deep" / "out.jsonl", tmp_path / "deep" / "kept.jsonl"
    assert main(["data", "score", str(manifest), "-o", str(out)]) == 0
    first = rows(out)
    heard = first[0]["ctc_heard"]
    assert heard
    # What the model hears is the best label there is.
    lines = rows(manifest)
    lines[0]["text"] = heard
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["data", "score", str(manifest), "-o", str(out)]) == 1
    assert "holds scores of other rows" in capsys.readouterr().err
    out.unlink()
    options = ["--least", "-2", "--keep", str(kept)]
    assert main(["data", "score", str(manifest), "-o", str(out), *options]) == 0
    right, wrong, impossible = rows(out)
    assert 0 > right["ctc_score"] > -1
    assert right["ctc_cer"] == 0
    assert wrong["ctc_score"] < right["ctc_score"] - 2
    assert impossible["ctc_score"] == -99
    # Everything else is as it was, and the audio is found from where the file is.
    assert right["speaker"] == "x"
    assert (out.parent / right["audio"]).resolve() == tmp_path / "clip.wav"
    assert rows(kept) == [right]
    assert "-99.00" in capsys.readouterr().out


def test_a_killed_call_goes_on(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["data", "score", str(manifest), "-o", str(out)]) == 0
    whole = out.read_text()
    first = whole.splitlines(keepends=True)[0]
    out.write_text(first + '{"audio": "clip.wav", "te')  # killed while it wrote
    asked: list[str] = []
    from loquent.models import labels

    fit = labels.fit

    def counted(model: Any, utterance: Any) -> Any:
        asked.append(utterance.text)
        return fit(model, utterance)

    monkeypatch.setattr(labels, "fit", counted)
    assert main(["data", "score", str(manifest), "-o", str(out)]) == 0
    assert out.read_text() == whole
    assert len(asked) == 2


def test_mistakes(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*argv: object) -> str:
        assert main(["data", "score", *map(str, argv)]) == 1
        return capsys.readouterr().err

    out = tmp_path / "out.jsonl"
    assert "no such manifest" in error("gone.jsonl", "-o", out)
    assert "gone" in error(manifest, "-o", out, "--model", tmp_path / "gone")
    out.write_text("{}\n")
    assert "not written by `loquent data score`" in error(manifest, "-o", out)
    out.unlink()
    elsewhere = tmp_path / "x" / "kept.jsonl"
    keep = ("--least", -1, "--keep", elsewhere)
    assert "expected a file beside" in error(manifest, "-o", out, *keep)
