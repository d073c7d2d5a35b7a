"""Teachers from models saved in the Hugging Face format, through the public commands.

Small models with random weights take exactly the way that a model of the hub takes: pre-training,
fine-tuning, distillation.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.models.commands import columns, loop, options
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    WavLMConfig,
    WavLMModel,
)

from loquent.export import measure
from loquent.models import cli, distill, pretraining
from loquent.models.checkpoint import CheckpointError, load_checkpoint, read_tensors
from loquent.models.data import read_manifest
from loquent.models.loop import Freezing
from loquent.models.posteriors import Posteriors
from loquent.models.pretrained import (
    Pretrained,
    listen,
    load_encoder,
    load_pretrained,
    shortest,
)
from loquent.models.student import StudentConfig
from loquent.models.teacher import freezing_policy, replay_share
from loquent.models.tokens import Tokenizer

Config = Callable[[int], StudentConfig]

# XLS-R's shape (layer norm in the CNN, stable layer norm), but tiny.
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 8, 4),
    "conv_stride": (10, 8, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "mask_time_length": 2,
    "vocab_size": 60,
}
QUANTISER: dict[str, Any] = {
    "num_codevectors_per_group": 8,
    "num_codevector_groups": 2,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
    "num_negatives": 5,
}


@pytest.fixture(scope="module")
def xlsr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "tiny-xlsr"
    Wav2Vec2ForPreTraining(Wav2Vec2Config(**TINY, **QUANTISER)).save_pretrained(folder)
    return folder


def test_wav2vec_from_pretraining_to_a_student(
    corpus: Path,
    xlsr: Path,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    features = corpus.parent / "features"
    # Pre-training goes on from the folder, and is resumed.
    pre = tmp_path / "pre"
    assert pretraining.main([*loop(corpus, pre, steps=2), *options(teacher=xlsr)]) == 0
    assert pretraining.main([*loop(corpus, pre), *options(teacher=xlsr)]) == 0
    assert float(columns(pre)["loss"]) > 0
    # Masks, dropout and skipped layers are those of a run that was not interrupted.
    straight = tmp_path / "straight"
    assert pretraining.main([*loop(corpus, straight), *options(teacher=xlsr)]) == 0
    for file in ("model", "raw", "optimizer"):
        expected = read_tensors(straight / "last" / f"{file}.safetensors")
        got = read_tensors(pre / "last" / f"{file}.safetensors")
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    # Its result is a teacher's start; text is new, so is the head.
    teach = tmp_path / "teacher"
    args = ["teacher", *loop(corpus, teach), *options(teacher=pre / "last", vocab=12)]
    assert cli.main(args) == 0
    assert float(columns(teach)["ctc"]) > 0
    before = read_tensors(teach / "last" / "model.safetensors")
    assert cli.main(args) == 0  # finished: resumed and left as it is
    assert all(
        torch.equal(t, before[n])
        for n, t in read_tensors(teach / "last" / "model.safetensors").items()
    )
    assert load_pretrained(teach / "last").state["origin"]["start"] == "last"
    # It listens, and writes down what it is sure of.
    heard, pseudo = tmp_path / "heard", tmp_path / "pseudo"
    asked = [
        str(teach / "last"),
        *options(output=heard, data=corpus, encoder=True, threads=1, batch_seconds=8),
        *options(unlabelled=corpus, pseudo=pseudo, confidence=0.0),
    ]
    assert distill.main(asked) == 0
    cache = Posteriors(heard)
    assert len(cache) == 24
    assert cache.width == 32
    written = (pseudo / "corpus.pseudo.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in written]
    assert rows
    assert all((pseudo / row["audio"]).exists() and row["text"] for row in rows)
    # A student learns from all of it.
    monkeypatch.setattr(cli, "whisper_student", lambda vocab, **_: tiny_config(vocab))
    run = tmp_path / "student"
    student = [
        "student",
        *loop(corpus, run, features=features, rnnt_from=1, delay_penalty=0.01),
        *options(distil=heard, kd_text=0.1, kd_features=0.5),
    ]
    assert cli.main(student) == 0
    row = columns(run)
    assert all(float(row[name]) > 0 for name in ("kd_ctc", "kd_text", "kd_features", "rnnt"))
    # The map to the teacher's width trains along, but is no part of the model.
    assert "features.weight" in read_tensors(run / "last" / "raw.safetensors")
    load_checkpoint(run / "last")
    capsys.readouterr()
    # Other subwords are the classic mistake.
    other = tmp_path / "other.spm"
    other.write_bytes(Tokenizer.train([u.text for u in read_manifest(corpus)], 13).model)
    with pytest.raises(SystemExit):
        cli.main(["student", *loop(corpus, tmp_path / "x", tokens=other, distil=heard)])
    assert "different subwords" in capsys.readouterr().err


# Batches


def wave(seed: int, samples: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(samples)).float()


# transformers' WavLM gives torch masks of two types.
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "wavlm"])
def test_a_batch_says_what_its_utterances_say(family: str, norm: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {**TINY, "feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer"}
    model = {
        "wav2vec2": lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**shape)),
        "hubert": lambda: HubertModel(HubertConfig(**shape)),
        "wavlm": lambda: WavLMModel(WavLMConfig(**shape)),
    }[family]()
    model.save_pretrained(tmp_path)
    encoder, normalise = load_encoder(str(tmp_path))
    assert normalise is (norm == "layer")
    teacher = Pretrained(encoder, 9, normalise=normalise).eval()
    waves = [wave(i, n) for i, n in enumerate((9000, shortest(encoder.config), 16000, 4321))]
    together = listen(teacher, waves)
    for one, (logs, encoded) in zip(waves, together, strict=True):
        [(own_logs, own_encoded)] = listen(teacher, [one])
        assert len(own_logs) == len(logs) >= 1
        np.testing.assert_allclose(logs, own_logs, atol=2e-4)
        np.testing.assert_allclose(encoded, own_encoded, atol=2e-4)


def test_language_adapters(corpus: Path, xlsr: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = loop(corpus, run, vocab=12, teacher=xlsr, language_adapter="new", freeze_encoder=0)
    assert cli.main(["teacher", *args]) == 0
    before, _ = load_encoder(str(xlsr))
    old = before.state_dict()
    after = load_pretrained(run / "last").teacher.encoder.state_dict()
    moved = {n for n, t in after.items() if n not in old or not torch.equal(t, old[n])}
    assert moved
    assert all("adapter_layer" in name for name in moved)


def test_an_adapter_of_a_language_is_loaded(tmp_path: Path) -> None:
    """MMS keeps one file of adapters, and a head, for each language."""
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**TINY, adapter_attn_dim=4))
    model.save_pretrained(tmp_path)
    model.init_adapter_layers()
    adapters = {n: t + 1 for n, t in model._get_adapters().items() if "lm_head" not in n}
    head = {"lm_head.weight": torch.randn(23, 32), "lm_head.bias": torch.zeros(23)}
    save_file({**adapters, **head}, tmp_path / "adapter.xyz.safetensors", {"format": "pt"})
    encoder, _ = load_encoder(str(tmp_path), adapter="xyz")
    state = encoder.state_dict()
    assert adapters
    for name, tensor in adapters.items():
        assert torch.equal(state[name.removeprefix("wav2vec2.")], tensor)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_encoder(str(tmp_path), adapter="abc")


def test_what_is_no_teacher_is_named(tmp_path: Path, xlsr: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a Hugging Face folder nor a hub id"):
        load_encoder(str(tmp_path / "gone"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="is a bert, expected one of wav2vec2, hubert"):
        load_encoder(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot be loaded|is missing"):
        load_encoder(str(xlsr), adapter="xyz")


# Policy


def test_what_learns_grows_with_the_hours() -> None:
    minutes, half, hour, many = (freezing_policy(h, 24, 10000) for h in (0.1, 0.3, 1.0, 50.0))
    assert (minutes.front, minutes.layers) == (None, 18)
    assert (half.front, half.layers) == (None, 12)
    assert (hour.front, hour.layers) == (2000, 0)
    assert many.encoder < hour.encoder < minutes.encoder
    front, low, high, norm = (
        "encoder.feature_extractor.conv_layers.0.conv.weight",
        "encoder.encoder.layers.3.attention.k_proj.weight",
        "encoder.encoder.layers.20.attention.k_proj.weight",
        "encoder.encoder.layer_norm.weight",
    )
    assert not any(minutes.learns(name, 500) for name in (front, low, high, norm))
    assert minutes.learns("ctc.weight", 0)
    late = [minutes.learns(name, 9999) for name in (front, low, high, norm)]
    assert late == [False, False, True, True]
    assert [hour.learns(front, step) for step in (1999, 2000)] == [False, True]
    assert [hour.learns(low, step) for step in (499, 500)] == [False, True]
    assert Freezing().learns(front, 0)


def test_replay_is_a_tenth_of_what_is_heard() -> None:
    share = replay_share(9.0, 20.0, 0.1)
    assert share * 20 / (share * 20 + 9) == pytest.approx(0.1)
    assert replay_share(100.0, 1.0, 0.1) == 1.0  # there is no more
    assert replay_share(5.0, 0.0, 0.1) == 0.0


# Several processes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (options(layers="0,1"), "--layers and --ffn need --whisper or --from-teacher"),
        (options(ffn=8), "--layers and --ffn need --whisper or --from-teacher"),
        (options(layers="1,0", whisper="none"), "'1,0', expected rising numbers"),
        (options(layers="x", whisper="none"), "'x', expected rising numbers"),
        (options(start="a", whisper="none"), "not allowed with"),
    ],
)
def test_wrong_layers_are_named(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        cli.main([*loop(corpus, tmp_path, features=corpus.parent / "features"), *given])
    assert message in capsys.readouterr().err


def test_core_hours_end_runs_which_are_then_compared(
    corpus: Path,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "whisper_student", lambda vocab, **_: tiny_config(vocab))
    features = corpus.parent / "features"
    budget = 0.5 / 3600  # half a second
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, run in enumerate(runs):
        asked = options(features=features, vocab=12, core_hours=budget, seed=seed)
        args = [*loop(corpus, run, steps=10_000), *asked]
        assert cli.main(args) == 0
        progress = load_checkpoint(run / "last").state["progress"]
        assert 1 < progress["step"] < 10_000
        assert progress["core_hours"] >= budget
        assert cli.main(args) == 0  # is at its end
        assert load_checkpoint(run / "last").state["progress"] == progress
    capsys.readouterr()
    asked = options(features=features, segment=16)
    assert measure.main(["runs", str(corpus), *map(str, runs), *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| one", "| two"]
    assert {row["name"] for row in json.loads(lines[-1])["runs"]} == {"one", "two"}
    with pytest.raises(SystemExit):
        measure.main(["runs", str(corpus), str(tmp_path / "none"), *asked])
    assert "expected a checkpoint folder" in capsys.readouterr().err


def test_patience_ends_a_run(
    corpus: Path, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "whisper_student", lambda vocab, **_: tiny_config(vocab))
    # At this rate nothing is ever recognised, so the first evaluation stays the best.
    args = loop(
        corpus,
        tmp_path,
        features=corpus.parent / "features",
        vocab=12,
        steps=50,
        eval_every=1,
        patience=2,
        lr=0.0,
        head_lr=0.0,
        tensorboard=True,
    )
    assert cli.main(args) == 0
    with (tmp_path / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3"]
    assert len(list((tmp_path / "tensorboard").iterdir())) >= 1
