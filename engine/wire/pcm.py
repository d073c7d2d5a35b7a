"""Raw audio as other protocols send it: encodings, channels, and the head of a wav file."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loquent.engine.protocol import Encoding, Pcm

Raw = Literal["s16le", "f32le", "mulaw", "alaw"]
MAX_CHANNELS = 16
# A wav file's first samples come within this many bytes, whatever lies before them.
MAX_HEAD = 1 << 16


def _mulaw() -> NDArray[np.int16]:
    # ITU-T G.711, table 2: all bits are sent inverted; 33 is the bias, 14 bits are made 16.
    code = ~np.arange(256) & 0xFF
    size = (((code & 15) << 3) + 0x84 << (code >> 4 & 7)) - 0x84
    return np.where(code & 0x80, -size, size).astype(np.int16)


def _alaw() -> NDArray[np.int16]:
    # ITU-T G.711, table 1: the even bits are sent inverted; 13 bits are made 16.
    code = np.arange(256) ^ 0x55
    step, level = (code & 15) << 4, code >> 4 & 7
    size = np.where(level == 0, step + 8, step + 0x108 << np.maximum(level - 1, 0))
    return np.where(code & 0x80, size, -size).astype(np.int16)


_TABLES: Mapping[Raw, NDArray[np.int16]] = {"mulaw": _mulaw(), "alaw": _alaw()}
_DTYPES: Mapping[Raw, np.dtype[Any]] = {
    "s16le": np.dtype("<i2"),
    "f32le": np.dtype("<f4"),
    "mulaw": np.dtype("u1"),
    "alaw": np.dtype("u1"),
}


class PcmReader:
    """Packets of any size in, mono samples out; a packet may end inside a sample.

    Args:
        raw: how samples are written.
        channels: interleaved; their mean is what is heard.
    """

    def __init__(self, raw: Raw, channels: int = 1) -> None:
        self._raw = raw
        self._channels = channels
        self._dtype = _DTYPES[raw]
        self._carry = b""

    @property
    def encoding(self) -> Encoding:
        """What comes out."""
        return "f32le" if self._raw == "f32le" or self._channels > 1 else "s16le"

    def accept(self, data: bytes) -> Pcm:
        """The next packet's samples, shape (N,), N may be 0."""
        data = self._carry + data if self._carry else data
        frame = self._dtype.itemsize * self._channels
        whole = len(data) - len(data) % frame
        self._carry = data[whole:]
        values = np.frombuffer(data, self._dtype, whole // self._dtype.itemsize)
        table = _TABLES.get(self._raw)
        samples: Pcm = (
            values.astype(self._dtype.newbyteorder("="), copy=False)
            if table is None
            else table[values]
        )
        if self._channels == 1:
            return samples
        scale = np.float32(1 if self._raw == "f32le" else 1 / 32768)
        mixed: Pcm = samples.reshape(-1, self._channels).mean(axis=1, dtype=np.float32) * scale
        return mixed


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WavHead:
    """How the samples of a wav file are written, and at which byte they begin."""

    raw: Raw
    sample_rate: int
    channels: int
    start: int


def read_wav_head(data: bytes) -> WavHead | None:
    """The head of a wav file that begins like `data`, None while too little of it is there.

    Raises ValueError: no wav file, or one with samples that are not supported.
    """
    if not b"RIFF".startswith(data[:4]) or not b"WAVE".startswith(data[8:12]):
        raise ValueError("no wav file")
    kind: tuple[Raw, int, int] | None = None
    at = 12
    while at + 8 <= len(data):
        name, size = data[at : at + 4], struct.unpack_from("<I", data, at + 4)[0]
        if name == b"data":
            if kind is None:
                raise ValueError("a wav file without a format")
            return WavHead(raw=kind[0], sample_rate=kind[1], channels=kind[2], start=at + 8)
        if name == b"fmt ":
            if len(data) < at + 8 + size:
                break
            kind = _wav_format(data[at + 8 : at + 8 + size])
        at += 8 + size + size % 2
    if len(data) > MAX_HEAD or at > MAX_HEAD:
        raise ValueError(f"a wav file without samples in its first {MAX_HEAD} bytes")
    return None


def _wav_format(data: bytes) -> tuple[Raw, int, int]:
    if len(data) < 16:
        raise ValueError("a wav file with a format that is cut short")
    code, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", data)
    if code == 0xFFFE and len(data) >= 26:  # extensible: the true code begins its sub-format
        code = struct.unpack_from("<H", data, 24)[0]
    raws: Mapping[tuple[int, int], Raw] = {
        (1, 16): "s16le",
        (3, 32): "f32le",
        (6, 8): "alaw",
        (7, 8): "mulaw",
    }
    raw = raws.get((code, bits))
    if raw is None:
        raise ValueError(
            f"a wav file of format {code} with {bits} bits, expected 16-bit or float32 samples, "
            "mu-law or A-law"
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(f"a wav file with {channels} channels, expected 1 to {MAX_CHANNELS}")
    return raw, rate, channels
