"""The shared, immutable half of recognition: the models, and the step that runs them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loquent.engine import snapshot
from loquent.engine.bundle import HEADS, Bundle, DecoderName
from loquent.engine.calm import Loudness
from loquent.engine.decode import Frame
from loquent.engine.decode.beam import BeamState
from loquent.engine.decode.decoder import Job, Search, Settings
from loquent.engine.decoders import Decoders
from loquent.engine.encoder import OnnxEncoder
from loquent.engine.endpoint import EndpointRules
from loquent.engine.errors import ConfigError
from loquent.engine.events import Final
from loquent.engine.finish import Finishing, finisher
from loquent.engine.hotwords import Hotword, HotwordCache, HotwordGraph, Hotwords, Vocabulary
from loquent.engine.pool import Pool
from loquent.engine.session import Device
from loquent.engine.stream import Stream, as_float32
from loquent.engine.vad import SAMPLE_RATE as VAD_RATE
from loquent.engine.vad import SileroVad, Voice

Float32 = NDArray[np.float32]

DEFAULT_CHUNK_MS = 320.0
DEFAULT_ENDPOINT = EndpointRules()


class Recognizer:
    """A loaded bundle. Streams share it; ``step`` is to be called by one thread at a time.

    Args:
        bundle: the checked manifest.
        threads: of ONNX Runtime within one call; see ``session.Graph``.
        device: ``cpu`` or ``cuda``, which needs the extra ``[gpu]``.

    Raises:
        BundleError: a graph does not fit the manifest.
        ConfigError: the device cannot be used.
        MissingExtra: ONNX Runtime is not installed.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 1, device: Device = "cpu") -> None:
        if threads < 1:
            raise ConfigError(f"got threads {threads}, expected 1 or more")
        self.bundle = bundle
        self._encoder = OnnxEncoder(bundle, threads=threads, device=device)
        self._loudness = Loudness(bundle.features)
        self._threads = threads
        self._decoders = Decoders(bundle, threads=threads, device=device)
        self._vocabulary = Vocabulary(bundle.tokens, bundle.blank)
        self._graphs = HotwordCache(bundle.tokens, bundle.blank)

    @cached_property
    def _vad(self) -> SileroVad:
        return SileroVad(threads=self._threads)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] = "en",
        *,
        threads: int = 1,
        device: Device = "cpu",
    ) -> Recognizer:
        """Load a bundle: a folder, a tar file, or the name of one that came with Loquent.

        Raises:
            BundleError: it is missing, damaged or made for another engine.
            MissingExtra: ONNX Runtime is not installed.
        """
        return cls(Bundle.load(source), threads=threads, device=device)

    def stream(
        self,
        *,
        sample_rate: int = 16000,
        chunk_ms: float = DEFAULT_CHUNK_MS,
        decoder: str | None = None,
        right_context_ms: float | None = None,
        endpoint: EndpointRules | None = DEFAULT_ENDPOINT,
        blank_penalty: float | None = None,
        lm_weight: float | None = None,
        hotwords: Hotwords = (),
        vad: str | None = None,
        finish: bool = False,
        stability: float = 0.0,
    ) -> Stream:
        """A new stream.

        Args:
            sample_rate: Hz of the audio to come, 8000 to 48000.
            chunk_ms: audio per step, one of ``bundle.chunks_ms``: shorter is faster, longer better.
            decoder: one of ``bundle.decoders``, the bundle's default if None: ``joint``,
                ``rnnt-beam`` and ``ctc-beam`` search with the bundle's language model, ``rnnt`` and
                ``ctc`` are greedy.
            right_context_ms: one of ``bundle.right_contexts_ms``, the bundle's default if None.
            endpoint: when segments end, None for one segment however long.
            vad: ``silero`` for a voice activity detector: what it hears as speech is no silence to
                the endpoint rules, whatever the decoder makes of it.
            blank_penalty: above 0 brings more words, below 0 fewer; the bundle's if None.
            lm_weight: of the language model in a beam search, 0 for none; the bundle's if None.
            hotwords: phrases to expect; ``Stream.set_hotwords`` changes them.
            stability: seconds behind the latest audio from which on a beam search commits a word:
                the less, the sooner text is settled, and the less can be put right later. 0 leaves
                it at two seconds. Greedy decoders commit every word as the next one begins.
            finish: write the finals' text with casing, punctuation and digits; words stay as
                they are.

        Raises:
            ConfigError: a value that the bundle does not allow.
            MissingExtra: the detector is not installed.
        """
        bundle = self.bundle
        decoder = bundle.default_decoder if decoder is None else decoder
        if decoder not in bundle.decoders:
            raise ConfigError(
                f"got decoder {decoder!r}, expected one of {', '.join(bundle.decoders)} for this "
                "model"
            )
        if vad not in (None, "silero"):
            raise ConfigError(f"got vad {vad!r}, expected silero or none")
        if vad and bundle.sample_rate != VAD_RATE:
            raise ConfigError(
                f"got vad {vad!r}, which hears {VAD_RATE} Hz, and a model of {bundle.sample_rate} "
                "Hz; leave it out"
            )
        if vad:
            _ = self._vad  # an error now, not in the first step
        finishing = Finishing(finisher(next(iter(bundle.languages)))) if finish else None
        hop = bundle.features.hop * bundle.encoder.subsampling
        if not 0 <= stability < math.inf:
            raise ConfigError(f"got stability {stability!r}, expected seconds, 0 or above")
        graph = self.hotwords(hotwords)
        settings = Settings(
            blank_penalty=blank_penalty,
            lm_weight=lm_weight,
            hotwords=graph,
            horizon=max(1, round(stability / bundle.frame_seconds)) if stability else None,
        )
        search = self._decoders[decoder].start(settings)
        listens = isinstance(search, BeamState) and search.fusion.active
        return Stream(
            bundle,
            sample_rate=sample_rate,
            segment=bundle.segment_for(chunk_ms),
            right_context=bundle.right_context_for(right_context_ms),
            decoder=decoder,
            endpoint=endpoint,
            encoder_state=self._encoder.pool.fresh,
            search=search,
            voice=Voice(hop) if vad else None,
            hotwords=self.hotwords,
            finishing=finishing,
            speller=self._decoders.speller if listens else None,
            hot=graph,
        )

    def hotwords(self, hotwords: Hotwords) -> HotwordGraph | None:
        """What a stream makes of its hotwords; the last lists are kept. For any thread.

        A long list takes some tenths of a second, and waits for one that is being built.

        Raises:
            ConfigError: too many, or one that the model cannot spell.
        """
        if isinstance(hotwords, HotwordGraph):
            return hotwords
        return self._graphs.get(tuple(hotwords)) if hotwords else None

    def kept_hotwords(self, hotwords: Sequence[Hotword]) -> HotwordGraph | None:
        """What `hotwords` gives, if it takes no building. For any thread."""
        return self._graphs.find(tuple(hotwords))

    @property
    def pool(self) -> Pool:
        """Where the encoder's states of its streams are."""
        return self._encoder.pool

    def can_spell(self, phrase: str) -> bool:
        """Whether the model can spell a phrase, so that it may be a hotword. For any thread."""
        return self._vocabulary.can_spell(phrase)

    def snapshot(self, stream: Stream) -> bytes:
        """A stream as bytes, between two steps: see `loquent.engine.snapshot`.

        Raises:
            SnapshotError: it has a part that snapshots do not know.
        """
        return snapshot.take(stream, self)

    def restore(self, data: bytes) -> Stream:
        """The stream that ``snapshot`` wrote, here or in another process with the same bundle.

        It says what the other would have said: at the model's sample rate exactly, at another one
        with samples that differ in float32's last bits.

        Raises:
            SnapshotError: damaged, or made with another bundle or release.
        """
        return snapshot.give(data, self)

    def step(self, streams: Iterable[Stream]) -> None:
        """Advance every stream that is ready by one chunk; their events then wait in them.

        Streams of the same chunk size and right context go through the network together, whatever
        their age, length and decoder. The result for each is the same as alone.
        """
        groups: dict[tuple[int, int], list[tuple[Stream, Float32]]] = {}
        for stream in dict.fromkeys(streams):
            if not stream.ready:
                continue
            window = stream.window()
            if window is None:
                stream.end()
            else:
                key = (stream.segment, stream.right_context)
                groups.setdefault(key, []).append((stream, window))
        voices = [s.voice for group in groups.values() for s, _ in group if s.voice is not None]
        if voices:
            self._vad.run(voices)
        for (_, right_context), members in groups.items():
            self._advance([m[0] for m in members], [m[1] for m in members], right_context)

    def encode(self, stream: Stream) -> dict[str, Float32]:
        """Advance one stream that is ready by a chunk without decoding: for tuning decoders.

        Returns:
            Its new frames (K, ...) by head; nothing at the end of the stream.
        """
        window = stream.window()
        if window is None:
            stream.end()
            return {}
        heads = self._encoder.heads
        heard, levels = self._hear([stream], window[None])
        frames, advance = self._encoder.advance(
            heard, stream.right_context, [stream.encoder_state], heads
        )
        count = len(stream.frames())
        (stream.encoder_state,) = advance.keep()
        stream.advance(levels[0])
        return {head: rows[0, :count] for head, rows in frames.items()}

    def transcribe(
        self,
        pcm: NDArray[Any],
        sample_rate: int = 16000,
        *,
        chunk_ms: float = DEFAULT_CHUNK_MS,
        right_context_ms: float | None = None,
        decoder: str | None = None,
        endpoint: EndpointRules | None = DEFAULT_ENDPOINT,
    ) -> list[Final]:
        """The finals of audio that is already there: (N,) mono, floating point or int16.

        Raises:
            AudioError: not audio; see ``Stream.accept``.
            ConfigError: see ``stream``.
        """
        samples = as_float32(pcm)
        stream = self.stream(
            sample_rate=sample_rate,
            chunk_ms=chunk_ms,
            right_context_ms=right_context_ms,
            decoder=decoder,
            endpoint=endpoint,
        )
        for start in range(0, len(samples), sample_rate):
            stream.accept(samples[start : start + sample_rate])
            while stream.ready:
                self.step([stream])
        stream.finish()
        while stream.ready:
            self.step([stream])
        return [event for event in stream.events() if isinstance(event, Final)]

    def _hear(self, streams: Sequence[Stream], windows: Float32) -> tuple[Float32, Float32]:
        """Windows (B, T, F) as the encoder is to hear them, and how loud they are (B, levels)."""
        levels = self._loudness(windows)
        leveller = self.bundle.leveller
        if leveller is None:
            return windows, levels
        peaks = [stream.loudest(own) for stream, own in zip(streams, levels, strict=True)]
        return leveller.raised(windows, peaks), levels

    def _advance(
        self, streams: Sequence[Stream], windows: Sequence[Float32], right_context: int
    ) -> None:
        batch = windows[0][None] if len(windows) == 1 else np.stack(windows)
        by_decoder: dict[DecoderName, list[int]] = {}
        for i, stream in enumerate(streams):
            by_decoder.setdefault(stream.decoder, []).append(i)
        heads = list(dict.fromkeys(head for name in by_decoder for head in HEADS[name]))
        heard, levels = self._hear(streams, batch)
        frames, advance = self._encoder.advance(
            heard, right_context, [stream.encoder_state for stream in streams], heads
        )
        decoded: list[tuple[int, tuple[list[Frame], Search]]] = []
        for name, rows in by_decoder.items():
            jobs = [_job(streams[i], {h: frames[h][i] for h in HEADS[name]}) for i in rows]
            decoded += zip(rows, self._decoders[name].decode(jobs), strict=True)
        # No network runs from here on: a step that fails has changed no stream and may be repeated.
        slots = advance.keep()
        for i, (said, search) in decoded:
            stream = streams[i]
            stream.search, stream.encoder_state = search, slots[i]
            stream.transcript.accept(said)
            stream.transcript.pending = search.pending
            stream.advance(levels[i])


def _job(stream: Stream, frames: Mapping[str, Float32]) -> Job:
    """Of (K, ...) encoder frames, those beyond the audio included."""
    span = stream.frames()
    own = {head: rows[: len(span)] for head, rows in frames.items()}
    return Job(stream.search, own, span.start, stream.transcript.endpointer())
