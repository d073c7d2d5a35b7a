"""One connection's audio on its way to the recogniser, and its captions on their way back.

    accept(pcm) -> resampler -> ring -> fbank -> chunker -> [Recognizer.step]
        -> transcript -> events()

A stream is passive: it does arithmetic on samples but never runs a network. Its events depend on
the audio alone, never on how it was cut into packets, as the recogniser sees it in whole windows.

``finalize`` leaves no trace in what is heard afterwards. Once the windows that are complete at its
sample are recognised, the stream goes down a branch: copies of features, chunker and decoder, and
the encoder's state, take the rest of the audio and the silence of the flush, as at the end of a
stream. Then the branch is dropped and the trunk goes on where it was; only tokens that the branch
has said already are not said again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loquent.engine.bundle import Bundle, DecoderName
from loquent.engine.calm import Calm
from loquent.engine.chunker import Chunker, flush_frames
from loquent.engine.decode import Frame
from loquent.engine.decode.decoder import Search
from loquent.engine.endpoint import Endpointer, EndpointRules
from loquent.engine.errors import AudioError, BufferFull, ConfigError, StreamClosed
from loquent.engine.events import Event
from loquent.engine.features import Fbank
from loquent.engine.finish import Finishing
from loquent.engine.hotwords import HotwordGraph, Hotwords
from loquent.engine.level import SILENCE
from loquent.engine.pool import Slot
from loquent.engine.resample import Resampler
from loquent.engine.ring import Ring
from loquent.engine.spelling import Speller
from loquent.engine.transcript import Transcript
from loquent.engine.vad import Voice

Float32 = NDArray[np.float32]

MIN_RATE, MAX_RATE = 8000, 48000
# Seconds of audio in the buffer from which on `wants_audio` is False. Longer chunks need more.
_HIGH_SECONDS = 4.0
# Anything beyond this in floating point is int16 values that nobody divided by 32768.
_LOUDEST = 100.0
# Calls of finalize that may wait before wants_audio is False.
_MOST_MARKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mark:
    """Where ``finalize`` was called: sample of the ring, seconds, and what the resampler held."""

    head: int
    position: float
    rest: Float32


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trunk:
    """What the stream goes on with after a branch."""

    fbank: Fbank
    chunker: Chunker
    encoder_state: Slot
    search: Search
    voice: Voice | None
    endpointer: Endpointer
    loudest: float


class Stream:
    """The state of one connection. Made by ``Recognizer.stream``; for one thread at a time.

    Attributes:
        sample_rate: Hz of the audio that ``accept`` takes.
        decoder: name of one of the bundle's.
        segment, right_context: of the encoder's windows, in feature frames.
        done: everything is recognised and the last event is out.
        encoder_state, search, voice, transcript: for the recogniser only.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        sample_rate: int,
        segment: int,
        right_context: int,
        decoder: DecoderName,
        endpoint: EndpointRules | None,
        encoder_state: Slot,
        search: Search,
        voice: Voice | None,
        hotwords: Callable[[Hotwords], HotwordGraph | None],
        finishing: Finishing | None,
        speller: Speller | None,
        hot: HotwordGraph | None,
    ) -> None:
        if not MIN_RATE <= sample_rate <= MAX_RATE:
            raise ConfigError(
                f"got sample_rate {sample_rate!r}, expected {MIN_RATE} to {MAX_RATE} Hz; resample "
                "the audio first (AudioFile.blocks does it for files)"
            )
        encoder = bundle.encoder
        self._fresh = encoder_state
        self._calm = Calm(bundle.features)
        self.sample_rate = sample_rate
        self.decoder = decoder
        self.segment = segment
        self.right_context = right_context
        self.encoder_state = encoder_state
        self.search = search
        self.voice = voice
        self._hotwords = hotwords
        self.transcript = Transcript(
            bundle.tokens,
            bundle.frame_seconds,
            endpoint,
            words=bundle.word_rules(decoder),
            voice=voice,
            finishing=finishing,
            speller=speller,
        )
        self.transcript.expect(hot)
        self.done = False
        self._model_rate = bundle.sample_rate
        self._hop = bundle.features.hop
        self._subsampling = encoder.subsampling
        self._resampler = Resampler(sample_rate, bundle.sample_rate)
        self._leveller = bundle.leveller
        self._loudest = SILENCE  # of late, dB
        features = self._leveller.features if self._leveller else bundle.features
        self._fbank = Fbank(features)
        self._chunker = Chunker(
            segment=segment,
            right=right_context + encoder.lookahead,
            flush=flush_frames(
                subsampling=encoder.subsampling,
                right_context=right_context,
                lookahead=encoder.lookahead,
            ),
            pad_frame=self._fbank.pad_frame,
        )
        window = self._fbank.samples_for(self._chunker.length)
        high = max(round(_HIGH_SECONDS * bundle.sample_rate), 2 * window)
        self._ring = Ring(high * 5 // 2, high=high, low=high // 2)
        self._needed = window
        self._received = 0
        self._closed = False
        self._marks: deque[_Mark] = deque()
        self._trunk: _Trunk | None = None
        self._position = 0.0  # seconds that are settled for good

    @property
    def latency_ms(self) -> float:
        """Audio that a chunk waits for, from its first sample on, in milliseconds.

        Segment, right context, look-ahead and the feature window; not the time to compute it.
        """
        return self._fbank.samples_for(self._chunker.length) * 1000 / self._model_rate

    @property
    def received(self) -> float:
        """Seconds of audio accepted."""
        return self._received / self.sample_rate

    @property
    def processed(self) -> float:
        """Seconds of audio recognised; equals ``received`` once the stream is done."""
        if self.done:
            return self.received
        most = self._marks[0].position if self._trunk else self.received
        return max(self._position, min(self._chunker.start * self._hop / self._model_rate, most))

    @property
    def fresh(self) -> bool:
        """Whether the encoder is as new: none of the audio so far matters to what follows."""
        return self.encoder_state is self._fresh

    @property
    def wants_audio(self) -> bool:
        """False while enough audio waits: pause reading until the recogniser has caught up."""
        return self._ring.wants_audio and not self._closed and len(self._marks) < _MOST_MARKS

    @property
    def ready(self) -> bool:
        """Whether ``Recognizer.step`` has something to do for this stream."""
        waits = self._closed or bool(self._marks)
        return not self.done and (waits or self._ring.head >= self._needed)

    @property
    def missing(self) -> float:
        """Seconds of audio until the next chunk is whole, but for what the resampler holds back."""
        return max(0, self._needed - self._ring.head) / self._model_rate

    def accept(self, pcm: NDArray[Any]) -> None:
        """Take audio, as much at a time as is convenient.

        Args:
            pcm: (N,) mono, floating point in [-1, 1] or int16, of ``sample_rate`` Hz.

        Raises:
            AudioError: not one-dimensional, of another type, not finite, or far out of range.
            StreamClosed: after ``finish``.
            BufferFull: more than fits; see ``wants_audio``. In every case nothing was consumed.
        """
        if self._closed:
            raise StreamClosed("got audio after finish(); make a new stream for more audio")
        samples = as_float32(pcm)
        if (most := self._resampler.most(len(samples))) > self._ring.free:
            raise BufferFull(
                f"got {len(samples) / self.sample_rate:.2f} s of audio, up to {most} samples at "
                f"{self._model_rate} Hz, expected no more than {self._ring.free}; call "
                "Recognizer.step until wants_audio is true, and accept a second or so at a time"
            )
        self._ring.push(self._resampler.accept(samples))
        self._received += len(samples)

    def finish(self) -> None:
        """No audio follows. Calling it again does nothing."""
        if not self._closed:
            self._ring.push(self._resampler.finish())
            self._closed = True

    def finalize(self) -> None:
        """Recognise all audio accepted so far as if it ended here, and go on taking audio.

        Its text is the one that ``finish`` would give: a ``Final`` of reason ``finalize`` if there
        is any that was not final yet, and then, always and once for each call, ``Finalized``. What
        is said afterwards is what the stream would have said without.

        Raises:
            StreamClosed: after ``finish``, which settles everything itself.
        """
        if self._closed:
            raise StreamClosed("got finalize() after finish(), which settles everything itself")
        self._marks.append(
            _Mark(head=self._ring.head, position=self.received, rest=self._resampler.rest())
        )

    def set_hotwords(self, hotwords: Hotwords) -> None:
        """Lean towards these phrases instead, from the next chunk on; none for no leaning.

        Raises:
            ConfigError: too many, or one that the model cannot spell. Nothing was changed.
        """
        graph = self._hotwords(hotwords)
        self.search = self.search.biased(graph)
        self.transcript.expect(graph)
        if self._trunk:
            self._trunk = replace(self._trunk, search=self._trunk.search.biased(graph))

    def set_endpoint(self, rules: EndpointRules | None) -> None:
        """End segments by these rules from the next chunk on; None for one, however long.

        The silence so far counts.
        """
        self.transcript.set_endpoint(rules)
        if self._trunk:
            frame_seconds = self._hop * self._subsampling / self._model_rate
            ruled = self._trunk.endpointer.ruled(rules, frame_seconds)
            self._trunk = replace(self._trunk, endpointer=ruled)

    def events(self) -> list[Event]:
        """What happened since the last call, in order."""
        return self.transcript.events()

    # For the recogniser.

    def window(self) -> Float32 | None:
        """The next window (T, F) for the encoder, or None if the audio is over.

        Calling it again before ``advance`` gives the same window: a failed step loses nothing.
        """
        assert self.ready
        if self._trunk is None and self._marks and self._needed > self._marks[0].head:
            self._branch(self._marks[0])
        if self._trunk is None:
            self._fill()
        if not self._chunker.ready:
            return None
        if self._chunker.padded:
            # From here on frames lie beyond the audio; what is said in them was said before.
            self.transcript.limit = self._marks[0].position if self._trunk else self.received
        return self._chunker.window()

    def _fill(self) -> None:
        count = min(self._ring.fill, self._needed - self._ring.tail)
        if count > 0:
            samples = self._ring.read(count)
            self._chunker.accept(self._fbank.accept(samples))
            if self.voice:
                self.voice.accept(samples)
            self._ring.drop(count)
        if self._closed and not self._ring.fill and not self._chunker.complete:
            self._end_of_audio()

    def _end_of_audio(self) -> None:
        self._chunker.accept(self._fbank.finish())
        self._chunker.finish()
        if self.voice:
            self.voice.finish()

    def _branch(self, mark: _Mark) -> None:
        """Leave the trunk for the flush of ``mark``."""
        self._trunk = _Trunk(
            fbank=self._fbank,
            chunker=self._chunker,
            encoder_state=self.encoder_state,
            search=self.search,
            voice=self.voice,
            endpointer=self.transcript.endpointer(),
            loudest=self._loudest,
        )
        self._fbank, self._chunker = copy(self._fbank), copy(self._chunker)
        self.encoder_state = self.encoder_state.fork()
        self.voice = self.voice and self.voice.fork()
        self.transcript.branch(self.voice)
        samples = np.concatenate([self._ring.read(mark.head - self._ring.tail), mark.rest])
        self._chunker.accept(self._fbank.accept(samples))
        if self.voice:
            self.voice.accept(samples)
        self._end_of_audio()

    def _rejoin(self, trunk: _Trunk, mark: _Mark) -> None:
        """The flush of ``mark`` is recognised: go on with the trunk."""
        frame = (mark.head + len(mark.rest)) // (self._hop * self._subsampling)
        self.transcript.finalize(mark.position, frame, trunk.endpointer)
        self._fbank, self._chunker = trunk.fbank, trunk.chunker
        self.encoder_state, self.search = trunk.encoder_state, trunk.search
        self.voice, self._loudest = trunk.voice, trunk.loudest
        self._needed = self._fbank.samples_for(self._chunker.needed)
        self._position = mark.position
        self._marks.popleft()
        self._trunk = None

    def frames(self) -> range:
        """Encoder frames, counted from the start of the stream, that the window brings."""
        first = self._chunker.start // self._subsampling
        return range(first, first - (-self._chunker.valid // self._subsampling))

    def loudest(self, levels: Float32) -> float:
        """How loud it was of late, dB, this window included.

        Args:
            levels: how loud the window is.
        """
        if self._leveller is None:
            return SILENCE
        return self._leveller.heard(self._loudest, levels, self.segment)

    def advance(self, levels: Float32) -> None:
        """The window is done: say what is new and move on to the next one.

        Args:
            levels: how loud the window was.
        """
        self.transcript.show()
        self._loudest = self.loudest(levels)
        # On a branch the state is dropped anyway, and the trunk will hear the same frames.
        right = self._chunker.length - self.segment
        calm = self._trunk is None and self._calm.accept(levels, self.segment, right)
        if self.transcript.forget_encoder(calm=calm):
            self.encoder_state = self._fresh
        self._chunker.advance()
        self._needed = self._fbank.samples_for(self._chunker.needed)
        if self._chunker.exhausted:
            self.end()

    def end(self) -> None:
        """Everything up to the end, or up to where ``finalize`` was called, is recognised."""
        if tokens := self.search.flush():
            last = self._chunker.start // self._subsampling
            self.transcript.accept([Frame(last, tokens, False)])
        self.transcript.pending = ()
        if self._trunk is not None:
            self._rejoin(self._trunk, self._marks[0])
            return
        self.transcript.end(self.received)
        self.done = True


def as_float32(pcm: NDArray[Any]) -> Float32:
    """Check mono audio and make it float32 in [-1, 1], shape (N,). Raises AudioError."""
    if not isinstance(pcm, np.ndarray) or pcm.ndim != 1:
        shape = f"an array of shape {pcm.shape}" if isinstance(pcm, np.ndarray) else type(pcm)
        raise AudioError(f"got {shape}, expected a mono numpy array of shape (N,)")
    if pcm.dtype == np.int16:
        return pcm.astype(np.float32) / np.float32(32768)
    if not np.issubdtype(pcm.dtype, np.floating):
        raise AudioError(f"got samples of type {pcm.dtype}, expected float32 or int16")
    with np.errstate(over="ignore"):  # too large for float32 is infinite, which is refused below
        samples = pcm.astype(np.float32, copy=False)
    if len(samples):
        peak = max(float(samples.max()), -float(samples.min()))
        if not np.isfinite(peak):
            raise AudioError(
                "got samples that are not finite (NaN or infinity), expected numbers in [-1, 1]"
            )
        if peak > _LOUDEST:
            raise AudioError(
                f"got floating-point samples up to {peak:g}, expected [-1, 1]; divide by 32768 or "
                "pass int16"
            )
    return samples
