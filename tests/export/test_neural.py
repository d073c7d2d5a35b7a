"""The recurrent word model: learnt, written into a bundle, and heard in a stream."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loquent.engine.audio import load_audio
from loquent.engine.bundle import Bundle
from loquent.engine.decode.beam import BeamState
from loquent.engine.errors import BundleError
from loquent.engine.recognizer import Recognizer
from loquent.engine.wordlm import OnnxWordModel
from loquent.export import neural
from loquent.export.bundle import update_manifest
from loquent.export.neural import write_neural
from loquent.models import ngram as counting
from loquent.models.checkpoint import CheckpointError
from loquent.models.data import read_manifest
from loquent.models.wordlm import WordLm, WordLmConfig, load_word_lm

# What follows the second word is known from the first one only.
LINES = [f"{a} and {b}" for a, b in (("one", "two"), ("black", "white"), ("up", "down"))] * 30


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(text: Path, export: Any, corpus: Path, tmp_path_factory: Any) -> Path:
    """An int8 toy bundle with an n-gram of the toy's words and of the text's."""
    lm = tmp_path_factory.mktemp("lm") / "lm.npz"
    args = [str(text), str(corpus), "-o", str(lm), "--words", "40", "--least", "1", "1"]
    assert counting.main(args) == 0
    made: Path = export(
        "--lm", str(lm), "--decoder", "joint", "--int8", "--int8-max-loss", "1"
    ).folder
    return made


def command(text: Path, bundle: Path, run: Path, *more: str) -> list[str]:
    shape = ["--width", "12", "--hidden", "24", "--batch-words", "200", "--fp32"]
    where = ["--bundle", str(bundle), "--dev", str(text), "--run", str(run)]
    return [str(text), *where, *shape, *more]


@pytest.fixture(scope="module")
def trained(text: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of it."""
    run = tmp_path_factory.mktemp("run")
    steps = ["--steps", "150", "--decay", "80", "--eval-every", "50", "--save-every", "50"]
    assert neural.main(command(text, folder, run, *steps, "--lr", "0.02")) == 0
    return run


@pytest.fixture(scope="module")
def written(trained: Path, folder: Path, tmp_path_factory: Any) -> Path:
    """The bundle with that model in it."""
    made = Path(shutil.copytree(folder, tmp_path_factory.mktemp("bundle") / "toy"))
    write_neural(load_word_lm(trained / "last")[0], made, share=0.3)
    return made


def test_it_learns_what_an_n_gram_cannot(trained: Path) -> None:
    with (trained / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    # The first word is one of three, the rest is certain: the cube root of three.
    assert float(rows[-1]["perplexity"]) == pytest.approx(3 ** (1 / 3), rel=0.05)
    assert abs(float(rows[-1]["log_sum"])) < 0.2


def test_a_run_goes_on_where_it_was(text: Path, folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    often = ["--steps", "8", "--save-every", "3", "--eval-every", "8"]
    assert neural.main(command(text, folder, whole, *often)) == 0

    class Killed(BaseException):
        pass

    def killed(self: Any, step: int, batches: Any) -> Any:
        if step == 5:
            raise Killed
        return update(self, step, batches)

    update = neural.WordLmTrainer._update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neural.WordLmTrainer, "_update", killed)
        with pytest.raises(Killed):
            neural.main(command(text, folder, parts, *often))
    assert neural.main(command(text, folder, parts, *often)) == 0
    (a, _), (b, state) = load_word_lm(whole / "last"), load_word_lm(parts / "last")
    assert state["progress"]["step"] == 8
    for name, weight in a.state_dict().items():
        assert torch.equal(weight, b.state_dict()[name]), name


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.05), ("int8", 0.1)])
def test_the_graph_is_the_torch_model(
    trained: Path, folder: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    # The table is kept in 8 bits in both, and the products of an int8 bundle are of such numbers.
    bundle_folder = Path(shutil.copytree(folder, tmp_path / "bundle"))
    update_manifest(bundle_folder, precision=precision)
    model, _ = load_word_lm(trained / "last")
    bundle = write_neural(model, bundle_folder, share=0.3)
    ngram = bundle.language_model()
    assert ngram is not None
    assert bundle.lm is not None
    spec = bundle.lm.neural
    assert spec is not None
    assert spec.share == 0.3
    graph = OnnxWordModel(bundle, spec, ngram)
    sentences = [["one", "and", "two"], ["up", "and", "two"], ["black", "and", "down"]]
    own = {word: i for i, word in enumerate(model.config.words)}
    words = torch.tensor([[1, *(own.get(word, 0) for word in s)] for s in sentences])
    with torch.no_grad():
        expected = model.all_scores(model(words)).numpy()
    state = {name: np.repeat(array, 3, axis=0) for name, array in graph.initial.items()}
    _, state = graph.step(np.full(3, ngram.start[0]), state)
    for at in range(3):
        ids = np.array([ngram.ids.get(s[at], ngram.unknown) for s in sentences])
        got, state = graph.step(ids, state)
        rows = [own.get(s[at], 0) for s in sentences]
        np.testing.assert_allclose(got, expected[range(3), at, rows], atol=tolerance)


def test_a_word_without_a_row_is_a_part_of_the_unknown(folder: Path, tmp_path: Path) -> None:
    bundle_folder = Path(shutil.copytree(folder, tmp_path / "bundle"))
    torch.manual_seed(0)
    model = WordLm(WordLmConfig(words=("<unk>", "<s>", "one", "and"), width=8, hidden=8)).eval()
    bundle = write_neural(model, bundle_folder, share=0.5)
    ngram = bundle.language_model()
    assert ngram is not None
    assert bundle.lm is not None
    assert bundle.lm.neural is not None
    graph = OnnxWordModel(bundle, bundle.lm.neural, ngram)
    everything = np.arange(len(ngram.words))
    state = {name: np.repeat(a, len(everything), axis=0) for name, a in graph.initial.items()}
    _, state = graph.step(np.full(len(everything), ngram.start[0]), state)
    logp, _ = graph.step(everything, state)
    rowless = [i for i, word in enumerate(ngram.words) if word not in ("<s>", "one", "and")]
    with torch.no_grad():
        scores = model.all_scores(model(torch.tensor([[1]])))[0, 0]
    assert np.log(np.exp(logp[rowless]).sum()) == pytest.approx(float(scores[0]), abs=0.05)


def test_a_stream_says_what_both_models_expect(written: Path, corpus: Path) -> None:
    recognizer, again = (Recognizer.load(written) for _ in range(2))
    for utterance in read_manifest(corpus)[:4]:
        pcm = load_audio(utterance.audio)
        finals = recognizer.transcribe(pcm, decoder="joint")
        assert " ".join(final.text for final in finals) == utterance.text
    # Handed over in the middle of a sentence it goes on with what was said.
    stream = recognizer.stream(decoder="joint")
    stream.accept(pcm)
    recognizer.step([stream])
    copy = again.restore(recognizer.snapshot(stream))
    found = []
    for reader, one in ((recognizer, stream), (again, copy)):
        assert isinstance(one.search, BeamState)
        one.finish()
        while one.ready:
            reader.step([one])
        found.append([str(event) for event in one.events()])
    assert found[0] == found[1]


def test_it_is_written_by_command(text: Path, written: Path, trained: Path, tmp_path: Path) -> None:
    bundle_folder = Path(shutil.copytree(written, tmp_path / "bundle"))
    # The run is complete, so this only writes, in place of the one that is there.
    again = ["--steps", "150", "--decay", "80", "--lr", "0.02"]
    write = ["--write", "--share", "0.6"]
    assert neural.main(command(text, bundle_folder, trained, *again, *write)) == 0
    bundle = Bundle.load(bundle_folder)
    assert bundle.lm is not None
    assert bundle.lm.neural is not None
    assert bundle.lm.neural.share == 0.6
    assert bundle.lm.spelling is not None
    assert sorted(path.suffix for path in bundle_folder.iterdir()).count(".part") == 0


def test_mistakes(
    text: Path,
    folder: Path,
    trained: Path,
    fp32: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for args, message in (
        (command(text, fp32.folder, tmp_path / "r"), "no word n-gram"),
        (command(text, folder, tmp_path / "r", "--share", "1.5"), "got 1.5"),
        (command(text, Path("en"), tmp_path / "r", "--write"), "expected a bundle's folder"),
        (command(empty, folder, tmp_path / "r"), "no text"),
        (command(text, folder, tmp_path / "r", "--hidden", "0"), "got hidden 0"),
        (command(text, folder, tmp_path / "r", "--words", "-5"), "got -5 words"),
        (command(text, folder, tmp_path / "r", "--batch-words", "0"), "batches of 0 words"),
        (command(text, folder, trained, "--words", "3"), "another folder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            neural.main(args)
        assert stopped.value.code == 1
        assert message in capsys.readouterr().err
    broken = Path(shutil.copytree(trained / "last", tmp_path / "broken"))
    (broken / "config.json").write_text(json.dumps({"words": ["a"], "depth": 3}))
    with pytest.raises(CheckpointError, match="no word model"):
        load_word_lm(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 0}, "lm.neural.share = 0"),
        ({"share": 1.5}, "lm.neural.share = 1.5"),
        ({"words_sha256": "0" * 64}, "an n-gram of other words"),
        ({"states": []}, "next.out|state.out"),
        ({"sha256": "0" * 64}, "words.onnx"),
    ],
)
def test_a_manifest_that_does_not_fit(
    written: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    bundle_folder = Path(shutil.copytree(written, tmp_path / "bundle"))
    lm = dict(Bundle.load(bundle_folder).manifest["lm"])
    update_manifest(bundle_folder, lm=lm | {"neural": lm["neural"] | change})
    with pytest.raises(BundleError, match=message):
        Recognizer.load(bundle_folder).stream(decoder="joint")
