"""torchaudio's Emformer RNN-T as a bundle: its features, its tokens, its mistakes told."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import sentencepiece
import torch
import torchaudio
from numpy.typing import NDArray
from torch import Tensor
from torchaudio.models import RNNT
from torchaudio.models.rnnt import emformer_rnnt_model
from torchaudio.pipelines import RNNTBundle

from loquent.clients.cli import main
from loquent.engine.audio import load_audio
from loquent.engine.bundle import Bundle
from loquent.engine.features import fbank
from loquent.engine.recognizer import Recognizer

Float32 = NDArray[np.float32]
SYMBOLS, BLANK, SEGMENT, RIGHT = 41, 40, 16, 4


def tiny() -> RNNT:
    """The base model's form, but narrow and shallow."""
    return emformer_rnnt_model(
        input_dim=80,
        encoding_dim=48,
        num_symbols=SYMBOLS,
        segment_length=SEGMENT,
        right_context_length=RIGHT,
        time_reduction_input_dim=16,
        time_reduction_stride=4,
        transformer_num_heads=8,
        transformer_ffn_dim=96,
        transformer_num_layers=2,
        transformer_dropout=0.1,
        transformer_activation="gelu",
        transformer_left_context_length=30,
        transformer_max_memory_size=0,
        transformer_weight_init_scale_strategy="depthwise",
        transformer_tanh_on_mem=True,
        symbol_embedding_dim=24,
        num_lstm_layers=2,
        lstm_layer_norm=True,
        lstm_layer_norm_epsilon=1e-3,
        lstm_dropout=0.3,
    )


@dataclass(frozen=True)
class Theirs:
    """Files of the pipeline's form, and the pipeline on them."""

    folder: Path
    pipeline: RNNTBundle
    model: RNNT
    pcm: Float32

    @property
    def options(self) -> list[str]:
        names = {"weights": "weights.pt", "stats": "stats.json", "spm": "spm.model"}
        return [part for k, n in names.items() for part in (f"--{k}", str(self.folder / n))]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    folder = tmp_path_factory.mktemp("torchaudio")
    torch.manual_seed(0)
    model = tiny().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        # As often silent as a trained model, or nothing but the first tokens would be compared.
        model.joiner.linear.weight *= 3
        model.joiner.linear.bias[BLANK] += 3
    torch.save(model.state_dict(), folder / "weights.pt")
    with as_file(files("loquent.engine") / "samples" / "morning.flac") as path:
        pcm = load_audio(path)[: 6 * 16000]
    # Silence at the end, as after speech: our flush goes on with it.
    pcm = np.concatenate([pcm, np.zeros(800, np.float32)])
    mel = torchaudio.transforms.MelSpectrogram(16000, n_fft=400, n_mels=80, hop_length=160)
    log = torch.log(mel(torch.from_numpy(pcm)) * 32767.0**2 + 1)
    stats = {"mean": log.mean(1).tolist(), "invstddev": (1 / log.std(1)).tolist()}
    (folder / "stats.json").write_text(json.dumps(stats))
    text = ["the morning sun rose over the red roofs", "seven ravens sat on the iron gate"] * 9
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=out,
        vocab_size=SYMBOLS - 1,
        model_type="bpe",
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "spm.model").write_bytes(out.getvalue())
    pipeline = RNNTBundle(
        _rnnt_path=str(folder / "weights.pt"),
        _rnnt_factory_func=tiny,
        _global_stats_path=str(folder / "stats.json"),
        _sp_model_path=str(folder / "spm.model"),
        _right_padding=RIGHT,
        _blank=BLANK,
        _sample_rate=16000,
        _n_fft=400,
        _n_mels=80,
        _hop_length=160,
        _segment_length=SEGMENT,
        _right_context_length=RIGHT,
    )
    with pytest.MonkeyPatch.context() as patch:
        # The files are here already: torchaudio looks them up by their own path.
        patch.setattr("torchaudio.utils._download_asset", lambda path: path)
        pipeline.get_feature_extractor()
    return Theirs(folder, pipeline, model, pcm)


@pytest.fixture(scope="module")
def bundle(theirs: Theirs) -> Path:
    out = theirs.folder / "bundle"
    assert main(["import", "torchaudio-emformer", *theirs.options, "-o", str(out)]) == 0
    return out


@pytest.fixture
def extractors(
    theirs: Theirs, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """torchaudio's own, whole and streaming."""
    monkeypatch.setattr("torchaudio.utils._download_asset", lambda path: path)
    p = theirs.pipeline
    return p.get_feature_extractor(), p.get_streaming_feature_extractor()


def greedy(model: RNNT, features: Tensor, symbols: int = 3) -> list[int]:
    """torchaudio's model, segment by segment, greedily: at most ``symbols`` tokens a frame."""
    one = torch.tensor([1])
    said: list[int] = []
    predicted, _, context = model.predict(torch.tensor([[BLANK]]), one, None)
    state = None
    with torch.no_grad():
        for start in range(0, len(features) - RIGHT, SEGMENT):
            window = features[start : start + SEGMENT + RIGHT]
            if len(window) < SEGMENT + RIGHT:
                break
            encoded, _, state = model.transcribe_streaming(
                window[None], torch.tensor([SEGMENT + RIGHT]), state
            )
            for frame in encoded[0]:
                for _ in range(symbols):
                    logits, _, _ = model.join(frame[None, None], one, predicted, one)
                    best = int(logits.argmax())
                    if best == BLANK:
                        break
                    said.append(best)
                    predicted, _, context = model.predict(torch.tensor([[best]]), one, context)
    return said


def ours(bundle: Path, pcm: Float32) -> tuple[list[int], str]:
    """Tokens and text of our engine, in one segment, from packets of odd sizes."""
    recognizer = Recognizer.load(bundle)
    tokens: list[int] = []
    stream = recognizer.stream(chunk_ms=160, endpoint=None)
    accept = stream.transcript.accept

    def watch(frames: Any) -> None:
        tokens.extend(t.id for frame in frames for t in frame.tokens)
        accept(frames)

    stream.transcript.accept = watch  # type: ignore[method-assign]
    texts: list[str] = []
    for start in range(0, len(pcm), 1231):
        stream.accept(pcm[start : start + 1231])
        while stream.ready:
            recognizer.step([stream])
    stream.finish()
    while stream.ready:
        recognizer.step([stream])
    texts += [e.text for e in stream.events() if type(e).__name__ == "Final"]
    return tokens, " ".join(texts)


def test_features_are_the_pipelines(
    theirs: Theirs, bundle: Path, extractors: tuple[Callable[..., Any], Callable[..., Any]]
) -> None:
    expected, length = extractors[0](torch.from_numpy(theirs.pcm))
    got = fbank(Bundle.load(bundle).features, theirs.pcm)
    assert len(got) == int(length) - RIGHT  # behind the last frame it puts zeros
    np.testing.assert_allclose(got, expected[:-RIGHT].numpy(), atol=2e-3)


def test_their_streaming_features_are_not_their_features(
    theirs: Theirs, extractors: tuple[Callable[..., Any], Callable[..., Any]]
) -> None:
    """Each segment is centred and mirrored on its own: the first and the last two frames differ."""
    whole, _ = extractors[0](torch.from_numpy(theirs.pcm))
    hop, samples = 160, (SEGMENT + RIGHT) * 160
    off: list[Float32] = []
    for start in range(SEGMENT, 500, SEGMENT):
        piece, _ = extractors[1](torch.from_numpy(theirs.pcm[start * hop : start * hop + samples]))
        off.append((piece - whole[start : start + SEGMENT + RIGHT + 1]).abs().mean(1).numpy())
    by_frame = np.mean(off, axis=0)
    assert len(by_frame) == SEGMENT + RIGHT + 1  # one frame more than the segment has
    np.testing.assert_allclose(by_frame[2:-2], 0, atol=2e-3)
    # In units of the features' standard deviation.
    assert by_frame[0] > 0.1 > by_frame[1]
    assert by_frame[-1] > 0.1 > by_frame[-2]


@torch.no_grad()
def test_tokens_are_the_pipelines(
    theirs: Theirs, bundle: Path, extractors: tuple[Callable[..., Any], Callable[..., Any]]
) -> None:
    got, text = ours(bundle, theirs.pcm)
    # Behind the audio ours hears silence; so does theirs when the audio goes on with it.
    silence = np.zeros(16000, np.float32)
    features, _ = extractors[0](torch.from_numpy(np.concatenate([theirs.pcm, silence])))
    flush = SEGMENT * -(-(1 + len(theirs.pcm) // 160 + 8) // SEGMENT) + RIGHT
    expected = greedy(theirs.model, features[:flush])
    assert len(set(expected)) > 5
    assert 20 < len(expected) < 2 * len(features) / 4  # neither mute nor babbling
    shorter = min(len(got), len(expected))
    assert got[:shorter] == expected[:shorter]
    assert len(expected) - len(got) <= 3 * 3  # theirs goes on to the end of its last segment
    assert got[:shorter]
    monkey = theirs.pipeline.get_token_processor()
    assert text == " ".join(monkey([BLANK, *got]).split())


def test_what_the_bundle_offers(bundle: Path) -> None:
    loaded = Bundle.load(bundle)
    assert (loaded.chunks_ms, loaded.right_contexts_ms) == ((160.0,), (40.0,))
    assert loaded.default_decoder == "rnnt" in loaded.decoders
    assert "ctc" not in loaded.decoders
    assert loaded.tokens[BLANK] == "<blank>"
    assert "<unk>" not in loaded.tokens
    assert "</s>" not in loaded.tokens


def test_int8(theirs: Theirs, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = theirs.folder / "int8"
    options = [*theirs.options, "--int8", "-o", str(out)]
    assert main(["import", "torchaudio-emformer", *options]) == 0
    assert " int8, " in capsys.readouterr().out.splitlines()[-2]
    small, large = ((f / "encoder.onnx").stat().st_size for f in (out, bundle))
    assert small < 0.7 * large
    assert ours(out, theirs.pcm)[0]


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("I could have done anything",))


def test_mistakes(
    theirs: Theirs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def error(**changes: object) -> str:
        options = dict(zip(theirs.options[::2], theirs.options[1::2], strict=True))
        options |= {f"--{k}": str(v) for k, v in changes.items()}
        argv = [part for k, v in options.items() if v != "None" for part in (k, v)]
        assert main(["import", "torchaudio-emformer", *argv, "-o", str(tmp_path / "out")]) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    def file(name: str, data: object) -> Path:
        path = tmp_path / name
        torch.save(data, path)
        return path

    assert "no such file" in error(weights="gone.pt")
    message = error(weights=file("evil.pt", {"w": Evil()}))
    assert "more than tensors, which is refused" in message
    assert "anything" not in message
    assert "expected a state dict" in error(weights=file("list.pt", [1]))
    assert "no joiner.linear.weight" in error(weights=file("other.pt", {"a": torch.zeros(1)}))
    (tmp_path / "junk.pt").write_bytes(b"junk")
    assert "junk.pt" in error(weights=tmp_path / "junk.pt")
    stats = tmp_path / "stats.json"
    stats.write_text("{}")
    assert "expected JSON with the lists mean and invstddev" in error(stats=stats)
    stats.write_text('{"mean": [1], "invstddev": [1]}')
    assert "expected 80 values each" in error(stats=stats)
    assert "cannot be read as a SentencePiece model" in error(spm=stats)
    weights = tiny().state_dict()
    weights["joiner.linear.weight"] = torch.zeros(50, 48)
    assert "expected 49: one less than" in error(
        weights=file(
            "more.pt",
            weights
            | {
                "joiner.linear.bias": torch.zeros(50),
                "predictor.embedding.weight": torch.zeros(50, 24),
            },
        )
    )

    def no_network(url: str, path: str) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    message = error(stats=None)
    assert "global_stats_rnnt_librispeech.json: cannot be fetched" in message
    assert "give its path with --stats" in message
