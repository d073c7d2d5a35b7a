"""Rules for word times and confidences: what is fitted is what was put in, and the command."""

from __future__ import annotations

import json
import math
import shutil
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pytest
import soundfile

from loquent.engine.bundle import Bundle
from loquent.engine.decode import Token
from loquent.engine.recognizer import Recognizer
from loquent.engine.words import PLAIN, WordRules
from loquent.export.bias import make_set
from loquent.export.calibration import fit_confidence, reliability
from loquent.export.reference import Times, align_hmm, read_times, write_times
from loquent.export.timing import Pair, errors, fit_timing
from loquent.export.words import main
from loquent.export.wordtrial import Heard, half
from loquent.models.data import DataError, Utterance
from loquent.models.text import normalise


def heard(rng: np.random.Generator, rules: WordRules) -> Heard:
    tokens = tuple(Token(1, i, -rng.exponential(1.0), agreed=rng.uniform(0.2, 1)) for i in range(2))
    right = rng.random() < rules.confidence(tokens)
    return Heard(text="x", tokens=tokens, following=None, right=right, reference=None)


def test_confidence_is_the_probability_of_being_right() -> None:
    rng = np.random.default_rng(0)
    true = WordRules(bias=2.0, least=1.0, odds=0.5, agreed=0.7)
    words = [heard(rng, true) for _ in range(6000)]
    rules = fit_confidence(words[:3000], PLAIN)
    before, after = (reliability(words[3000:], r) for r in (PLAIN, rules))
    assert after.ece < 0.04 < before.ece
    assert before.nce < after.nce
    assert before.auc < after.auc
    assert sum(count for _, _, count in after.bins) == after.words == 3000
    grid = [(a, b, s) for a in (-2.0, -0.5) for b in (-1.0, -0.1) for s in (0.3, 0.9)]
    for a, b, s in grid:
        tokens = [Token(1, 0, a), Token(1, 0, b, agreed=s)]
        assert rules.confidence(tokens) == pytest.approx(true.confidence(tokens), abs=0.08)


def test_no_weight_is_negative() -> None:
    rng = np.random.default_rng(1)
    words = []
    for _ in range(400):
        logp = -rng.exponential(1.0)
        right = rng.random() < 1 - math.exp(logp)  # sure words are wrong
        words.append(
            Heard(text="x", tokens=(Token(1, 0, logp),), following=None, right=right, reference=0)
        )
    rules = fit_confidence(words, PLAIN)
    assert (rules.least, rules.odds, rules.agreed) == (0, 0, 0)
    share = sum(word.right for word in words) / len(words)
    assert rules.confidence(words[0].tokens) == pytest.approx(share, abs=0.01)
    with pytest.raises(ValueError, match="words that are right and words that are wrong"):
        fit_confidence([word for word in words if word.right], PLAIN)


def test_times_are_fitted() -> None:
    rng = np.random.default_rng(2)
    found = []
    for _ in range(300):
        first = int(rng.integers(5, 100))
        last, characters = first + int(rng.integers(0, 8)), int(rng.integers(1, 5))
        start = first * 0.04 - 0.09 + rng.normal(0, 0.02)
        end = (last + 1) * 0.04 + 0.05 + 0.03 * characters + rng.normal(0, 0.02)
        following = last + int(rng.integers(1, 12))
        end = min(end, following * 0.04 - 0.09)
        found.append(
            Pair(
                first=first,
                last=last,
                following=following,
                characters=characters,
                start=start,
                end=max(start, end),
                duration=9.0,
            )
        )
    rules = fit_timing(found[:150], 0.04, PLAIN)
    assert rules.delay == pytest.approx(0.09, abs=0.01)
    assert rules.tail == pytest.approx(0.05, abs=0.03)
    assert rules.tail_character == pytest.approx(0.03, abs=0.015)
    start, end = errors(found[150:], 0.04, rules).medians()
    assert start < 0.02
    assert end < 0.025
    assert errors(found, 0.04, PLAIN).medians() > (start, end)
    with pytest.raises(ValueError, match="heard right in clips with a reference"):
        fit_timing([], 0.04, PLAIN)


def utterance(name: str, text: str = "a b") -> Utterance:
    return Utterance(Path("/x") / name, text, "s", 2.0)


def test_times_in_a_file(tmp_path: Path) -> None:
    times = (Times(text="a", start=0.1, end=0.2), Times(text="b", start=0.2, end=0.5))
    clips = [utterance("1.opus"), utterance("2.opus"), utterance("3.opus", "a c")]
    write_times(tmp_path / "t.jsonl", clips, [times, (), times])
    assert read_times(tmp_path / "t.jsonl", clips) == [times, (), ()]
    (tmp_path / "t.jsonl").write_text('{"audio": "x"}\n')
    with pytest.raises(DataError, match="expected JSON lines with audio and words"):
        read_times(tmp_path / "t.jsonl", clips)


def test_halves_are_about_equal_and_do_not_depend_on_the_folder() -> None:
    sides = [half(utterance(f"{i}.opus")) for i in range(200)]
    assert 70 < sum(sides) < 130
    assert sides[3] == half(Utterance(Path("/y/3.opus"), "c", "t", 1.0))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of six recordings that are the bundled one, some with words that are not said."""
    folder = tmp_path_factory.mktemp("clips")
    with as_file(files("loquent.engine") / "samples") as samples:
        pcm, rate = soundfile.read(samples / "morning.flac", dtype="float32")
        text = (samples / "morning.txt").read_text()
    rows = []
    for i in range(6):
        silence = np.zeros(rate * i // 7, np.float32)
        soundfile.write(folder / f"{i}.flac", np.concatenate([silence, pcm]), rate)
        said = text.replace("coat", "hat").replace("train", "plane")
        rows.append({"audio": f"{i}.flac", "text": said, "duration": len(pcm) / rate + i / 7})
    path = folder / "clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "en"
    shutil.copytree(Path(str(files("loquent.engine"))) / "bundles" / "en", folder)
    # In training there was no "nine", and all else often.
    rows = [json.loads(line) for line in clips.read_text().splitlines()]
    train = tmp_path / "train.jsonl"
    text = " ".join([rows[0]["text"].replace("nine", "ten")] * 3)
    train.write_text(json.dumps(rows[0] | {"text": f"{text} zebra"}) + "\n")
    options = [str(clips), "--decoder", "rnnt", "--align", "en", "--train", str(train)]
    options += ["--distractors", "1"]
    assert (
        main([*options, "--bundle", str(folder), "--report", str(tmp_path / "r"), "--write"]) == 0
    )
    table, line = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert "| rnnt |" in table
    found = json.loads(line)
    assert [row["distractors"] for row in found["hotwords"]] == [None, 1]
    assert all(row["rare"] == 6 for row in found["hotwords"])
    rows = found["words"]
    rules = Bundle.load(folder).word_rules("rnnt")
    assert rows["rnnt"]["rules"]["delay"] == rules.delay
    # The reference is the model's own, so its frames need next to no correction.
    assert abs(rules.delay) <= 0.1
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        "reliability.png",
        "times.png",
        "words.json",
        "words.md",
    ]
    with pytest.raises(SystemExit) as stopped:
        main([*options, "--write"])
    assert stopped.value.code == 1
    assert "--write needs --bundle FOLDER" in capsys.readouterr().err


def test_the_hidden_markov_models_find_the_words() -> None:
    pytest.importorskip("pocketsphinx")
    with as_file(files("loquent.engine") / "samples") as samples:
        text = normalise((samples / "morning.txt").read_text())
        clip = Utterance(samples / "morning.flac", text, "s", 10.0)
        strange = Utterance(samples / "morning.flac", "xqzv", "s", 10.0)
        times, nothing = align_hmm([clip, strange])
    assert nothing == ()
    assert [word.text for word in times] == text.split()
    edges = [edge for word in times for edge in (word.start, word.end)]
    assert edges == sorted(edges)
    assert 0 < edges[0] < 1


def test_the_bias_set() -> None:
    recognizer = Recognizer.load("en")
    clips = [utterance("1", "the xylem of naïve zebras"), utterance("2", "the the zebras")]
    train = [utterance("3", "the of the of the of zebras quince quince rhubarb")]
    found = make_set(clips, train, recognizer, most=2)
    # The letters of "naïve" are not the model's.
    assert found.rare == (("xylem", "zebras"), ("zebras",))
    assert found.distractors == ("quince", "rhubarb", "xylem", "zebras")
    lists = [[h.phrase for h in found.hotwords(i, 9, 2.0)] for i in (0, 1)]
    assert [sorted(words) for words in lists] == [
        ["quince", "rhubarb", "xylem", "zebras"],
        ["quince", "rhubarb", "xylem", "zebras"],
    ]
    assert lists[1][0] == "zebras"
    assert [h.boost for h in found.hotwords(1, 1, 2.0)] == [2.0, 2.0]
    assert found.hotwords(1, 1, 2.0) == found.hotwords(1, 1, 2.0)
