"""Reference times of words: when a transcript's words were said.

CTC says a token in a frame or two (see ``loquent.models.align``), which hardly tells where a word
ends. An HMM has states for every third of a phone, so its boundaries are those of the sounds: for
English the acoustic model and the dictionary of PocketSphinx are used. Other aligners' times (the
Montreal Forced Aligner's, say) can be read from a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from loquent.engine.audio import load_audio
from loquent.models.align import CtcModel, align
from loquent.models.data import DataError, Utterance

_RATE = 16000
_FRAME = 0.01
_PAD = 0.3  # seconds of near silence around a clip: it may begin and end in the middle of a sound
# Pruning thresholds, tried in turn: most clips need no wide beam, and a wide one may end too soon.
_BEAMS = (1e-64, 1e-100, 1e-150)
_VARIANT = re.compile(r"\(\d+\)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """A word of the transcript; seconds from the start of the clip."""

    text: str
    start: float
    end: float


def align_hmm(utterances: Sequence[Utterance]) -> list[tuple[Times, ...]]:
    """Times by PocketSphinx; empty for a clip with a word that its dictionary lacks, or no path.

    Raises:
        ImportError: PocketSphinx is not installed; it comes with the extra ``report``.
    """
    import pocketsphinx

    decoders = [
        pocketsphinx.Decoder(lm=None, loglevel="FATAL", beam=beam, pbeam=beam, wbeam=beam)
        for beam in _BEAMS
    ]
    found: list[tuple[Times, ...]] = []
    for utterance in tqdm(utterances, unit="clip", leave=False, disable=None, desc="alignment"):
        words = utterance.text.split()
        times: tuple[Times, ...] = ()
        if words and all(decoders[0].lookup_word(word) is not None for word in words):
            pcm = _padded(load_audio(utterance.audio, sample_rate=_RATE))
            for decoder in decoders:
                times = _path(decoder, pcm.tobytes(), utterance.text, len(pcm) / _RATE - 2 * _PAD)
                if [word.text for word in times] == words:
                    break
                times = ()
        found.append(times)
    return found


def align_ctc(model: CtcModel, utterances: Sequence[Utterance]) -> list[tuple[Times, ...]]:
    """Times by a model's CTC head: the frames in which its tokens are said."""
    return [
        tuple(
            Times(text=word.text, start=word.start, end=word.end)
            for word in align(
                model, load_audio(u.audio, sample_rate=model.sample_rate), u.text
            ).words
        )
        for u in tqdm(utterances, unit="clip", leave=False, disable=None, desc="alignment")
    ]


def read_times(path: Path, utterances: Sequence[Utterance]) -> list[tuple[Times, ...]]:
    """Times from JSON lines ``{"audio": file name, "words": [{"text", "start", "end"}, ...]}``.

    Clips that the file lacks, or whose words there are not those of the transcript, have none.

    Raises:
        DataError: the file cannot be read as such.
    """
    rows: dict[str, tuple[Times, ...]] = {}
    try:
        for line in path.read_text("utf-8").split("\n"):
            if line.strip():
                row = json.loads(line)
                rows[Path(row["audio"]).name] = tuple(
                    Times(text=w["text"], start=float(w["start"]), end=float(w["end"]))
                    for w in row["words"]
                )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: {type(error).__name__} {error}; expected JSON lines with audio and words"
        ) from error
    found = [rows.get(u.audio.name, ()) for u in utterances]
    return [
        times if [w.text for w in times] == u.text.split() else ()
        for u, times in zip(utterances, found, strict=True)
    ]


def write_times(
    path: Path, utterances: Sequence[Utterance], times: Sequence[Sequence[Times]]
) -> None:
    """The file that :func:`read_times` reads."""
    rows = [
        json.dumps({"audio": u.audio.name, "words": [asdict(word) for word in words]})
        for u, words in zip(utterances, times, strict=True)
        if words
    ]
    path.write_text("".join(row + "\n" for row in rows), "utf-8")


def _padded(pcm: NDArray[np.float32]) -> NDArray[np.int16]:
    # A little noise, the same for every run: digital silence has no features.
    silence = np.zeros(round(_PAD * _RATE))
    samples = 32767 * np.concatenate([silence, pcm, silence])
    noise = np.random.default_rng(0).integers(-4, 5, len(samples))
    return np.clip(samples + noise, -32768, 32767).astype(np.int16)


def _path(decoder: Any, data: bytes, text: str, duration: float) -> tuple[Times, ...]:
    try:
        decoder.set_align_text(text)
        decoder.start_utt()
        decoder.process_raw(data, full_utt=True)
        decoder.end_utt()
        segments = list(decoder.seg() or ())
    except RuntimeError:  # no path within the beam
        return ()
    return tuple(
        Times(
            text=_VARIANT.sub("", segment.word),
            start=_within(segment.start_frame, duration),
            end=_within(segment.end_frame + 1, duration),
        )
        for segment in segments
        if segment.word[0] not in "<[("
    )


def _within(frame: int, duration: float) -> float:
    return round(min(max(0.0, frame * _FRAME - _PAD), duration), 3)
