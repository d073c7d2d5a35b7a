"""Corpora of other forms to ours, through lhotse, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from loquent.clients.cli import main
from loquent.models.data import read_manifest

pytestmark = pytest.mark.filterwarnings("ignore")  # lhotse's own


def record(path: Path, seconds: float, seed: int = 0, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))
    soundfile.write(path, noise, rate)
    return path


def prepare(*argv: object) -> int:
    return main(["data", "prepare", *map(str, argv)])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    lines = []
    for i in range(5):
        record(tmp_path / "a" / f"{i}.wav", 1 + i / 10, i)
        row = {"id": f"u{i}", "audio": f"a/{i}.wav", "duration": 1 + i / 10, "text": f"Tést {i}a"}
        row |= {"lang": "en", "speaker": f"s{i % 2}", "source": "made", "licence": "CC0-1.0"}
        lines.append(json.dumps(row | {"accent": "us"}, ensure_ascii=False))
    path = tmp_path / "ours.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def test_round_trip_through_cuts(ours: Path, tmp_path: Path) -> None:
    cuts, back = tmp_path / "x" / "cuts.jsonl.gz", tmp_path / "y" / "back.jsonl"
    assert prepare("jsonl", ours, "-o", cuts) == 0
    assert prepare("lhotse", cuts, "-o", back) == 0
    # Every field as it was; the audio is found from the new place.
    for old, new in zip(rows(ours), rows(back), strict=True):
        assert (back.parent / new.pop("audio")).resolve() == ours.parent / old.pop("audio")
        assert new == old
    from lhotse import CutSet

    loaded = CutSet.from_file(cuts).to_eager()
    assert [c.supervisions[0].text for c in loaded] == [f"Tést {i}a" for i in range(5)]


def test_round_trip_through_shards(ours: Path, tmp_path: Path) -> None:
    shards, back = tmp_path / "shards", tmp_path / "back.jsonl"
    assert prepare("jsonl", ours, "-o", shards, "--shard-size", 2) == 0
    assert len(list(shards.glob("recording.*.tar"))) == 3
    assert prepare("lhotse", shards, "-o", back) == 0
    for old, new in zip(rows(ours), rows(back), strict=True):
        samples, rate = soundfile.read(back.parent / new.pop("audio"))
        expected, _ = soundfile.read(ours.parent / old.pop("audio"))
        assert rate == 16000
        np.testing.assert_allclose(samples, expected, atol=1e-4)
        assert new.items() >= old.items()


def test_kaldi_with_segments(tmp_path: Path) -> None:
    wav = record(tmp_path / "rec.wav", 4.0)
    folder = tmp_path / "kaldi"
    folder.mkdir()
    (folder / "wav.scp").write_text(f"rec {wav}\n")
    (folder / "segments").write_text("u1 rec 0.5 1.5\nu2 rec 2.0 3.25\n")
    (folder / "text").write_text("u1 hello there\nu2 good bye\n")
    (folder / "utt2spk").write_text("u1 anna\nu2 bob\n")
    out = tmp_path / "out.jsonl"
    options = ("--lang", "en", "--name", "kaldi", "--licence", "none")
    assert prepare("kaldi", folder, "-o", out, *options) == 0
    first, second = rows(out)
    assert (first["text"], first["speaker"], first["duration"]) == ("hello there", "anna", 1.0)
    assert (second["lang"], second["source"], second["licence"]) == ("en", "kaldi", "none")
    samples, _ = soundfile.read(out.parent / second["audio"])
    expected, _ = soundfile.read(wav)
    np.testing.assert_allclose(samples, expected[32000:52000], atol=1e-4)
    assert [u.text for u in read_manifest(out)] == ["hello there", "good bye"]


def test_commands_in_kaldis_list_are_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wav.scp").write_text(f"rec touch {tmp_path}/ran |\n")
    (tmp_path / "text").write_text("rec hello\n")
    assert prepare("kaldi", tmp_path, "-o", tmp_path / "out.jsonl") == 1
    assert "commands of strangers are not run" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_common_voice(tmp_path: Path) -> None:
    record(tmp_path / "clips" / "common_voice_1.mp3", 1.5)
    head = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\n"
    line = 'abc\tcommon_voice_1.mp3\tHe said "no".\t2\t0\tthirties\t\tUS English\ten\n'
    (tmp_path / "train.tsv").write_text(head + line)
    out = tmp_path / "out.jsonl"
    assert prepare("common-voice", tmp_path / "train.tsv", "-o", out) == 0
    (row,) = rows(out)
    assert row["audio"] == "clips/common_voice_1.mp3"
    assert row["text"] == 'He said "no".'
    assert (row["speaker"], row["accent"], row["lang"]) == ("abc", "US English", "en")
    assert row["duration"] == pytest.approx(1.5, abs=0.1)
    assert (row["source"], row["licence"]) == ("common-voice", "CC0-1.0")


def test_librispeech(tmp_path: Path) -> None:
    chapter = tmp_path / "train-clean-5" / "19" / "198"
    for i in range(2):
        record(chapter / f"19-198-000{i}.flac", 1.0 + i)
    (chapter / "19-198.trans.txt").write_text("19-198-0000 HELLO\n19-198-0001 GOOD DAY\n")
    out = tmp_path / "out.jsonl"
    assert prepare("librispeech", tmp_path, "-o", out, "--split", "train-clean-5") == 0
    found = sorted((r["text"], r["speaker"], r["duration"], r["audio"]) for r in rows(out))
    place = "train-clean-5/19/198/19-198-000"
    assert found == [
        ("GOOD DAY", "19", 2.0, f"{place}1.flac"),
        ("HELLO", "19", 1.0, f"{place}0.flac"),
    ]


def test_mistakes(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*argv: object) -> str:
        assert prepare(*argv, "-o", tmp_path / "out.jsonl") == 1
        return capsys.readouterr().err

    assert "no such file or folder" in error("kaldi", tmp_path / "gone")
    assert "not kaldi" in error("kaldi", tmp_path)
    assert "not lhotse" in error("lhotse", ours)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n")
    assert "not jsonl (KeyError" in error("jsonl", broken)
    assert not (tmp_path / "out.jsonl").exists()
