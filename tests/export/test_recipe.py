"""The whole way from recordings to an evaluated bundle, and what a kill on it leaves undone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from loquent.engine.bundle import Bundle
from loquent.export import recipe
from loquent.export.recipe import SCALES, Sources, Step, en_small, follow


def _whisper(folder: Path) -> Path:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=1,
        encoder_ffn_dim=256,
        decoder_layers=1,
        decoder_attention_heads=1,
        decoder_ffn_dim=32,
        vocab_size=60,
        max_source_positions=1500,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_from_recordings_to_a_bundle(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    for row in rows:
        row["audio"] = str(corpus.parent / row["audio"])
    bare = [{k: v for k, v in row.items() if k != "text"} for row in rows[14:18]]
    for name, part in (("train", rows[:14]), ("unlabelled", bare), ("dev", rows[18:])):
        (data / f"en.{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    whisper = str(_whisper(tmp_path / "whisper"))
    # A teacher that has learnt for three steps is sure of nothing.
    args = [
        *("en-small", "--data", str(data), "--run", str(run), "--scale", "tiny"),
        *("--teacher", whisper, "--accept-data"),
    ]
    assert recipe.main(args) == 0
    bundle = Bundle.load(run / "bundle")
    assert (bundle.precision, bundle.default_decoder) == ("int8", "joint")
    assert (run / "bundle" / "words.onnx").exists()
    assert "WER" in (run / "bundle" / "README.md").read_text()
    student = run / "student" / "last"
    assert json.loads((student / "state.json").read_text())["origin"]["teacher"]
    shape = json.loads((student / "config.json").read_text())["encoder"]["emformer"]
    assert (shape["layers"], shape["ffn_dim"]) == (2, SCALES["tiny"].units)
    out = capsys.readouterr().out
    assert "[9/9] evaluate: loquent evaluate" in out
    # The same command again does nothing.
    assert recipe.main(args) == 0
    assert capsys.readouterr().out.count(": done") == 9


def _steps(folder: Path) -> list[Step]:
    return [Step(name, (name, "--to", name), folder / name) for name in ("one", "two", "three")]


class Programs(dict[str, object]):
    """Commands that write a file, and one that is killed or fails first."""

    def __init__(self, folder: Path, fails: str = "", status: int = 0) -> None:
        self.ran: list[str] = []
        self.folder, self.fails, self.status = folder, fails, status

    def __getitem__(self, name: str) -> object:
        def run(words: Sequence[str]) -> int:
            assert list(words) == ["--to", name]
            self.ran.append(name)
            if name == self.fails:
                if self.status == 0:
                    raise KeyboardInterrupt
                return self.status
            (self.folder / name).write_text("made")
            return 0

        return run


def test_a_killed_recipe_goes_on(tmp_path: Path) -> None:
    steps, notes = _steps(tmp_path), tmp_path / "steps"
    first = Programs(tmp_path, fails="two")
    with pytest.raises(KeyboardInterrupt):
        follow(steps, notes, programs=first)  # type: ignore[arg-type]
    second = Programs(tmp_path)
    assert follow(steps, notes, programs=second) == 0  # type: ignore[arg-type]
    assert (first.ran, second.ran) == (["one", "two"], ["two", "three"])
    # What was made from a result that is gone, or by another command, is made again.
    (tmp_path / "two").unlink()
    third = Programs(tmp_path)
    assert follow(steps, notes, programs=third) == 0  # type: ignore[arg-type]
    assert third.ran == ["two", "three"]


def test_a_failed_step_ends_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failing = Programs(tmp_path, fails="two", status=3)
    assert follow(_steps(tmp_path), tmp_path / "n", programs=failing) == 3  # type: ignore[arg-type]
    assert failing.ran == ["one", "two"]
    assert "two ended with status 3" in capsys.readouterr().err
    verdict = [Step("two", ("two", "--to", "two"), tmp_path / "two", may_fail=True)]
    assert follow(verdict, tmp_path / "m", programs=failing) == 3  # type: ignore[arg-type]
    assert "--accept-data goes on" in capsys.readouterr().err
    assert follow(verdict, tmp_path / "m", overrule=True, programs=failing) == 0  # type: ignore[arg-type]


def test_every_command_of_a_recipe_exists(tmp_path: Path) -> None:
    sources = Sources(data=tmp_path, run=tmp_path / "run")
    for make in recipe.RECIPES.values():
        for scale in SCALES.values():
            for step in make(sources, scale):
                with pytest.raises(SystemExit) as exit_:
                    recipe.PROGRAMS[step.command[0]]([*step.command[1:], "--help"])
                assert exit_.value.code == 0


def test_the_recipe_takes_what_there_is(tmp_path: Path) -> None:
    def commands() -> dict[str, tuple[str, ...]]:
        sources = Sources(data=tmp_path, run=tmp_path / "run", exclude=("NC",))
        return {step.name: step.command for step in en_small(sources, SCALES["full"])}

    plain = commands()
    assert list(plain) == [
        "check",
        "teacher",
        "distill",
        "student",
        "lm",
        "export",
        "neural",
        "tune",
        "evaluate",
    ]
    assert not {"--noise", "--unlabelled", "--pseudo"} & {w for c in plain.values() for w in c}
    learning = ("teacher", "distill", "student", "lm", "neural")
    assert all("NC" in plain[name] for name in learning)
    for name in ("en.synthetic.jsonl", "en.unlabelled.jsonl", "noise.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "en.books.txt.xz").touch()
    whole = commands()
    assert f"{tmp_path / 'en.synthetic.jsonl'}=0.5" in whole["student"]
    assert "--noise" in whole["teacher"]
    assert str(tmp_path / "run" / "pseudo" / "en.unlabelled.pseudo.jsonl") in whole["student"]
    assert str(tmp_path / "text" / "en.books.txt.xz") in whole["lm"]
