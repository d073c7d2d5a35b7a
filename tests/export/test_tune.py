"""Tuning hears what the engine hears, and writes what the engine reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from loquent.engine.audio import load_audio
from loquent.engine.bundle import Bundle, DecoderName
from loquent.engine.decode.fusion import BeamRules
from loquent.engine.recognizer import Recognizer
from loquent.export.bundle import update_manifest
from loquent.export.tune import Trials, encode, main, tune
from loquent.models.data import read_manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pieces of the bundled sample."""
    folder = tmp_path_factory.mktemp("clips")
    pcm = load_audio(ROOT / "engine" / "samples" / "morning.flac", sample_rate=16000)
    rows = []
    for i, part in enumerate(np.array_split(pcm, 3)):
        soundfile.write(folder / f"{i}.wav", part, 16000)
        rows.append({"audio": f"{i}.wav", "text": "good morning", "source": "x", "duration": 3.0})
    path = folder / "clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["joint", "rnnt-beam", "ctc-beam"])
def test_trials_hear_what_the_engine_hears(manifest: Path, name: DecoderName) -> None:
    recognizer = Recognizer.load("en")
    utterances = read_manifest(manifest)
    clips = encode(recognizer, utterances)
    said = [
        " ".join(
            final.text
            for final in recognizer.transcribe(load_audio(u.audio), decoder=name, endpoint=None)
        )
        for u in utterances
    ]
    assert all(said)
    trials = Trials(recognizer.bundle, name, clips, frames=8)
    assert trials.texts(recognizer.bundle.beams[name]) == said


def test_trials_put_words_right_as_the_engine_does(manifest: Path, tmp_path: Path) -> None:
    utterances = read_manifest(manifest)

    def said(name: str, spelling: dict[str, float] | None) -> tuple[list[str], list[str]]:
        folder = tmp_path / name
        shutil.copytree(ROOT / "engine" / "bundles" / "en", folder)
        found = Bundle.load(folder).manifest
        # Words that the model does not know cost next to nothing: there will be some.
        careless = {**found["beams"]["ctc-beam"], "unknown": -3.0, "lm_weight": 0.05}
        careless |= {"own_weight": 0.0, "unknown_letter": 0.0}
        beams = {**found["beams"], "ctc-beam": careless}
        lm = {key: value for key, value in found["lm"].items() if key != "spelling"}
        update_manifest(folder, beams=beams, lm=lm | ({"spelling": spelling} if spelling else {}))
        recognizer = Recognizer.load(str(folder))
        audio = [load_audio(u.audio) for u in utterances]
        heard = [recognizer.transcribe(x, decoder="ctc-beam", endpoint=None) for x in audio]
        trials = Trials(recognizer.bundle, "ctc-beam", encode(recognizer, utterances), frames=8)
        texts = trials.texts(recognizer.bundle.beams["ctc-beam"])
        return texts, [" ".join(final.text for final in finals) for finals in heard]

    trials, engine = said("spelt", {"reach": 0.5, "weight": 0.1})
    assert trials == engine
    assert trials != said("plain", None)[0]


def test_the_command_writes_the_manifest(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(ROOT / "engine" / "bundles" / "en", folder)
    before = Bundle.load(folder).beams
    options = ["--bundle", str(folder), "--decoder", "ctc-beam", "--beam", "4", "--write"]
    options += ["--rounds", "1", "--draws", "3", "-o", str(tmp_path / "beams.json")]
    assert main([str(manifest), *options, "--default", "ctc-beam"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[2:]] == [
        "| ctc-beam | before",
        "| ctc-beam | after",
    ]
    bundle = Bundle.load(folder)
    assert bundle.default_decoder == "ctc-beam"
    assert bundle.beams["ctc-beam"].beam == 4
    assert bundle.beams["ctc-beam"] != before["ctc-beam"]
    assert bundle.beams["joint"] == before["joint"]
    assert json.loads((tmp_path / "beams.json").read_text()) == bundle.manifest["beams"]


def test_mistakes(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(manifest), "--write"])
    assert "expected a bundle's folder to write to" in capsys.readouterr().err


def test_tuning_goes_to_where_errors_are_few() -> None:
    class Bowl(Trials):
        """Fewest errors at a word bonus of 2."""

        def __init__(self) -> None:
            pass

        def score(self, rules: BeamRules) -> object:  # type: ignore[override]
            class Found:
                wer = abs(rules.word_bonus - 2.0)
                cer = 0.0

            return Found

    found = tune(Bowl(), BeamRules(word_bonus=0.8), ["word_bonus"], rounds=8, draws=20, seed=0)
    assert found.word_bonus == pytest.approx(2.0, abs=0.2)
    assert found.lm_weight == BeamRules().lm_weight
