"""Evaluation streams clips side by side and adds up what jiwer would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest

from loquent.engine.audio import load_audio
from loquent.engine.bundle import DECODERS, Bundle
from loquent.engine.recognizer import Recognizer
from loquent.export import evaluate as evaluate_module
from loquent.export.bundle import update_manifest
from loquent.export.channel import CHANNELS, through
from loquent.export.evaluate import Clips, evaluate, main, transcribe_all
from loquent.models.align import BundleCtc, align
from loquent.models.data import Utterance, read_manifest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recognizer(fp32: Any) -> Recognizer:
    return Recognizer.load(fp32.folder)


@pytest.fixture(scope="module")
def utterances(corpus: Path) -> list[Utterance]:
    return read_manifest(corpus)


@pytest.mark.parametrize("decoder", ["rnnt", "ctc"])
@pytest.mark.parametrize("batch", [1, 5, 100])
def test_clips_side_by_side_are_clips_one_by_one(
    recognizer: Recognizer, utterances: list[Utterance], decoder: str, batch: int
) -> None:
    expected = [
        " ".join(
            final.text
            for final in recognizer.transcribe(load_audio(u.audio), chunk_ms=80, decoder=decoder)
        )
        for u in utterances
    ]
    got = transcribe_all(recognizer, utterances, decoder=decoder, chunk_ms=80, batch=batch)
    assert got == expected


def test_scores_are_jiwers_by_source(recognizer: Recognizer, utterances: list[Utterance]) -> None:
    # Wrong transcripts for some, so that there is something to count.
    wrong = [
        Utterance(u.audio, "ba ba kiwi" if i % 3 == 0 else u.text, u.source, u.duration)
        for i, u in enumerate(utterances)
    ]
    result = evaluate(recognizer, wrong, decoder="ctc", chunk_ms=320)
    heard = transcribe_all(recognizer, wrong, decoder="ctc", chunk_ms=320)
    for source in ("even", "odd"):
        pairs = [(u.text, h) for u, h in zip(wrong, heard, strict=True) if u.source == source]
        references, hypotheses = (list(side) for side in zip(*pairs, strict=True))
        score = result.scores[source]
        assert score.utterances == len(pairs) == 12
        assert score.wer == pytest.approx(jiwer.wer(references, hypotheses))
        assert score.cer == pytest.approx(jiwer.cer(references, hypotheses))
        assert score.wer > 0
    assert result.total.words == sum(len(u.text.split()) for u in wrong)
    assert (result.bundle, result.precision, result.chunk_ms) == ("toy", "fp32", 320)


def test_command(fp32: Any, int8: Any, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--chunk-ms", "80", "--chunk-ms", "320", "--decoder", "ctc"]
    bundles = ["--bundle", str(fp32.folder), "--bundle", str(int8.folder)]
    assert main([str(corpus), *bundles, *options]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    cells = cells[2 : 2 + 6]
    assert cells[0] == ["system", "precision", "decoder", "chunk ms", "even", "odd", "all"]
    assert [row[:4] for row in cells[2:]] == [
        ["toy", precision, "ctc", chunk]
        for precision in ("fp32", "int8")
        for chunk in ("80", "320")
    ]
    assert [row["wer"] for row in json.loads(last)["results"]] == [0.0] * 4
    assert main([str(corpus), *bundles, *options, "--json"]) == 0
    (only,) = capsys.readouterr().out.splitlines()
    without = [
        [{**row, "cpu_per_second": None} for row in json.loads(text)["results"]]
        for text in (last, only)
    ]
    assert without[0] == without[1]


def test_noise_delay_lines_and_card(
    fp32: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "toy"
    shutil.copytree(fp32.folder, bundle)
    about = tmp_path / "about.md"
    about.write_text("For toys.\n")
    lines = tmp_path / "lines.jsonl"
    options = ["--bundle", str(bundle), "--chunk-ms", "80", "--decoder", "ctc"]
    options += ["--snr", "-20", "--noise", "white", "--delay", "--by", "source", "--by", "licence"]
    options += ["--lines", str(lines), "--card", str(bundle), "--about", str(about)]
    assert main([str(corpus), *options]) == 0
    clean, noisy = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert (clean["noise"], noisy["noise"]) == ("clean", "-20 dB")
    assert clean["wer"] == 0 < noisy["wer"]
    assert clean["by"]["licence"].keys() == {"CC0-1.0"}
    assert clean["delay_ms"]["words"] == clean["words"] == 72
    # Tones are known before they end, and this model goes on saying them to their end.
    assert -160 < clean["delay_ms"]["shown"] < 160
    # Greedy decoding commits a word when the next one starts.
    assert clean["delay_ms"]["shown"] < clean["delay_ms"]["committed"] < 700
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(rows) == 2 * 24
    assert all(row["heard"] == row["text"] for row in rows if row["noise"] == "clean")
    assert sum(row["errors"] for row in rows[24:]) / 72 == pytest.approx(noisy["wer"], abs=1e-4)
    card = (bundle / "README.md").read_text()
    assert card.startswith("# The model `toy`, version 0.1.0\n\nFor toys.\n")
    for part in ("## Training", "## Accuracy", "## In noise", "## Delay", "## Cost", "core-hours"):
        assert part in card
    # The bundle still loads, and knows its scores.
    assert [row["wer"] for row in Bundle.load(bundle).manifest["scores"]] == [0.0, noisy["wer"]]


def test_clips_may_be_played_quieter(
    int8: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deaf = tmp_path / "deaf"
    shutil.copytree(int8.folder, deaf)
    update_manifest(deaf, level=None, name="deaf")
    options = ["--bundle", str(int8.folder), "--bundle", str(deaf), "--quieter", "30"]
    assert main([str(corpus), *options, "--chunk-ms", "320", "--decoder", "ctc", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    found = {(r["system"], r["noise"]): r["wer"] for r in results}
    assert found["toy", "clean"] == found["deaf", "clean"] == found["toy", "30 dB quieter"] == 0
    assert found["deaf", "30 dB quieter"] > 0.2


def test_clips_may_begin_later(
    int8: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    more = [*rows, {**rows[0], "text": "room 101"}, {**rows[0], "duration": 31}]
    manifest = corpus.with_name("more.jsonl")
    manifest.write_text("".join(json.dumps(row) + "\n" for row in more))
    options = ["--bundle", str(int8.folder), "--lead", "0.5", "--decoder", "ctc", "--delay"]
    assert main([str(manifest), *options, "--chunk-ms", "320", "--json"]) == 0
    out, err = capsys.readouterr()
    clean, later = json.loads(out)["results"]
    assert (clean["noise"], later["noise"]) == ("clean", "0.5 s later")
    assert "delay_ms" not in later
    assert f"2 of {len(more)} rows left out: expected text without digits" in err
    utterances = read_manifest(corpus)
    own, moved = Clips(utterances).get(0), Clips(utterances, lead=0.5).get(0)
    np.testing.assert_array_equal(moved[:8000], 0)
    np.testing.assert_array_equal(moved[8000:], own)
    for asked, message in (
        (["--lead", "0"], "got --lead 0, expected more than 0"),
        (["--lines", str(manifest)], "more.jsonl is an input, which the output would destroy"),
    ):
        with pytest.raises(SystemExit):
            main([str(manifest), *asked])
        assert message in capsys.readouterr().err


def test_clips_may_go_through_a_channel(
    int8: Any, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--bundle", str(int8.folder), "--channel", "telephone", "--channel", "dull"]
    assert main([str(corpus), *options, "--chunk-ms", "320", "--decoder", "ctc", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [r["noise"] for r in results] == ["clean", "telephone", "dull"]
    clips = [Clips(read_manifest(corpus), channel=r["noise"].replace("clean", "")) for r in results]
    clean, *changed = (c.get(0) for c in clips)
    for pcm in changed:
        assert pcm.shape == clean.shape
        assert np.abs(pcm - clean).max() > 1e-3
    with pytest.raises(SystemExit):
        main([str(corpus), "--channel", "radio"])
    assert "invalid choice: 'radio'" in capsys.readouterr().err


@pytest.mark.parametrize("samples", [0, 100, 16000, 16001])
@pytest.mark.parametrize("name", CHANNELS)
def test_what_channels_do(name: str, samples: int) -> None:
    rng = np.random.default_rng(0)
    pcm = (0.1 * rng.standard_normal(samples)).astype(np.float32)
    out = through(name, pcm, 16000)
    assert out.shape == pcm.shape
    assert out.dtype == np.float32
    if samples < 1000:
        return

    def level(pcm: Any, low: float, high: float) -> float:
        hz = np.fft.rfftfreq(len(pcm), 1 / 16000)
        power = np.abs(np.fft.rfft(pcm)) ** 2
        return float(10 * np.log10(power[(hz > low) & (hz < high)].mean()))

    assert level(out, 10, 7990) == pytest.approx(level(pcm, 10, 7990), abs=0.7)
    octave = level(out, 2700, 3300) - level(out, 1350, 1650)
    assert octave == pytest.approx({"telephone": 0, "bright": 6, "dull": -6}[name], abs=1)
    if name == "telephone":
        for low, high in ((20, 130), (5000, 7900)):
            assert level(out, low, high) < level(out, 500, 3000) - 25


def test_a_killed_evaluation_goes_on(
    fp32: Any,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = tmp_path / "kept"
    options = ["--bundle", str(fp32.folder), "--chunk-ms", "80", "--chunk-ms", "320"]
    options += ["--decoder", "ctc", "--delay", "--json", "--resume", str(kept)]
    measured: list[float] = []
    real = evaluate_module.evaluate

    def counted(*args: Any, **kwargs: Any) -> Any:
        measured.append(kwargs["chunk_ms"])
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluate_module, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        main([str(corpus), *options])
    assert main([str(corpus), *options]) == 0
    first = capsys.readouterr().out
    assert measured == [80, 320, 320]
    assert main([str(corpus), *options]) == 0
    assert capsys.readouterr().out == first  # processor time and all
    assert measured == [80, 320, 320]
    # What is damaged, and what was heard of other clips, is measured anew.
    for file in kept.iterdir():
        file.write_text("{")
    assert main([str(corpus), *options]) == 0
    assert measured[3:] == [80, 320]
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    for row in rows:
        row["audio"] = str(corpus.parent / row["audio"])
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    assert main([str(other), *options]) == 0
    assert len(measured) == 7


def test_alignment_finds_the_tones(fp32: Any, utterances: list[Utterance]) -> None:
    model = BundleCtc(Bundle.load(fp32.folder))
    off = [
        word.start - (0.2 + i * (0.16 + 0.15))
        for u in utterances
        for i, word in enumerate(align(model, load_audio(u.audio), u.text).words)
    ]
    assert len(off) == 72
    assert np.abs(off).max() < 0.16
    assert np.median(np.abs(off)) < 0.08


def test_peers_hear_the_same_clips(
    fp32: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pocketsphinx")
    manifest = tmp_path / "two.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()[:2]]
    for row in rows:
        row["audio"] = str(corpus.parent / row["audio"])
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--bundle", str(fp32.folder), "--decoder", "ctc", "--chunk-ms", "320"]
    assert main([str(manifest), *options, "--peers", "pocketsphinx"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    ours, theirs = json.loads(last)["results"]
    assert (ours["system"], theirs["system"]) == ("toy", "pocketsphinx")
    assert ours["clips"] == theirs["clips"] == 2
    assert ours["wer"] == 0 < theirs["wer"]  # nobody has told it of this language of tones
    assert ours["cpu_per_second"] > 0
    assert theirs["cpu_per_second"] > 0
    assert "CPU s / audio s" in "\n".join(text)
    # Noise is for us alone, unless they are to hear it.
    noisy = [*options, "--peers", "pocketsphinx", "--snr", "0", "--noise", "white", "--json"]
    for more, heard in ([], ["clean"]), (["--peers-in-noise"], ["clean", "0 dB"]):
        assert main([str(manifest), *noisy, *more]) == 0
        results = json.loads(capsys.readouterr().out)["results"]
        assert [r["noise"] for r in results if r["system"] == "toy"] == ["clean", "0 dB"]
        assert [r["noise"] for r in results if r["system"] == "pocketsphinx"] == heard


def test_everything_the_bundle_offers_is_the_default(
    fp32: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "one.jsonl"
    first = json.loads(corpus.read_text().splitlines()[0])
    manifest.write_text(json.dumps(first | {"audio": str(corpus.parent / first["audio"])}))
    assert main([str(manifest), "--bundle", str(fp32.folder)]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert {(row["decoder"], row["chunk_ms"]) for row in rows} == {
        (decoder, chunk) for decoder in DECODERS for chunk in (40, 80, 160, 320, 640, 1280)
    }


def test_mistakes(
    fp32: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*argv: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([str(a) for a in argv])
        assert exit_.value.code == 1
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("loquent evaluate: ")
        return message

    bundle = ("--bundle", fp32.folder)
    assert "gone.jsonl: no such manifest" in error("gone.jsonl", *bundle)
    assert "gone" in error(corpus, "--bundle", tmp_path / "gone")
    assert "got chunk_ms 50.0, expected one of 40, 80" in error(corpus, *bundle, "--chunk-ms", 50)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl: no usable row" in error(empty, *bundle)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"audio": "gone.wav", "text": "a", "duration": 1}')
    assert "gone.wav: No such file" in error(broken, *bundle)
    noise = ("--snr", 5, "--noise")
    assert "got noise 'hum', expected" in error(corpus, *bundle, *noise, "hum")
    (tmp_path / "quiet").mkdir()
    assert "got no recordings" in error(corpus, *bundle, *noise, tmp_path / "quiet")
    peers = ("--peers", "whisper-tiny")
    assert "got 'siri', expected pocketsphinx" in error(corpus, *bundle, "--peers", "siri")
    assert "expected --whisper-tiny DIR" in error(corpus, *bundle, *peers)
    assert "model.bin is missing" in error(corpus, *bundle, *peers, "--whisper-tiny", tmp_path)
    card = ("--chunk-ms", 320, "--decoder", "ctc", "--card")
    assert "a folder without manifest.json" in error(corpus, *bundle, *card, tmp_path)
