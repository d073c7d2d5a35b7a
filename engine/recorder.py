"""Keeps what the server's clients send as wav files, for debugging; off unless asked for."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path

import soundfile

from loquent.engine.protocol import Pcm, Start

logger = logging.getLogger(__name__)


class Recorder:
    """Keeps what one client sends. Used from threads; its failures never reach the session."""

    def __init__(self, folder: Path, session: str, start: Start) -> None:
        now = datetime.datetime.now(datetime.UTC)
        path = folder / f"{now:%Y%m%d-%H%M%S}-{session}.wav"
        subtype = "PCM_16" if start.encoding == "s16le" else "FLOAT"
        self._file: soundfile.SoundFile | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = soundfile.SoundFile(path, "w", start.sample_rate, 1, subtype=subtype)
        except (OSError, RuntimeError) as exc:
            logger.error("cannot record to %s: %s", path, exc)

    def write(self, pcm: Pcm) -> None:
        """Append samples."""
        if self._file is None:
            return
        try:
            self._file.write(pcm)
        except (OSError, RuntimeError) as exc:
            logger.error("the recording %s stops: %s", self._file.name, exc)
            self.close()

    def close(self) -> None:
        """Finish the file. Idempotent."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()
