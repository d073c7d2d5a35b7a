"""Encodings against libsndfile, packets that end anywhere, and heads of wav files."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from loquent.engine.wire.pcm import MAX_HEAD, PcmReader, Raw, WavHead, read_wav_head

SUBTYPES: dict[Raw, str] = {"s16le": "PCM_16", "f32le": "FLOAT", "mulaw": "ULAW", "alaw": "ALAW"}
ALL_BYTES = bytes(range(256))


def as_int16(data: bytes, subtype: str) -> Any:
    """What libsndfile reads."""
    return soundfile.read(
        io.BytesIO(data), format="RAW", subtype=subtype, channels=1, samplerate=8000, dtype="int16"
    )[0]


@pytest.mark.parametrize("raw", ["mulaw", "alaw"])
def test_companded_samples_are_those_of_g711(raw: Raw) -> None:
    heard = PcmReader(raw).accept(ALL_BYTES)
    assert heard.dtype == np.int16
    assert heard.tolist() == as_int16(ALL_BYTES, SUBTYPES[raw]).tolist()


@pytest.mark.parametrize("raw", SUBTYPES)
@pytest.mark.parametrize("channels", [1, 2, 3])
@settings(max_examples=20)
@given(data=st.data())
def test_packets_may_end_inside_a_sample(raw: Raw, channels: int, data: st.DataObject) -> None:
    width = {"s16le": 2, "f32le": 4, "mulaw": 1, "alaw": 1}[raw] * channels
    values = np.arange(24 * channels) / 100
    sent = {"s16le": (values * 100).astype("<i2"), "f32le": values.astype("<f4")}.get(
        raw, np.arange(24 * channels, dtype=np.uint8)
    )
    whole = sent.tobytes()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    reader = PcmReader(raw, channels)
    parts = [
        reader.accept(whole[a:b]) for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)
    ]
    heard = np.concatenate(parts)
    assert len(heard) == len(whole) // width
    assert heard.tolist() == PcmReader(raw, channels).accept(whole).tolist()
    assert heard.dtype == (np.int16 if reader.encoding == "s16le" else np.float32)


def test_channels_are_mixed_to_their_mean() -> None:
    stereo = np.array([[1000, 3000], [-32768, -32768]], "<i2")
    assert PcmReader("s16le", 2).accept(stereo.tobytes()).tolist() == [2000 / 32768, -1.0]


@pytest.mark.parametrize("raw", SUBTYPES)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX"])
def test_wav_heads(raw: Raw, channels: int, kind: str) -> None:
    buffer = io.BytesIO()
    pcm = np.zeros((50, channels), np.float32) + 0.25
    soundfile.write(buffer, pcm, 22050, subtype=SUBTYPES[raw], format=kind)
    data = buffer.getvalue()
    head = None
    for size in range(len(data)):  # it may come byte by byte
        head = read_wav_head(data[:size])
        if head is not None:
            break
    assert head == WavHead(raw=raw, sample_rate=22050, channels=channels, start=size)
    heard = PcmReader(raw, channels).accept(data[size:])
    scale = 32768 if heard.dtype == np.int16 else 1
    assert np.allclose(heard[:50] / scale, 0.25, atol=0.01)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"OggS" + bytes(60), "no wav file"),
        (b"\x1aE\xdf\xa3", "no wav file"),
        (b"RIFF\0\0\0\0AVI ", "no wav file"),
        (b"RIFF\0\0\0\0WAVEdata\0\0\0\0", "without a format"),
        (b"RIFF\0\0\0\0WAVEfmt \x04\0\0\0abcd", "cut short"),
        (b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + bytes(16), "format 0 with 0 bits"),
        (
            b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x01\0\x40\0\x80\x3e\0\0\0\0\0\0\0\0\x10\0",
            "64 channels",
        ),
        (b"RIFF\0\0\0\0WAVELIST\xff\xff\xff\xff", "without samples in its first"),
        (b"RIFF\0\0\0\0WAVELIST\xf0\xff\0\0" + bytes(MAX_HEAD), "without samples in its first"),
    ],
)
def test_what_is_no_wav_file_is_told(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_wav_head(data)


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_head_or_a_reason(data: bytes) -> None:
    for start in (b"", b"RIFF\0\0\0\0WAVE", b"RIFF\0\0\0\0WAVEfmt "):
        with contextlib.suppress(ValueError):
            head = read_wav_head(start + data)
            assert head is None or 0 < head.start <= len(start + data)
