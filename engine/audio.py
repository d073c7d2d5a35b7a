"""Audio files as blocks of mono float32, through libsndfile: wav, flac, ogg, opus, mp3 and more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from loquent.engine.errors import AudioError
from loquent.engine.resample import Resampler

Float32 = NDArray[np.float32]

# Of sound. Below and above, a header that lies would make hours out of bytes.
MIN_FILE_RATE, MAX_FILE_RATE = 2000, 768_000
_MAX_VALUES = 1 << 22  # samples of all channels in a block
_KINDS = "wav, flac, ogg, opus or mp3"


class AudioFile:
    """A readable audio file of any sample rate and any number of channels.

    Attributes:
        path: of the file.
        sample_rate: Hz, of the file.
        channels: of the file; ``blocks`` gives their mean.
        duration: seconds, as the file's header says.

    Raises:
        AudioError: there is no such file, or it holds no audio that can be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self._open() as file:
            self.sample_rate: int = file.samplerate
            self.channels: int = file.channels
            self.duration: float = file.frames / file.samplerate
        if not MIN_FILE_RATE <= self.sample_rate <= MAX_FILE_RATE:
            raise AudioError(
                f"{self.path}: got a sample rate of {self.sample_rate} Hz, expected "
                f"{MIN_FILE_RATE} to {MAX_FILE_RATE}"
            )

    def blocks(self, *, seconds: float = 1.0, sample_rate: int | None = None) -> Iterator[Float32]:
        """The samples in order, in arrays of shape (N,), N > 0, each about ``seconds`` long.

        Args:
            seconds: length of a block.
            sample_rate: resample to this many Hz; the file's own rate if None.

        Raises:
            AudioError: the file is damaged, holds no samples, or holds values that are no numbers.
        """
        resampler = Resampler(self.sample_rate, sample_rate or self.sample_rate)
        # Whatever rate and number of channels a header claims, a block fits into 16 MB.
        size = max(1, min(round(seconds * self.sample_rate), _MAX_VALUES // self.channels))
        position = 0
        with self._open() as file:
            while len(frames := file.read(size, dtype="float32", always_2d=True)):
                mono = np.ascontiguousarray(frames.mean(axis=1, dtype=np.float32))
                if not np.isfinite(mono).all():
                    bad = position + int(np.argmin(np.isfinite(mono)))
                    raise AudioError(
                        f"{self.path}: got NaN or infinity at {bad / self.sample_rate:.3f} s, "
                        "expected finite samples; write the file again without them"
                    )
                position += len(mono)
                if len(block := resampler.accept(mono)):
                    yield block
        if not position:
            raise AudioError(f"{self.path}: got no samples, expected some audio")
        if len(block := resampler.finish()):
            yield block

    @contextmanager
    def _open(self) -> Iterator[soundfile.SoundFile]:
        path = self.path
        if path.is_dir():
            raise AudioError(f"{path}: got a folder, expected an audio file ({_KINDS})")
        try:
            size = path.stat().st_size
        except OSError as exc:
            raise AudioError(f"{path}: {exc.strerror or exc}; check the path") from exc
        if not size:
            raise AudioError(f"{path}: the file is empty (0 bytes), expected audio ({_KINDS})")
        try:
            with soundfile.SoundFile(path) as file:
                yield file
        except soundfile.SoundFileError as exc:
            raise AudioError(
                f"{path}: cannot be read as audio ({_reason(exc)}); expected {_KINDS}; "
                "convert it, for example with `ffmpeg -i FILE out.wav`"
            ) from exc


def load_audio(path: str | os.PathLike[str], *, sample_rate: int = 16000) -> Float32:
    """A whole file as mono float32 of ``sample_rate`` Hz, shape (N,). Raises AudioError."""
    return np.concatenate(list(AudioFile(path).blocks(seconds=30.0, sample_rate=sample_rate)))


def _reason(exc: Exception) -> str:
    text = getattr(exc, "error_string", None) or str(exc)
    return str(text).rstrip(".")
