"""Whisper teachers, fine-tuned and as published, through the public commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.models.commands import columns, loop, options
from transformers import WhisperConfig, WhisperForConditionalGeneration

from loquent.engine.audio import load_audio
from loquent.engine.features import fbank, whisper_spec
from loquent.models import cli, distill
from loquent.models.checkpoint import load_checkpoint
from loquent.models.data import read_manifest
from loquent.models.posteriors import Posteriors
from loquent.models.student import StudentConfig
from loquent.models.tokens import Tokenizer

Config = Callable[[int], StudentConfig]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    source = tmp_path_factory.mktemp("hub") / "whisper"
    WhisperForConditionalGeneration(
        WhisperConfig(
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
    ).save_pretrained(source)
    return source


def test_whisper_teacher_and_a_lattice_beside(
    corpus: Path,
    whisper: Path,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    features = corpus.parent / "features"
    run = tmp_path / "teacher"
    frozen = options(freeze_layers=1, freeze_encoder=0)
    args = loop(corpus, run, features=features, replay=corpus, vocab=12)
    assert cli.main(["teacher", *args, *frozen, *options(teacher=whisper)]) == 0
    checkpoint = load_checkpoint(run / "last")
    assert checkpoint.student.config.joiner_dim == 0
    names = checkpoint.state["origin"]["data"]
    assert "share 0.111" in names[1]
    start = load_checkpoint(run / "last").student.encoder.state_dict()
    original = cli.load_whisper(whisper)
    lowest = "layers.0.fc1.weight"
    assert torch.equal(start["emformer.layers.0.ffn_in.weight"], original[lowest])
    top = start["emformer.layers.1.ffn_in.weight"]
    assert not torch.equal(top, original["layers.1.fc1.weight"])
    # A student begins as one of its layers, with its head and its subwords.
    born = tmp_path / "born"
    begun = options(from_teacher=run / "last", layers="1", lr=0.0, head_lr=0.0)
    assert cli.main([*loop(corpus, born, features=features), *begun]) == 0
    student = load_checkpoint(born / "last")
    assert student.state["origin"]["start"] == "a teacher fine-tuned from whisper, layers 1"
    assert student.student.config.encoder.emformer.layers == 1
    assert student.student.config.encoder.pool_first
    own = student.student.state_dict()
    theirs = checkpoint.student.state_dict()
    layer = "encoder.emformer.layers"
    for mine, other in (
        (f"{layer}.0.ffn_in.weight", f"{layer}.1.ffn_in.weight"),
        ("encoder.frontend.conv1.weight", "encoder.frontend.conv1.weight"),
        ("ctc.weight", "ctc.weight"),
    ):
        torch.testing.assert_close(own[mine], theirs[other])
    # ... and may have fewer hidden units; a run that goes on keeps them.
    slim = tmp_path / "slim"
    asked = options(from_teacher=run / "last", ffn=40, lr=0.0, head_lr=0.0)
    assert cli.main([*loop(corpus, slim, features=features), *asked]) == 0
    assert cli.main([*loop(corpus, slim, features=features, steps=4), *asked]) == 0
    student = load_checkpoint(slim / "last")
    assert student.state["progress"]["step"] == 4
    assert student.state["origin"]["start"].endswith("whisper, 40 units")
    narrow = student.student.state_dict()[f"{layer}.0.ffn_in.weight"]
    assert narrow.shape == (40, 64)
    wide = theirs[f"{layer}.0.ffn_in.weight"]
    assert all(any(torch.allclose(row, unit) for unit in wide) for row in narrow)
    asked = [*loop(corpus, tmp_path / "wide"), *options(from_teacher=run / "last", ffn=257)]
    with pytest.raises(SystemExit):
        cli.main(asked)
    assert "--ffn: got 257 units, expected 1 to 256" in capsys.readouterr().err
    # The same checkpoint is a teacher for `distill`.
    heard = tmp_path / "heard"
    asked = options(output=heard, data=f"{corpus}=0.5", features=features)
    assert distill.main([str(run / "last"), *asked]) == 0
    assert len(Posteriors(heard)) == 24
    # It has heard silence behind each utterance, as Whisper is used to, and gives none of it.
    utterance = read_manifest(corpus)[0]
    frames = len(fbank(whisper_spec(), load_audio(utterance.audio)))
    said = Posteriors(heard).get(utterance)
    assert said is not None
    assert len(said.blank_N) == -(-frames // 4)
    about = json.loads((heard / "teacher.json").read_text())
    assert about["silence"] == 3.0
    # Two students: the second learns from the transducer of the first.
    monkeypatch.setattr(cli, "whisper_student", lambda vocab, **_: tiny_config(vocab))
    first, second = tmp_path / "first", tmp_path / "second"
    tokens = heard / "tokens.spm"
    shared = options(features=features, rnnt_from=0, tokens=tokens)
    assert cli.main([*loop(corpus, first), *shared]) == 0
    beside = options(kd_lattice=0.5, kd_beside_ctc=0.5, kd_beside=first / "last", seed=2)
    assert cli.main([*loop(corpus, second), *shared, *beside]) == 0
    assert all(float(columns(second)[name]) > 0 for name in ("kd_lattice", "kd_beside"))
    with pytest.raises(SystemExit):
        cli.main([*loop(corpus, second), *shared, *options(kd_beside=first / "last")])
    assert "--kd-beside CHECKPOINT goes with" in capsys.readouterr().err


def test_heads_first_on_what_a_published_whisper_gives_out(
    corpus: Path, whisper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = corpus.parent / "features"
    tokens = tmp_path / "tokens.spm"
    tokens.write_bytes(Tokenizer.train([u.text for u in read_manifest(corpus)], 12).model)
    heard = tmp_path / "heard"
    asked = [str(whisper), *options(output=heard, data=corpus, features=features, threads=1)]
    for more, message in (
        ({}, "with --tokens"),
        ({"tokens": corpus}, "no SentencePiece model"),
        ({"tokens": tokens}, "give --encoder"),
    ):
        with pytest.raises(SystemExit):
            distill.main([*asked, *options(**more)])
        assert message in capsys.readouterr().err
    # A folder with nothing but CTranslate2's file is a Whisper, too, if not this one.
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.bin").write_bytes(b"no")
    with pytest.raises(SystemExit):
        distill.main([str(broken), *asked[1:], *options(tokens=tokens, encoder=True)])
    assert "no CTranslate2 model" in capsys.readouterr().err
    # Most often it is a run whose name is misspelt.
    with pytest.raises(SystemExit):
        distill.main([str(tmp_path / "rum" / "last"), *asked[1:]])
    assert "nor a checkpoint folder of `loquent train`" in capsys.readouterr().err
    asked += options(tokens=tokens, encoder=True)
    assert distill.main(asked) == 0
    cache = Posteriors(heard)
    assert (cache.kept, cache.width, len(cache)) == (0, 64, 24)
    assert cache.about["origin"] == {"start": "whisper"}
    # Heads learn, and the encoder waits for its first step: here it never comes.
    still = options(whisper=whisper, distil=heard, kd_features=2, rnnt_from=1, lr=0.0, head_lr=0.0)
    runs = {}
    for name, steps in (("without", 0), ("with", 10)):
        run = tmp_path / name
        first = [*loop(corpus, run, features=features), *still, *options(heads_first=steps)]
        assert cli.main(first) == 0
        assert ("heads:" in capsys.readouterr().err) == (steps > 0)
        runs[name] = load_checkpoint(run / "last").student.state_dict()
        assert float(columns(run)["kd_features"]) > 0
        assert "kd_ctc" not in columns(run)
    assert load_checkpoint(run / "last").state["origin"]["start"] == "whisper"
    for name, tensor in runs["with"].items():
        same = torch.equal(tensor, runs["without"][name])
        assert same == name.startswith("encoder."), name
    # A run that goes on has its heads.
    assert cli.main([*first, *options(steps=4)]) == 0
    assert "heads:" not in capsys.readouterr().err
    after = load_checkpoint(run / "last").student.state_dict()
    assert torch.equal(after["ctc.weight"], runs["with"]["ctc.weight"])
    with pytest.raises(SystemExit):
        cli.main([*loop(corpus, tmp_path / "x", features=features), *still, *options(kd_ctc=1)])
    assert "leave --kd-ctc and --kd-text away" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*loop(corpus, tmp_path / "x", features=features), *options(heads_first=1)])
    assert "--heads-first need --distil" in capsys.readouterr().err
