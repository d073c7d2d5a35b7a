"""Forced alignment of transcripts with a model's CTC output.

The path is the best one (Viterbi) through the CTC lattice of the transcript, by
``torchaudio.functional.forced_align``. CTC says a token in few frames, some time after its sound
began, so a word's times are those at which the model could know it, good to a tenth of a second or
so; a model that sees the whole recording is less late than a streaming one.

Shape suffixes: N output frames, V vocabulary, U tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torchaudio.functional import forced_align

from loquent.engine.bundle import Bundle
from loquent.engine.calm import Loudness
from loquent.engine.chunker import Chunker, flush_frames
from loquent.engine.encoder import OnnxEncoder
from loquent.engine.features import Fbank, FeatureSpec, fbank, whisper_spec
from loquent.engine.level import SILENCE
from loquent.models.checkpoint import load_checkpoint
from loquent.models.tokens import Tokenizer

Float32 = NDArray[np.float32]


class AlignmentError(ValueError):
    """The transcript cannot be aligned; the message says why."""


class CtcModel(Protocol):
    """A model with a CTC head, as alignment sees it.

    Attributes:
        sample_rate: Hz of the audio that it takes.
        frame_seconds: from one output frame to the next.
        blank: id of the blank.
    """

    sample_rate: int
    frame_seconds: float
    blank: int

    def log_probs(self, pcm: Float32) -> Float32:
        """(samples,) in [-1, 1] -> (N, V) natural logarithms."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a normalised transcript."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSpan:
    """A token of the transcript on the best path.

    Attributes:
        id: of the token.
        start, end: frames in which the path says it, ``end`` exclusive.
        logp: mean natural logarithm of its probability in these frames.
    """

    id: int
    start: int
    end: int
    logp: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedWord:
    """A word of the transcript: seconds from the start of the audio, and the mean of its tokens'
    ``logp``."""

    text: str
    start: float
    end: float
    logp: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """A transcript in time.

    Attributes:
        words: in order.
        score: natural logarithm of the whole path's probability, divided by the number of tokens:
            near 0 when the audio says what the text says and nothing else. NaN without tokens.
        logp: mean over the tokens of the natural logarithm of their probability where the path
            says them: near 0 when the audio says what the text says. NaN without tokens.
        blank_logp: mean over the frames between tokens of that of the blank: low where something
            is said that the text does not have. NaN without such frames.
    """

    words: tuple[AlignedWord, ...]
    score: float
    logp: float
    blank_logp: float


def align_tokens(log_probs_NV: Float32, tokens: Sequence[int], blank: int) -> list[TokenSpan]:
    """The best path of ``tokens`` through (N, V) log-probabilities.

    Raises:
        AlignmentError: there are more tokens than frames to say them in.
    """
    repeats = sum(a == b for a, b in itertools.pairwise(tokens))
    if len(tokens) + repeats > len(log_probs_NV):
        raise AlignmentError(
            f"got {len(log_probs_NV)} frames for {len(tokens)} tokens, expected at least "
            f"{len(tokens) + repeats}; the text is longer than what the audio can hold"
        )
    if not tokens:
        return []
    path, scores = forced_align(
        torch.from_numpy(np.ascontiguousarray(log_probs_NV))[None],
        torch.tensor([list(tokens)], dtype=torch.int32),
        blank=blank,
    )
    spans: list[TokenSpan] = []
    labels, logps = path[0].tolist(), scores[0].tolist()
    start = 0
    for frame in range(1, len(labels) + 1):
        if frame < len(labels) and labels[frame] == labels[start]:
            continue
        if labels[start] != blank:
            logp = sum(logps[start:frame]) / (frame - start)
            spans.append(TokenSpan(id=labels[start], start=start, end=frame, logp=logp))
        start = frame
    return spans


def align(model: CtcModel, pcm: Float32, text: str) -> Alignment:
    """Where each word of a normalised transcript is said.

    Args:
        model: whose CTC output decides.
        pcm: (samples,) float32 in [-1, 1] of ``model.sample_rate``.
        text: normalised transcript (``loquent.models.text.normalise``).

    Raises:
        AlignmentError: the audio is too short for the text.
    """
    return align_log_probs(model, model.log_probs(pcm), text)


def align_log_probs(model: CtcModel, log_probs: Float32, text: str) -> Alignment:
    """:func:`align` with (N, V) log-probabilities that ``model`` gave."""
    per_word = [(word, model.encode(word)) for word in text.split()]
    spans = align_tokens(log_probs, [i for _, ids in per_word for i in ids], model.blank)
    words: list[AlignedWord] = []
    at = 0
    for word, ids in per_word:
        own = spans[at : at + len(ids)]
        at += len(ids)
        if own:
            words.append(
                AlignedWord(
                    text=word,
                    start=round(own[0].start * model.frame_seconds, 3),
                    end=round(own[-1].end * model.frame_seconds, 3),
                    logp=sum(s.logp for s in own) / len(own),
                )
            )
    silent = np.ones(len(log_probs), bool)
    for span in spans:
        silent[span.start : span.end] = False
    blank = log_probs[silent, model.blank]
    path = float(blank.sum()) + sum(s.logp * (s.end - s.start) for s in spans)
    return Alignment(
        words=tuple(words),
        score=path / len(spans) if spans else float("nan"),
        logp=sum(s.logp for s in spans) / len(spans) if spans else float("nan"),
        blank_logp=float(blank.mean()) if len(blank) else float("nan"),
    )


class BundleCtc:
    """The CTC head of a bundle, through ONNX Runtime, in its longest chunks.

    Raises:
        AlignmentError: the bundle has no CTC head or no subword model.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 1) -> None:
        if not bundle.has_ctc:
            raise AlignmentError(f"{bundle.files.where}: no CTC head; choose a bundle that has one")
        tokens = bundle.manifest["tokens"]
        if "spm" not in tokens:
            raise AlignmentError(
                f"{bundle.files.where}: no subword model (tokens.spm), which turns text to tokens"
            )
        self._tokenizer = Tokenizer(bundle.files.read(tokens["spm"]))
        self._encoder = OnnxEncoder(bundle, threads=threads)
        self._bundle = bundle
        self.sample_rate = bundle.sample_rate
        self.frame_seconds = bundle.frame_seconds
        self.blank = bundle.blank

    def log_probs(self, pcm: Float32) -> Float32:
        """See :class:`CtcModel`."""
        spec = self._bundle.encoder
        segment, right = max(spec.segments), max(spec.right_contexts)
        leveller, loudness, peak = self._bundle.leveller, Loudness(self._bundle.features), SILENCE
        features = leveller.features if leveller else self._bundle.features
        chunker = Chunker(
            segment=segment,
            right=right + spec.lookahead,
            flush=flush_frames(
                subsampling=spec.subsampling, right_context=right, lookahead=spec.lookahead
            ),
            pad_frame=Fbank(features).pad_frame,
        )
        chunker.accept(fbank(features, pcm))
        chunker.finish()
        state = self._encoder.initial
        out = [np.zeros((0, len(self._bundle.tokens)), np.float32)]
        while chunker.ready:
            window = chunker.window()[None]
            if leveller:
                peak = leveller.heard(peak, loudness(window), segment)
                window = leveller.raised(window, [peak])
            heads, state = self._encoder.step(window, right, state, ["ctc"])
            out.append(heads["ctc"][0, : -(-chunker.valid // spec.subsampling)])
            chunker.advance()
        return np.concatenate(out)

    def encode(self, text: str) -> list[int]:
        """See :class:`CtcModel`."""
        return self._tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        """See :class:`CtcModel`."""
        return self._tokenizer.decode(ids)


class StudentCtc:
    """The CTC head of a checkpoint, in one masked pass over the recording.

    Args:
        folder: of the checkpoint.
        segment, right_context: feature frames of the chunks that the mask makes.
    """

    def __init__(self, folder: Path, *, segment: int = 128, right_context: int = 8) -> None:
        checkpoint = load_checkpoint(folder)
        self._student, self._tokenizer = checkpoint.student, checkpoint.tokenizer
        if self._student.ctc is None:
            raise AlignmentError(f"{folder}: no CTC head; choose a checkpoint that has one")
        self._spec: FeatureSpec = whisper_spec()
        if checkpoint.state.get("features") != self._spec.to_dict():
            raise AlignmentError(f"{folder}: not trained on Whisper's features, the only kind here")
        self._segment, self._right = segment, right_context
        self.sample_rate = self._spec.sample_rate
        subsampling = self._student.config.encoder.subsampling
        self.frame_seconds = subsampling * self._spec.hop / self._spec.sample_rate
        self.blank = self._student.config.blank

    @torch.no_grad()
    def log_probs(self, pcm: Float32) -> Float32:
        """See :class:`CtcModel`."""
        encoder = self._student.config.encoder
        x = fbank(self._spec, pcm)
        whole = -(-len(x) // encoder.subsampling) * encoder.subsampling
        padding = whole + self._right + encoder.lookahead - len(x)
        x = np.concatenate([x, np.tile(Fbank(self._spec).pad_frame, (padding, 1))])
        encoded, frames = self._student(
            torch.from_numpy(x)[None], torch.tensor([whole]), self._segment, self._right
        )
        out: Float32 = self._student.ctc_log_probs(encoded)[0, : int(frames[0])].numpy()
        return out

    def encode(self, text: str) -> list[int]:
        """See :class:`CtcModel`."""
        return self._tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        """See :class:`CtcModel`."""
        return self._tokenizer.decode(ids)


def load_ctc(source: str, *, threads: int = 1) -> CtcModel:
    """A bundle (name, folder or tar) or a checkpoint folder, by what is there.

    Raises:
        AlignmentError: it has no CTC head.
        BundleError, CheckpointError: it cannot be read.
    """
    if (Path(source) / "config.json").is_file():
        return StudentCtc(Path(source))
    return BundleCtc(Bundle.load(source), threads=threads)
