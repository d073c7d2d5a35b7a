"""Keeps what the server's clients send as wav files, for debugging; off unless asked for."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path

import soundfile

from loquent.engine.protocol import Pcm

logger = logging.getLogger(__name__)


class Recorder:
    """Keeps what one client sends. Used from threads; its failures never reach the session.

    The file is made when audio comes. A session that goes on in another server has a file there.
    """

    def __init__(self, folder: Path, session: str, sample_rate: int) -> None:
        self._folder = folder
        self._session = session
        self._rate = sample_rate
        self._file: soundfile.SoundFile | None = None
        self._failed = False

    def write(self, pcm: Pcm) -> None:
        """Append samples."""
        if self._failed:
            return
        try:
            if self._file is None:
                self._file = self._open(pcm)
            self._file.write(pcm)
        except (OSError, RuntimeError) as exc:
            logger.error("cannot record session %s any further: %s", self._session, exc)
            self._failed = True
            self.close()

    def _open(self, pcm: Pcm) -> soundfile.SoundFile:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S-%f}-{self._session}.wav"
        subtype = "PCM_16" if pcm.dtype.kind == "i" else "FLOAT"
        return soundfile.SoundFile(self._folder / name, "w", self._rate, 1, subtype=subtype)

    def close(self) -> None:
        """Finish the file. Idempotent."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()
