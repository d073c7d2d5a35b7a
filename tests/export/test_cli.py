"""``loquent export`` and ``loquent bench``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loquent.engine.bundle import DECODERS, Bundle
from loquent.export import bench, cli
from loquent.export.cli import ExportRefused, check_int8
from loquent.models.checkpoint import load_checkpoint, save_checkpoint
from loquent.models.data import read_manifest

pytestmark = pytest.mark.slow


def test_float_export(fp32: Any, run: Path) -> None:
    best = load_checkpoint(run / "last").student.state_dict()
    half = load_checkpoint(fp32.folder.with_name("weights")).student.state_dict()
    for name, weight in best.items():
        step = float(weight.abs().max()) / 127
        torch.testing.assert_close(half[name], weight, atol=0.6 * step + 1e-4, rtol=1e-3)
    bundle = Bundle.load(fp32.folder)
    assert (bundle.name, bundle.precision, bundle.default_decoder) == ("toy", "fp32", "ctc")
    assert bundle.decoders == DECODERS
    assert bundle.manifest["licence"] == "none"
    assert bundle.manifest["training"]["progress"]["step"] == 400
    assert bundle.manifest["training"]["origin"] == {"start": "random weights"}
    spm = [(folder / "tokens.spm").read_bytes() for folder in (fp32.folder, run / "last")]
    assert spm[0] == spm[1]
    # Parity: two batch sizes, six segments, six right contexts.
    assert fp32.out.count("| 20 |") == 72
    assert fp32.out.splitlines()[-1].endswith(" MB")


def test_int8_export(int8: Any, fp32: Any, corpus: Path) -> None:
    bundle = Bundle.load(int8.folder)
    assert bundle.level == cli.quiet(bundle.features, read_manifest(corpus))
    assert f"speech below {bundle.level.quiet:g} dB is raised, by up to 25 dB" in int8.out
    assert (bundle.precision, bundle.default_decoder) == ("int8", "rnnt")
    assert "rnnt: WER fp32 0.00 %, int8 0.00 % (+0.00 points, allowed +1.00)" in int8.out
    assert "ctc: WER fp32 0.00 %, int8 0.00 %" in int8.out
    scores = bundle.manifest["scores"]
    assert [(s["precision"], s["decoder"], s["chunk_ms"]) for s in scores] == [
        ("fp32", "rnnt", 320.0),
        ("int8", "rnnt", 320.0),
        ("fp32", "ctc", 320.0),
        ("int8", "ctc", 320.0),
    ]
    assert scores[0]["set"] == "corpus.jsonl"
    assert scores[0]["wer"] == {"even": 0.0, "odd": 0.0}
    sizes = [(e.folder / "encoder.onnx").stat().st_size for e in (fp32, int8)]
    assert sizes[1] < sizes[0]


def test_manifests_are_strict_json(fp32: Any, int8: Any) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for exported in (fp32, int8):
        text = (exported.folder / "manifest.json").read_text()
        json.loads(text, parse_constant=refuse)


def test_gate_refuses_int8_that_loses_too_much(fp32: Any, int8: Any, corpus: Path) -> None:
    utterances = read_manifest(corpus)[:4]
    # Both greedy decoders, one of which is the default, with both bundles.
    assert len(check_int8(fp32.folder, int8.folder, utterances, 0.0)) == 4
    with pytest.raises(
        ExportRefused,
        match=r"int8 costs 0\.00 points of WER with rnnt, allowed are -1\.00; ship fp32",
    ):
        check_int8(fp32.folder, int8.folder, utterances, -0.01)


def test_gate_counts_what_int8_loses(fp32: Any, corpus: Path, tmp_path: Path) -> None:
    """An int8 bundle that hears nothing: the encoder's weights are all but gone."""
    import hashlib

    import numpy as np
    import onnx
    from onnx import numpy_helper

    from loquent.export.bundle import update_manifest

    deaf = tmp_path / "deaf"
    shutil.copytree(fp32.folder, deaf)
    model = onnx.load(deaf / "encoder.onnx")
    for weight in model.graph.initializer:
        array = numpy_helper.to_array(weight)
        if array.ndim == 2 and array.dtype == np.float32:
            weight.CopyFrom(numpy_helper.from_array(np.zeros_like(array), weight.name))
    onnx.save(model, deaf / "encoder.onnx")
    encoder = json.loads((deaf / "manifest.json").read_text())["encoder"]
    encoder["sha256"] = hashlib.sha256((deaf / "encoder.onnx").read_bytes()).hexdigest()
    update_manifest(deaf, encoder=encoder)
    with pytest.raises(ExportRefused, match=r"int8 costs \d\d+\.\d\d points of WER with rnnt"):
        check_int8(fp32.folder, deaf, read_manifest(corpus)[:4], 0.5)


def test_average(run: Path, tmp_path: Path) -> None:
    one, other = load_checkpoint(run / "last"), load_checkpoint(run / "last")
    with torch.no_grad():
        for weight in other.student.parameters():
            weight += 1
    save_checkpoint(
        tmp_path / "other",
        other.student.config,
        other.tokenizer,
        other.student.state_dict(),
        other.state,
    )
    before = {name: weight.clone() for name, weight in one.student.named_parameters()}
    cli._average(one, f"{tmp_path / 'other'}=0.25")
    for name, weight in one.student.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name] + 0.25)
    assert one.state["origin"]["average"] == "other, 0.25 of the weights"
    cli._average(one, f"{run / 'last'}=0.5")
    for name, weight in one.student.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name] + 0.125)
    named = f"other, 0.25 of the weights; then {run.name}, 0.5 of the weights"
    assert one.state["origin"]["average"] == named


def error(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    try:
        status = cli.main([str(a) for a in argv])
    except SystemExit as exit_:
        status = exit_.code  # type: ignore[assignment]
    assert status == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert message.startswith("loquent export: ")
    return message


def test_mistakes(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("-o", tmp_path / "out")
    assert "gone: no config.json; expected a checkpoint" in error(capsys, tmp_path / "gone", *out)
    checkpoint = run / "best"
    missing = error(capsys, checkpoint, *out, "--int8", "--dev", tmp_path / "gone.jsonl")
    assert "gone.jsonl: no such manifest" in missing
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"audio": "a.wav"}')
    assert "wrong.jsonl:1: KeyError 'text'" in error(capsys, checkpoint, *out, "--dev", wrong)
    assert "--int8 needs --dev MANIFEST" in error(capsys, checkpoint, *out, "--int8")
    for average in ("0.5", f"{checkpoint}=2", f"{checkpoint}=half"):
        message = error(capsys, checkpoint, *out, "--average", average)
        assert f"got '{average}', expected CHECKPOINT=SHARE" in message
    assert not (tmp_path / "out").exists()


def test_other_folders_are_left_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.txt").write_text("ten years")
    message = error(capsys, run / "best", "-o", folder)
    assert f"{folder} exists and is no bundle; choose another" in message
    file = tmp_path / "file"
    file.write_text("ten years")
    assert "exists and is no bundle" in error(capsys, run / "best", "-o", file)
    message = error(capsys, run / "best", "-o", tmp_path / "out", "--weights", folder)
    assert f"{folder} exists and is no checkpoint; choose another" in message
    assert (folder / "chapter1.txt").read_text() == file.read_text() == "ten years"


def test_a_checkpoint_of_other_features_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(run / "best", folder)
    state = json.loads((folder / "state.json").read_text())
    state["features"]["hop"] = 320
    (folder / "state.json").write_text(json.dumps(state))
    message = error(capsys, folder, "-o", tmp_path / "out")
    assert "trained on the features" in message
    assert "'hop': 320" in message


def test_bench_prints_a_table_and_ends_with_json(
    fp32: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--chunk-ms", "320", "--decoder", "ctc", "--steps", "2"]
    assert bench.main(["--bundle", str(fp32.folder), *options]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert [row.split("|")[3].strip() for row in table[3:]] == ["1", "4", "16"]
    rows = json.loads(last)["bundle"]
    assert [row["batch"] for row in rows] == [1, 4, 16]
    assert all(0 < row["ms"] <= row["p90"] for row in rows)
    assert rows[0]["rtf"] == pytest.approx(rows[0]["ms"] / 320, abs=1e-4)


def test_bench_of_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench.main(["--bundle", str(tmp_path / "gone")])
    assert exit_.value.code == 1
    assert capsys.readouterr().err.startswith("loquent bench: ")
