"""``loquent data check`` finds what was put in, and says nothing about what is in order."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from loquent.clients.cli import main
from loquent.models.data import DataError
from loquent.models.datacheck import Report, check, remedy
from loquent.models.datareport import as_html, as_text

WORDS = "one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905


class Corpus:
    """Manifests in a folder, with one recording for all rows unless they bring their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        self.record("ok.wav", 0.1 * rng.standard_normal(32000))

    def record(self, name: str, samples: Any, rate: int = 16000) -> None:
        soundfile.write(self.folder / name, samples, rate)

    def row(self, i: int, **changes: Any) -> dict[str, Any]:
        text = " ".join(WORDS[(i * k) % 12] for k in (1, 5, 7)) + f" {WORDS[i // 12 % 12]}"
        return {
            "audio": "ok.wav",
            "text": text,
            "duration": 2.0,
            "lang": "en",
            "speaker": f"s{i % 7}",
            "source": "made",
        } | changes

    def write(self, name: str, rows: list[dict[str, Any]]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


def run(corpus: Corpus, train: list[Any], dev: list[Any], **options: Any) -> Report:
    options = {"audio": False} | options
    return check(
        [corpus.write("train.jsonl", train)],
        [corpus.write("dev.jsonl", dev)],
        workers=1,
        **options,
    )


def titles(report: Report, level: str) -> str:
    return "\n".join(f.title for f in report.findings if f.level == level)


def good(corpus: Corpus) -> tuple[list[Any], list[Any]]:
    train = [corpus.row(i) for i in range(60)]
    dev = [
        corpus.row(i, text=f"{WORDS[i]} {WORDS[-i]} ten ten {WORDS[i]}", speaker=f"d{i}")
        for i in range(12)
    ]
    return train, dev


def test_good_data_pass(corpus: Corpus) -> None:
    for i in range(72):  # a recording each: the same one on both sides is a leak
        corpus.record(f"{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(32000))
    train, dev = good(corpus)
    for i, row in enumerate([*train, *dev]):
        row["audio"] = f"{i}.wav"
    report = run(corpus, train, dev, audio=True, hours={"en": 0.03}, vocabulary=["▁one", *"wofhr"])
    missing = set("".join(WORDS)) - set("onewofhr")
    assert titles(report, "error") == (
        f"the model's vocabulary lacks {len(missing)} characters of the data"
    )
    report = run(corpus, train, dev, audio=True, hours={"en": 0.03}, vocabulary=WORDS)
    assert report.passed
    assert titles(report, "error") == titles(report, "warning") == ""
    assert report.clips == {"train": 60, "dev": 12}
    assert report.speakers == {"train": 7, "dev": 12}
    assert report.hours["train"]["en"] == pytest.approx(60 * 2 / 3600)


def test_alphabet(corpus: Corpus) -> None:
    train, dev = good(corpus)
    dev[0]["text"] = "café ten ﬁve one"
    report = run(corpus, train, [*dev, corpus.row(3, text="ça va ten ten", speaker="x")])
    assert "dev has 5 characters that train has not" in titles(report, "error")
    found = next(f for f in report.findings if "dev has" in f.title)
    assert "write 'fi' for 'ﬁ'" in found.remedy
    assert any("LATIN SMALL LETTER E WITH ACUTE): 1 times" in e for e in found.examples)
    train[0]["text"] = unicodedata.normalize("NFD", "né one two three")
    report = run(corpus, train, dev)
    assert "train: 1 texts are not in NFC" in titles(report, "note")
    assert "fewer than 5 times in train" in titles(report, "warning")


@pytest.mark.parametrize(
    ("character", "known", "expected"),
    [
        ("é", "e", "write 'e' for 'é'"),
        ("ǹ", "n", "write 'n' for 'ǹ'"),
        ("ﬁ", "fi", "write 'fi' for 'ﬁ'"),
        ("é", "x", "add text with 'é' to train"),
        ("ß", "s", "add text with 'ß'"),
    ],
)
def test_remedy(character: str, known: str, expected: str) -> None:
    assert remedy(character, known).startswith(expected)


def test_lengths_rates_and_hours(corpus: Corpus) -> None:
    train, dev = good(corpus)
    train += [
        corpus.row(1, text=""),
        corpus.row(2, duration=0.1),
        corpus.row(3, duration=31.0),
        corpus.row(4, text="one " * 20),
        corpus.row(5, text="in 1999 we"),
    ]
    report = run(corpus, train, dev, hours={"en": 5, "de": 1})
    warnings = titles(report, "warning")
    assert "train: 1 of 65 clips have no text" in warnings
    assert "train: 1 of 65 clips are shorter than 0.2 s" in warnings
    assert "train: 1 of 65 clips are longer than 30 s" in warnings
    assert "clips have an odd number of characters a second" in warnings
    assert "train: 1 texts have digits" in warnings
    errors = titles(report, "error")
    assert "h to train on, expected 5" in errors
    assert "de: 0.00 h to train on, expected 1" in errors
    # A tenth of rows without text is no accident.
    report = run(corpus, [*train, *(corpus.row(i, text="") for i in range(10))], dev)
    assert "have no text" in titles(report, "error")


def test_leaks(corpus: Corpus) -> None:
    train, dev = good(corpus)
    report = run(corpus, train, [*dev, corpus.row(1, audio="gone.wav")])
    assert "12 recordings of dev are in train too" in titles(report, "error")
    warnings = titles(report, "warning")
    assert "1 of 13 texts of dev (over three words) stand in train too" in warnings
    assert "1 of 13 clips of dev are by 1 speakers of train" in warnings
    report = run(corpus, train, [corpus.row(i) for i in range(4)])
    assert "4 of 4 texts of dev" in titles(report, "error")
    report = run(corpus, train, [*dev, corpus.row(1, lang="de", speaker="")])
    assert "dev has 0.00 h of de, which train has none of" in titles(report, "error")
    assert "1 rows name no speaker" in titles(report, "note")


def test_recordings(corpus: Corpus) -> None:
    train, dev = good(corpus)
    corpus.record("silent.wav", np.zeros(32000))
    corpus.record("loud.wav", np.sign(np.sin(np.arange(32000))))
    corpus.record("short.wav", 0.1 * np.ones(8000))
    corpus.record("phone.wav", 0.1 * np.ones(16000), rate=8000)
    (corpus.folder / "broken.wav").write_text("no audio")
    for i, name in enumerate(["silent", "loud", "short", "phone", "broken", "gone"]):
        train[i]["audio"] = f"{name}.wav"
    report = run(corpus, train, dev, audio=True)
    errors, warnings = titles(report, "error"), titles(report, "warning")
    assert "2 of 72 recordings cannot be read" in errors
    assert "1 of 72 recordings are not as long as their row says" in errors
    assert "1 of 72 recordings are nearly silent" in warnings
    assert "1 of 72 recordings clip" in warnings
    assert "1 of 72 recordings have less than 16 kHz" in titles(report, "note")


def test_reports_say_the_same_and_escape(corpus: Corpus) -> None:
    train, dev = good(corpus)
    dev[0]["text"] = "<script>ß"
    train.append({"text": "a"})
    report = run(corpus, train, dev)
    text, page = as_text(report), as_html(report, "a <b>")
    assert text.splitlines()[-1].startswith("FAILED: ")
    assert "KeyError 'audio'" in text
    assert "&lt;script&gt;" in page or "<script>" not in page
    assert "<script>" not in page
    assert "a &lt;b&gt;" in page
    assert page.count("<article") == len(report.findings)
    assert "http" not in page  # loads nothing


def test_command(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    train, dev = good(corpus)
    for row in dev:
        row["audio"] = "dev.wav"
    corpus.record("dev.wav", 0.1 * np.ones(32000))
    paths = [
        "--train",
        str(corpus.write("train.jsonl", train)),
        "--dev",
        str(corpus.write("dev.jsonl", dev)),
    ]
    page = corpus.folder / "report.html"
    options = ["--no-audio", "--html", str(page)]
    assert main(["data", "check", *paths, *options]) == 0
    assert "passed: 0 errors" in capsys.readouterr().out
    assert "train.jsonl, dev.jsonl" in page.read_text()
    assert main(["data", "check", *paths, "--no-audio", "--model", "en"]) == 0
    assert main(["data", "check", *paths, "--no-audio", "--hours", "en=9"]) == 1
    assert main(["data", "check", *paths, "--hours", "en"]) == 1
    assert "expected LANG=H" in capsys.readouterr().err
    assert main(["data", "check", "--train", "gone.jsonl", *paths[2:]]) == 1
    assert "gone.jsonl: cannot be read" in capsys.readouterr().err
    assert main(["data"]) == 2
    assert main(["data", "--help"]) == 0


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read"):
        check([tmp_path / "gone.jsonl"], [])
