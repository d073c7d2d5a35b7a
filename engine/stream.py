"""One connection's audio on its way to the recogniser, and its captions on their way back.

    accept(pcm) -> resampler -> ring -> fbank -> chunker -> [Recognizer.step]
        -> transcript -> events()

A stream is passive: it does arithmetic on samples but never runs a network. Its events depend on
the audio alone, never on how it was cut into packets, as the recogniser sees it in whole windows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loquent.engine.bundle import Bundle, Decoder
from loquent.engine.chunker import Chunker, flush_frames
from loquent.engine.decode import Frame
from loquent.engine.decode.ctc import CtcGreedy
from loquent.engine.decode.ctc_beam import CtcBeam
from loquent.engine.decode.rnnt import RnntState
from loquent.engine.endpoint import EndpointRules
from loquent.engine.errors import AudioError, BufferFull, ConfigError, StreamClosed
from loquent.engine.events import Event
from loquent.engine.features import Fbank
from loquent.engine.resample import Resampler
from loquent.engine.ring import Ring
from loquent.engine.session import Slot
from loquent.engine.transcript import Transcript

Float32 = NDArray[np.float32]

MIN_RATE, MAX_RATE = 8000, 48000
# Seconds of audio in the buffer from which on `wants_audio` is False. Longer chunks need more.
_HIGH_SECONDS = 4.0
# Anything beyond this in floating point is int16 values that nobody divided by 32768.
_LOUDEST = 100.0


class Stream:
    """The state of one connection. Made by ``Recognizer.stream``; for one thread at a time.

    Attributes:
        sample_rate: Hz of the audio that ``accept`` takes.
        decoder: ``rnnt``, ``ctc`` or ``ctc-beam``.
        segment, right_context: of the encoder's windows, in feature frames.
        done: everything is recognised and the last event is out.
        encoder_state, ctc, rnnt, transcript: for the recogniser only.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        sample_rate: int,
        segment: int,
        right_context: int,
        decoder: Decoder,
        endpoint: EndpointRules | None,
        encoder_state: Slot,
        ctc: CtcGreedy | CtcBeam,
        rnnt: RnntState | None,
    ) -> None:
        if not MIN_RATE <= sample_rate <= MAX_RATE:
            raise ConfigError(
                f"got sample_rate {sample_rate!r}, expected {MIN_RATE} to {MAX_RATE} Hz; resample "
                "the audio first (AudioFile.blocks does it for files)"
            )
        encoder = bundle.encoder
        self.sample_rate = sample_rate
        self.decoder = decoder
        self.segment = segment
        self.right_context = right_context
        self.encoder_state = encoder_state
        self.ctc = ctc
        self.rnnt = rnnt
        self.transcript = Transcript(bundle.tokens, bundle.frame_seconds, endpoint)
        self.done = False
        self._model_rate = bundle.sample_rate
        self._hop = bundle.features.hop
        self._subsampling = encoder.subsampling
        self._resampler = Resampler(sample_rate, bundle.sample_rate)
        self._fbank = Fbank(bundle.features)
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
        return min(self._chunker.start * self._hop / self._model_rate, self.received)

    @property
    def wants_audio(self) -> bool:
        """False while enough audio waits: pause reading until the recogniser has caught up."""
        return self._ring.wants_audio and not self._closed

    @property
    def ready(self) -> bool:
        """Whether ``Recognizer.step`` has something to do for this stream."""
        return not self.done and (self._closed or self._ring.head >= self._needed)

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

    def events(self) -> list[Event]:
        """What happened since the last call, in order."""
        return self.transcript.events()

    # For the recogniser.

    def window(self) -> Float32 | None:
        """The next window (T, F) for the encoder, or None if the audio is over.

        Calling it again before ``advance`` gives the same window: a failed step loses nothing.
        """
        assert self.ready
        count = min(self._ring.fill, self._needed - self._ring.tail)
        if count > 0:
            self._chunker.accept(self._fbank.accept(self._ring.read(count)))
            self._ring.drop(count)
        if self._closed and not self._ring.fill and not self._chunker.complete:
            self._chunker.accept(self._fbank.finish())
            self._chunker.finish()
        if not self._chunker.ready:
            return None
        if self._chunker.padded:
            # From here on frames lie beyond the audio; what is said in them was said before.
            self.transcript.limit = self.received
        return self._chunker.window()

    def frames(self) -> range:
        """Encoder frames, counted from the start of the stream, that the window brings."""
        first = self._chunker.start // self._subsampling
        return range(first, first - (-self._chunker.valid // self._subsampling))

    def advance(self) -> None:
        """The window is done: say what is new and move on to the next one."""
        self.transcript.show()
        self._chunker.advance()
        self._needed = self._fbank.samples_for(self._chunker.needed)
        if self._chunker.exhausted:
            self.end()

    def end(self) -> None:
        """Everything is recognised."""
        if isinstance(self.ctc, CtcBeam):
            last = self._chunker.start // self._subsampling
            self.transcript.pending = ()
            self.transcript.accept([Frame(last, self.ctc.flush(), False)])
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
