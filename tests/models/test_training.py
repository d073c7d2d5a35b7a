"""Training: a run that is killed and resumed is the run that was not, and mistakes have names."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from loquent.engine.features import whisper_spec
from loquent.models import cli
from loquent.models.checkpoint import (
    CheckpointError,
    load_checkpoint,
    read_tensors,
)
from loquent.models.data import Augment, DataError, FeatureCache, read_manifest
from loquent.models.devices import OneCpu
from loquent.models.student import Losses, Student, StudentConfig
from loquent.models.tokens import Tokenizer
from loquent.models.training import (
    Drawn,
    TrainConfig,
    Trainer,
    _draw,
    evaluate_ctc,
)

Config = Callable[[int], StudentConfig]
STEPS = 24
FILES = ("model", "raw", "optimizer")

# `loquent train`, except that the student is tiny and has dropout, and a save comes at every step,
# so that a kill often falls into one.
TRAIN = """
import dataclasses, importlib.util, sys
from loquent.models import cli

spec = importlib.util.spec_from_file_location("shapes", sys.argv[1])
shapes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shapes)


def preset(vocab, **shape):
    config = shapes.tiny_student(vocab)
    layers = dataclasses.replace(config.encoder.emformer, dropout=0.1)
    return dataclasses.replace(
        config, encoder=dataclasses.replace(config.encoder, emformer=layers)
    )


cli.whisper_student = preset
sys.exit(cli.main(sys.argv[2:]))
"""


def arguments(corpus: Path, run: Path) -> list[str]:
    options = {
        "--data": f"{corpus}=0.8",
        "--dev": corpus,
        "--run": run,
        "--features": corpus.parent / "features",
        "--vocab": 12,
        "--steps": STEPS,
        "--batch-seconds": 8,
        "--lr": 1e-2,
        "--head-lr": 1e-2,
        "--rnnt-from": 6,
        "--save-every": 1,
        "--eval-every": 10,
        "--threads": 1,
    }
    return [text for pair in options.items() for text in map(str, pair)]


def start(corpus: Path, run: Path, *options: str) -> subprocess.Popen[str]:
    shapes = Path(__file__).with_name("conftest.py")
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(shapes), *arguments(corpus, run), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def step_of(run: Path) -> int:
    try:
        state = json.loads((run / "last" / "state.json").read_text())
    except (OSError, ValueError):
        return 0  # not yet, or just being replaced
    return int(state["progress"]["step"])


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, finish(start(corpus, run))


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(
    corpus: Path, uninterrupted: tuple[Path, str], tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    for stop_at in (4, 13):  # before and after the transducer loss joins, and in different epochs
        process = start(corpus, run)
        until = time.monotonic() + 120
        while step_of(run) < stop_at:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    resumed_from = step_of(run)
    finish(start(corpus, run))
    assert resumed_from < STEPS
    for file in FILES:
        expected = read_tensors(uninterrupted[0] / "last" / f"{file}.safetensors")
        got = read_tensors(run / "last" / f"{file}.safetensors")
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), f"{file}: {name}"
    states = [json.loads((r / "last" / "state.json").read_text()) for r in (uninterrupted[0], run)]
    for state in states:
        assert state["progress"].pop("core_hours") > 0
    assert states[0] == states[1]


def test_a_finished_run_is_left_as_it_is(corpus: Path, uninterrupted: tuple[Path, str]) -> None:
    run, out = uninterrupted
    last = run / "last" / "raw.safetensors"
    before = last.read_bytes(), last.stat().st_mtime_ns
    again = finish(start(corpus, run))
    assert (last.read_bytes(), last.stat().st_mtime_ns) == before
    assert json.loads(again.splitlines()[-1]) == json.loads(out.splitlines()[-1])


def test_what_a_run_leaves_behind(corpus: Path, uninterrupted: tuple[Path, str]) -> None:
    run, out = uninterrupted
    assert "corpus.jsonl: 24 utterances" in out
    last = json.loads(out.splitlines()[-1])
    assert (last["run"], last["step"]) == (str(run), STEPS)
    assert last["audio_hours"] > 0
    with (run / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["10", "20", "24"]
    assert all(float(row["wer.even"]) >= 0 for row in rows)
    assert float(rows[0]["ctc"]) > float(rows[-1]["ctc"])
    for name in ("last", "best"):
        checkpoint = load_checkpoint(run / name)
        assert checkpoint.tokenizer.size == 12
        assert checkpoint.state["features"] == whisper_spec().to_dict()
        assert checkpoint.state["origin"]["start"] == "random weights"
        assert json.dumps(checkpoint.state, allow_nan=False)
    assert not (run / "best" / "raw.safetensors").exists()
    # What is evaluated and exported is the average, not the last weights.
    averages, raw = (read_tensors(run / "last" / f"{n}.safetensors") for n in FILES[:2])
    assert not torch.equal(averages["ctc.weight"], raw["ctc.weight"])


# In one process


Make = Callable[..., Trainer]


@pytest.fixture
def make(corpus: Path, tiny_config: Config, tmp_path: Path) -> Make:
    """A trainer of a tiny student in ``tmp_path/run``."""

    def trainer(
        *, dim: int = 32, origin: dict[str, object] | None = None, **changes: object
    ) -> Trainer:
        rows = read_manifest(corpus)[:6]
        tokenizer = Tokenizer.train([u.text for u in read_manifest(corpus)], 12)
        config = tiny_config(tokenizer.size)
        encoder = dataclasses.replace(
            config.encoder,
            frontend=dataclasses.replace(config.encoder.frontend, dim=dim),
            emformer=dataclasses.replace(config.encoder.emformer, dim=dim),
        )
        torch.manual_seed(0)
        student = Student(dataclasses.replace(config, encoder=encoder))
        cache = FeatureCache(rows, whisper_spec(), corpus.parent / "features", workers=1)
        settings = TrainConfig(
            **{"steps": 3, "batch_seconds": 6, "warmup": 2, "rnnt_from": 1, **changes}  # type: ignore[arg-type]
        )
        weights = [1.0] * len(rows)
        run, origin = tmp_path / "run", origin or {}
        return Trainer(run, student, tokenizer, cache, cache, weights, settings, origin)

    return trainer


def test_a_loss_that_is_not_finite_names_step_and_files(make: Make, corpus: Path) -> None:
    trainer = make()
    with torch.no_grad():
        trainer.student.ctc.weight[0, 0] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(FloatingPointError, match=r"step 0: the loss is nan; lower.*\.wav"):
        trainer.fit()
    assert not (trainer.run / "last").exists()


def test_a_run_of_another_shape_is_not_resumed(make: Make) -> None:
    make().fit()
    with pytest.raises(CheckpointError, match="trains a student of another shape"):
        make(dim=64)


def test_a_run_that_goes_on_with_other_data_says_so(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    before = make()
    before.origin["data"] = ["a.jsonl: 6 utterances"]
    before.fit()
    make(origin={"data": ["a.jsonl: 6 utterances"]})
    assert "other data" not in capsys.readouterr().err
    make(origin={"data": ["b.jsonl: 9 utterances"]})
    said = capsys.readouterr().err
    assert "goes on with other data than before, which were ['a.jsonl: 6 utterances']" in said


def test_two_processes_do_not_train_in_one_folder(make: Make) -> None:
    trainer = make()
    trainer.run.mkdir()
    holder = "import sys, filelock as f; a = f.FileLock(sys.argv[1]); a.acquire(); print(); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", holder, str(trainer.run / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout
    other.stdout.readline()
    with pytest.raises(CheckpointError, match="another process trains in this folder; stop it"):
        trainer.fit()
    assert not (trainer.run / "last").exists()
    other.kill()  # a killed one keeps nobody out
    other.communicate()
    trainer.fit()
    assert (trainer.run / "last").exists()


def test_a_damaged_run_is_not_started_over(make: Make) -> None:
    trainer = make()
    trainer.fit()
    (trainer.run / "last" / "optimizer.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: cannot be read"):
        make()
    (trainer.run / "last" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json: cannot be read"):
        make()


def test_the_first_average_follows_the_weights(make: Make) -> None:
    trainer = make(steps=1, ema=0.999, warmup=1, lr=1.0, head_lr=1.0)
    before = trainer.student.ctc.bias.detach().clone()  # type: ignore[union-attr]
    trainer.fit()
    after = trainer.student.ctc.bias.detach()  # type: ignore[union-attr]
    # decay min(0.999, 1 / 10) at step 0
    torch.testing.assert_close(trainer.average["ctc.bias"], before + 0.9 * (after - before))


def test_learning_rate_warms_up_stays_and_falls(make: Make) -> None:
    trainer = make(steps=110, warmup=10, decay=40, final_lr=0.1)
    rates = [trainer._rate(step) for step in range(112)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:71] == pytest.approx([1.0] * 62)
    assert rates[90] == pytest.approx(0.55)
    assert rates[110:] == pytest.approx([0.1, 0.1])
    # A decay that is longer than the run starts behind the warm-up.
    assert make(steps=50, warmup=10, decay=1500)._rate(10) == 1.0


def first_batch(trainer: Trainer) -> Drawn:
    _, [(_, drawn)] = next(trainer._parts())
    return drawn


def test_batches_are_a_function_of_the_step(make: Make) -> None:
    whole = make(augment=Augment())._parts()
    all_ = [next(whole) for _ in range(8)]
    trainer = make(augment=Augment())
    trainer.progress.step = 5
    later = trainer._parts()
    for step, [(index, drawn)] in all_[5:]:
        again_step, [(again_index, again)] = next(later)
        assert (again_step, again_index) == (step, index) == (step, step)
        assert (again.segment, again.right) == (drawn.segment, drawn.right)
        assert torch.equal(again.batch.x_BTF, drawn.batch.x_BTF)
        assert torch.equal(again.batch.targets_BU, drawn.batch.targets_BU)
    assert len({(d.segment, d.right) for _, [(_, d)] in all_}) > 2


def test_short_chunks_come_last(make: Make) -> None:
    trainer = make(longest_until=2, long_until=4)
    drawn = [trainer._make(step, [0]) for step in range(40)]
    assert {d.segment for d in drawn[:2]} == {128}
    assert min(d.segment for d in drawn[2:4]) >= 32
    assert min(d.segment for d in drawn[4:]) < 32


def test_joined_batches_hold_the_same_speech_in_half_as_many_rows(make: Make) -> None:
    apart = first_batch(make(join=0.0)).batch
    joined = first_batch(make(join=1.0)).batch
    rows = len(apart.lengths_B)
    assert rows > 1
    assert len(joined.lengths_B) == -(-rows // 2)
    assert joined.lengths_B.sum() == apart.lengths_B.sum()
    assert joined.targets_B.sum() == apart.targets_B.sum()
    first = torch.cat([apart.targets_BU[i, : apart.targets_B[i]] for i in range(2)])
    assert torch.equal(joined.targets_BU[0, : joined.targets_B[0]], first)


def test_labels_that_are_far_off_do_not_count(make: Make) -> None:
    trainer = make(join=0.0)
    drawn = first_batch(trainer)
    batch = drawn.batch
    student = trainer.student.eval()
    encoded, frames = student(batch.x_BTF, batch.lengths_B, drawn.segment, drawn.right)

    def losses(rows: list[int], drop_above: float) -> Losses:
        return student.losses(
            encoded[rows],
            frames[rows],
            batch.targets_BU[rows],
            batch.targets_B[rows],
            rnnt=True,
            drop_above=drop_above,
        )

    each = {
        row: one.ctc.item() / one.tokens
        for row in range(len(frames))
        if (one := losses([row], math.inf))
    }
    order = sorted(each, key=each.__getitem__)
    limit = (each[order[-2]] + each[order[-1]]) / 2
    most = losses(list(each), limit)
    without_worst = losses(order[:-1], math.inf)
    torch.testing.assert_close(most.ctc, without_worst.ctc)
    torch.testing.assert_close(most.rnnt, without_worst.rnnt)
    assert most.tokens == without_worst.tokens
    # A batch of nothing but such labels is better than a step without any.
    assert losses(list(each), 0.0).tokens == int(batch.targets_B.sum())


def test_draws_follow_their_weights() -> None:
    rng = np.random.default_rng(0)
    drawn = [_draw(((4, 1.0), (8, 3.0), (16, 0.0)), rng) for _ in range(2000)]
    assert set(drawn) == {4, 8}
    assert 0.7 < drawn.count(8) / 2000 < 0.8


def test_evaluation_scores_each_source(make: Make) -> None:
    trainer = make()
    scores = evaluate_ctc(trainer.student, trainer.tokenizer, trainer.dev)
    assert {name: score.utterances for name, score in scores.items()} == {"even": 3, "odd": 3}
    assert all(score.words == 9 for score in scores.values())


def test_start_from_another_run(make: Make, corpus: Path, tmp_path: Path) -> None:
    trainer = make()
    trainer.fit()
    last = str(trainer.run / "last")
    args = cli._parser().parse_args([*arguments(corpus, tmp_path / "next"), "--start", last])
    student, tokenizer = cli._initial(args, [])
    assert torch.equal(student.state_dict()["ctc.bias"], trainer.average["ctc.bias"])
    assert tokenizer.pieces() == trainer.tokenizer.pieces()
    assert cli._origin(args) == "last"


def test_predictor_and_joiner_of_another_student(make: Make, tmp_path: Path) -> None:
    trainer = make()
    trainer.fit()
    folder = trainer.run / "last"
    learnt = load_checkpoint(folder).student.state_dict()
    other = Student(trainer.student.config)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    cli._take_predictor(other, trainer.tokenizer, folder)
    for name, tensor in other.state_dict().items():
        taken = name.startswith(("predictor.", "joiner."))
        assert torch.equal(tensor, (learnt if taken else before)[name]), name
    wider = Student(dataclasses.replace(trainer.student.config, joiner_dim=24))
    with pytest.raises(DataError, match=r"its predictor\.linear\.weight is \(\d+, \d+\), expected"):
        cli._take_predictor(wider, trainer.tokenizer, folder)
    strange = Tokenizer.train(["a", "b", "abc"], 6)
    with pytest.raises(DataError, match="other subwords than this student"):
        cli._take_predictor(other, strange, folder)


# Mistakes on the command line


def test_mistakes_on_the_command_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(**changes: object) -> str:
        args = arguments(corpus, tmp_path / "run")
        for name, value in changes.items():
            option = "--" + name.replace("_", "-")
            if option in args:
                args[args.index(option) + 1] = str(value)
            else:
                args += [option, str(value)]
        with pytest.raises(SystemExit) as exit_:
            cli.main(args)
        assert exit_.value.code == 1
        message = capsys.readouterr().err
        assert message.startswith("loquent train: ")
        return message

    assert "gone.jsonl: no such manifest" in error(data="gone.jsonl")
    assert "gone.jsonl: no such manifest" in error(dev="gone.jsonl")
    assert "'half' is not a number" in error(data=f"{corpus}=half")
    assert "got a share of 0, expected more than 0" in error(data=f"{corpus}=0")
    assert "no usable utterance is left" in error(exclude_licence="CC0")
    assert "cannot learn 4000 subwords" in error(vocab=4000)
    assert "choose another --vocab" in error(vocab=4000)
    assert "gone: no config.json; expected a checkpoint" in error(start=tmp_path / "gone")
    (tmp_path / "model.bin").write_bytes(b"garbage!")
    assert "binary version" in error(whisper=tmp_path)
    (tmp_path / "run" / "tokens.spm").write_bytes(b"garbage")
    assert "tokens.spm: SentencePiece model: cannot be read" in error()


def test_a_broken_recording_is_named(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = corpus.read_text().replace('"3.wav"', '"gone.wav"')
    manifest = tmp_path / "set.jsonl"
    manifest.write_text(rows.replace('"audio": "', f'"audio": "{corpus.parent}/'))
    with pytest.raises(SystemExit) as exit_:
        cli.main([*arguments(manifest, tmp_path / "run"), "--features", str(tmp_path / "f")])
    assert exit_.value.code == 1
    assert "gone.wav: No such file" in capsys.readouterr().err


def test_interrupting_says_how_to_go_on(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(corpus, run, "--steps", "100000")
    while step_of(run) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; the same command resumes" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("can", "dtype"),
    [
        ({"avx2": True}, torch.float32),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "amx_bf16": True}, torch.bfloat16),
    ],
)
def test_bf16_is_for_processors_that_have_it(
    monkeypatch: pytest.MonkeyPatch, can: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    with OneCpu(bf16=True).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    with OneCpu(bf16=False).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
