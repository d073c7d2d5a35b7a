"""With one unlimited segment our encoder computes what Whisper's encoder does.

Small random models, saved by ``transformers`` and by CTranslate2's own writer. With
``LOQUENT_WHISPER`` pointing at real weights (a CTranslate2 folder), the same on speech.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

import loquent.engine
from loquent.engine.features import Fbank, fbank, whisper_spec
from loquent.models.encoder import Encoder
from loquent.models.presets import whisper_encoder
from loquent.models.whisper import WhisperWeightsError, initialise_from_whisper, load_whisper

TOLERANCE = 1e-4
FRAMES = 120  # of features; twice the positions of the small model


@pytest.fixture(scope="module")
def whisper() -> Any:
    """A Whisper of 128 x 2 with random weights, biases and layer norms included."""
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            d_model=128,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=512,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=64,
            vocab_size=60,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
            max_source_positions=FRAMES // 2,
            max_target_positions=8,
            suppress_tokens=[],
            begin_suppress_tokens=[],
        )
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed_positions" not in name:
                p += 0.05 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def hugging_face(whisper: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "whisper"
    whisper.save_pretrained(folder)
    return folder


def write_ctranslate2(whisper: Any, folder: Path, quantisation: str | None) -> Path:
    """Convert with CTranslate2's own code (its converter wants a tokenizer on top)."""
    from ctranslate2.converters.transformers import WhisperLoader

    spec = WhisperLoader().get_model_spec(whisper)
    spec.register_vocabulary([str(i) for i in range(60)])
    spec.validate()
    spec.optimize(quantization=quantisation)
    folder.mkdir(parents=True)
    spec.save(str(folder))
    return folder


def our_encoder(**changes: Any) -> Encoder:
    torch.manual_seed(1)
    config = whisper_encoder(dim=128, layers=2, left_context=2 * FRAMES)
    return Encoder(dataclasses.replace(config, **{"pool": 1, **changes})).eval()


def encode(encoder: Encoder, x_BTF: Tensor) -> Tensor:
    """With one segment over all frames; behind them, Whisper's convolution sees zeros."""
    padded = torch.nn.functional.pad(x_BTF, (0, 0, 0, encoder.config.lookahead))
    with torch.no_grad():
        out, _ = encoder(padded, torch.full((len(x_BTF),), x_BTF.shape[1]), x_BTF.shape[1], 0)
    return out  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def mel() -> Tensor:
    return torch.randn(2, FRAMES, 80, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def expected(whisper: Any, mel: Tensor) -> Tensor:
    with torch.no_grad():
        return whisper.model.encoder(mel.transpose(1, 2)).last_hidden_state  # type: ignore[no-any-return]


def test_hugging_face_folder(hugging_face: Path, mel: Tensor, expected: Tensor) -> None:
    encoder = our_encoder()
    initialise_from_whisper(encoder, load_whisper(hugging_face))
    torch.testing.assert_close(encode(encoder, mel), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("quantisation", "tolerance"), [(None, TOLERANCE), ("float16", 2e-2)], ids=["fp32", "fp16"]
)
def test_ctranslate2_folder_and_file(
    whisper: Any,
    mel: Tensor,
    expected: Tensor,
    quantisation: str | None,
    tolerance: float,
    tmp_path: Path,
) -> None:
    folder = write_ctranslate2(whisper, tmp_path / "ct2", quantisation)
    for source in (folder, folder / "model.bin", str(folder)):
        encoder = our_encoder()
        initialise_from_whisper(encoder, load_whisper(source))
        torch.testing.assert_close(encode(encoder, mel), expected, atol=tolerance, rtol=0)


def test_ctranslate2_aliases(mel: Tensor, tmp_path: Path) -> None:
    """Variables of equal content are stored once, under the name of the alphabetically first."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=128,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=512,
        decoder_layers=1,
        decoder_attention_heads=2,
        vocab_size=60,
        pad_token_id=0,
        max_source_positions=FRAMES // 2,
    )
    fresh = WhisperForConditionalGeneration(config).eval()  # every layer norm is ones and zeros
    folder = write_ctranslate2(fresh, tmp_path / "ct2", None)
    encoder = our_encoder()
    initialise_from_whisper(encoder, load_whisper(folder))
    with torch.no_grad():
        expected = fresh.model.encoder(mel.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(encode(encoder, mel), expected, atol=TOLERANCE, rtol=0)


def test_pool_averages_pairs(hugging_face: Path, mel: Tensor, expected: Tensor) -> None:
    encoder = our_encoder(pool=2)
    initialise_from_whisper(encoder, load_whisper(hugging_face))
    pairs = expected.unflatten(1, (-1, 2)).mean(2)
    torch.testing.assert_close(encode(encoder, mel), pairs, atol=TOLERANCE, rtol=0)


def test_fewer_layers_take_the_lower_ones(hugging_face: Path) -> None:
    one = Encoder(whisper_encoder(dim=128, layers=1))
    tensors = load_whisper(hugging_face)
    initialise_from_whisper(one, tensors)
    torch.testing.assert_close(
        one.state_dict()["emformer.layers.0.ffn_in.weight"], tensors["layers.0.fc1.weight"]
    )


def test_chosen_layers_are_taken(hugging_face: Path) -> None:
    one = Encoder(whisper_encoder(dim=128, layers=1))
    tensors = load_whisper(hugging_face)
    initialise_from_whisper(one, tensors, [1])
    torch.testing.assert_close(
        one.state_dict()["emformer.layers.0.ffn_in.weight"], tensors["layers.1.fc1.weight"]
    )


# What cannot be read or does not fit


def test_other_shapes_are_named(hugging_face: Path) -> None:
    tensors = load_whisper(hugging_face)
    with pytest.raises(WhisperWeightsError, match="got layer 2 for the encoder, Whisper's has 2"):
        initialise_from_whisper(Encoder(whisper_encoder(dim=128, layers=3)), tensors)
    with pytest.raises(WhisperWeightsError, match=r"weight is \(128, 80, 3\).*\(64, 80, 3\)"):
        initialise_from_whisper(Encoder(whisper_encoder(dim=64, layers=2)), tensors)
    with pytest.raises(WhisperWeightsError, match=r"final_norm.weight.*no such parameter"):
        initialise_from_whisper(our_encoder(final_norm=False), tensors)


def test_int8_is_refused(whisper: Any, tmp_path: Path) -> None:
    folder = write_ctranslate2(whisper, tmp_path / "ct2", "int8")
    with pytest.raises(WhisperWeightsError, match=r"quantised to int8.* convert with float16"):
        load_whisper(folder)


def test_garbage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(range(256)) * 4)
    with pytest.raises(WhisperWeightsError, match="binary version 50462976, expected 6"):
        load_whisper(path)
    path.write_bytes(b"")
    with pytest.raises(WhisperWeightsError, match=r"ends early.* got 0 bytes, expected 4"):
        load_whisper(path)
    path.write_bytes(struct.pack("<IH", 6, 16) + b"TransformerSpec\0" + bytes(100))
    with pytest.raises(WhisperWeightsError, match="holds a TransformerSpec, expected a Whisper"):
        load_whisper(path)


@pytest.mark.parametrize("part", [0.001, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_model_is_refused(whisper: Any, tmp_path: Path, part: float) -> None:
    path = write_ctranslate2(whisper, tmp_path / "ct2", None) / "model.bin"
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(WhisperWeightsError, match=r"model.bin: ends early"):
        load_whisper(path)


def test_nothing_there_is_an_error_that_says_what_was_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    expected = r"neither a CTranslate2 model\.bin, nor a Hugging Face folder, nor a hub id"
    with pytest.raises(WhisperWeightsError, match=expected):
        load_whisper(tmp_path / "missing")
    with pytest.raises(WhisperWeightsError, match=expected):
        load_whisper(tmp_path)


def test_a_damaged_hugging_face_folder_is_refused(whisper: Any, tmp_path: Path) -> None:
    whisper.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(WhisperWeightsError, match="neither a CTranslate2"):
        load_whisper(tmp_path)


def test_missing_tensors_are_not_made_up(tmp_path: Path, whisper: Any) -> None:
    from safetensors.torch import load_file, save_file

    whisper.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if "encoder.layers.1.fc1.weight" in name)
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WhisperWeightsError, match=r"encoder\.layers\.1\.fc1\.weight is missing"):
        load_whisper(tmp_path)


def test_pickled_weights_are_not_opened(whisper: Any, tmp_path: Path) -> None:
    whisper.config.save_pretrained(tmp_path)
    torch.save(whisper.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(WhisperWeightsError, match="neither a CTranslate2"):
        load_whisper(tmp_path)


# The real thing


@pytest.mark.slow
@pytest.mark.skipif(
    "LOQUENT_WHISPER" not in os.environ,
    reason="set LOQUENT_WHISPER to a CTranslate2 folder of Whisper tiny",
)
def test_real_weights_on_speech() -> None:
    import ctranslate2

    folder = os.environ["LOQUENT_WHISPER"]
    sample = Path(loquent.engine.__file__).parent / "samples" / "morning.flac"
    pcm, rate = soundfile.read(sample, dtype="float32")
    assert rate == 16000
    spec = whisper_spec()
    frames = fbank(spec, pcm)[:3000]
    mel = np.tile(Fbank(spec).pad_frame, (3000, 1))
    mel[: len(frames)] = frames
    model = ctranslate2.models.Whisper(folder, device="cpu", compute_type="float32")
    storage = ctranslate2.StorageView.from_array(np.ascontiguousarray(mel.T[None]))
    expected = np.array(model.encode(storage))
    config = dataclasses.replace(whisper_encoder(dim=384, layers=4, left_context=1500), pool=1)
    encoder = Encoder(config).eval()
    initialise_from_whisper(encoder, load_whisper(folder))
    got = encode(encoder, torch.from_numpy(mel)[None]).numpy()
    # The file stores Whisper's positions in fp16, ours are computed: 0.020 at most and 0.0002 on
    # average, with outputs up to 12.6 (0.006 and 0.00003 once ours are rounded in the same way).
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-2)
    assert np.abs(got - expected).mean() < 5e-4


def test_positions_are_whispers(whisper: Any) -> None:
    """Ours are computed; Whisper's come with its weights."""
    table = whisper.model.encoder.embed_positions.weight
    encoder = our_encoder()
    angle = torch.arange(len(table))[:, None] * encoder.frontend.inverse_timescales
    ours = torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)
    torch.testing.assert_close(ours, table.detach(), atol=1e-5, rtol=0)


def test_weights_reach_every_parameter(hugging_face: Path) -> None:
    """Two encoders that start differently are the same afterwards."""
    tensors = load_whisper(hugging_face)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        encoder = Encoder(whisper_encoder(dim=128, layers=2))
        for module in encoder.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight)
        initialise_from_whisper(encoder, tensors)
        states.append(encoder.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
