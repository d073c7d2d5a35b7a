"""The model bundle: a folder or one ``.tar`` with ``manifest.json``, ONNX graphs and tokens.

Nothing is ever extracted, nothing in a bundle is executed, and every file is held against the hash
in the manifest, so what loads is what was exported or nothing at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from loquent.engine.archive import BundleFiles, open_files
from loquent.engine.decode.fusion import BEAM_WEIGHTS, BeamRules
from loquent.engine.errors import BundleError, ConfigError
from loquent.engine.features import FeatureSpec
from loquent.engine.fields import MANIFEST, Fields
from loquent.engine.level import MOST, Leveller, LevelRules
from loquent.engine.ngram import Ngram
from loquent.engine.spelling import SPELLING_RULES, SpellingRules
from loquent.engine.words import PLAIN, WORD_RULES, WordRules

SCHEMA = 1
BLANK_PIECE = "<blank>"
# Keys of every graph's metadata_props: they tie a graph to the manifest it was exported with.
META_SCHEMA = "loquent_schema"
META_FEATURES = "loquent_features"  # FeatureSpec.digest()
META_TOKENS = "loquent_tokens"  # sha256 of tokens.txt

DecoderName = Literal["joint", "rnnt-beam", "ctc-beam", "rnnt", "ctc"]
Head = Literal["ctc", "joiner"]
# What each decoder reads of the encoder.
HEADS: Mapping[DecoderName, tuple[Head, ...]] = {
    "joint": ("ctc", "joiner"),
    "rnnt-beam": ("joiner",),
    "ctc-beam": ("ctc",),
    "rnnt": ("joiner",),
    "ctc": ("ctc",),
}
DECODERS = tuple(HEADS)
DTYPES = ("float32", "float16", "int64", "int32")

_BUNDLES = Path(__file__).with_name("bundles")


@dataclass(frozen=True, kw_only=True)
class GraphFile:
    """An ONNX file of the bundle and its SHA-256."""

    file: str
    sha256: str


# The encoder's state that counts a stream's frames, by which its rings go.
PROCESSED = "processed_frames"


@dataclass(frozen=True, kw_only=True)
class StateSpec:
    """A named state: ``shape`` is without the batch axis; every element starts as ``init``.

    ``ring`` is the axis over which it is a ring: what belongs to frame n of a stream lies at n
    modulo its length, n being what the state ``processed_frames`` counts, divided by ``every``.
    The graph reads such a state in the row that its input ``rows`` names, and gives out the
    window's own frames only.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    init: float
    ring: int | None = None
    every: int = 1


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The encoder; every length is in feature frames."""

    graph: GraphFile
    subsampling: int
    lookahead: int
    segments: tuple[int, ...]
    segment: int
    right_contexts: tuple[int, ...]
    right_context: int
    states: tuple[StateSpec, ...]


@dataclass(frozen=True, kw_only=True)
class RnntSpec:
    """The transducer's predictor and joiner."""

    joiner_dim: int
    predictor: GraphFile
    states: tuple[StateSpec, ...]
    joiner: GraphFile


@dataclass(frozen=True, kw_only=True)
class NeuralSpec:
    """The recurrent word model beside the n-gram: for which words, and how much it counts."""

    graph: GraphFile
    words_sha256: str
    share: float
    states: tuple[StateSpec, ...]


@dataclass(frozen=True, kw_only=True)
class LmSpec:
    """The word language model of beam search.

    Besides the n-gram: how words are spelt after it, and a recurrent model, if there are such.
    """

    file: str
    sha256: str
    spelling: SpellingRules | None
    neural: NeuralSpec | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """A checked manifest with everything but the graphs, which stay in ``files``.

    ``manifest`` is the JSON as it stands in the file, for what the engine does not need: training,
    scores, licence.
    """

    name: str
    version: str
    sample_rate: int
    features: FeatureSpec
    encoder: EncoderSpec
    has_ctc: bool
    rnnt: RnntSpec | None
    lm: LmSpec | None
    level: LevelRules | None
    beams: Mapping[DecoderName, BeamRules]
    default_decoder: DecoderName
    blank: int
    tokens: tuple[str, ...]
    tokens_sha256: str
    languages: Mapping[str, str]
    words: Mapping[str, WordRules]
    precision: str
    manifest: Mapping[str, Any]
    files: BundleFiles

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> Bundle:
        """Read and check a bundle.

        Args:
            source: a folder, a tar file, or the name of a bundle that came with Loquent (``en``).

        Raises:
            BundleError: says what is wrong and what to do about it.
        """
        return _read(open_files(source, bundled=_BUNDLES))

    def graph(self, graph: GraphFile) -> bytes:
        """The bytes of an ONNX file, checked. Raises BundleError."""
        try:
            return _checked(self.files, graph.file, graph.sha256)
        except BundleError as exc:
            raise BundleError(f"{self.files.where}: {exc}") from exc

    def language_model(self) -> Ngram | None:
        """The word language model, checked, if there is one. Raises BundleError."""
        if self.lm is None:
            return None
        try:
            return Ngram.from_bytes(_checked(self.files, self.lm.file, self.lm.sha256))
        except (BundleError, ValueError) as exc:
            raise BundleError(f"{self.files.where}: {self.lm.file}: {exc}") from exc

    def word_rules(self, decoder: str) -> WordRules:
        """What the tokens of a decoder say about its words; as they are, if nobody measured it."""
        return self.words.get(decoder, PLAIN)

    @cached_property
    def leveller(self) -> Leveller | None:
        """Raises quiet speech, if the bundle says what is quiet."""
        return None if self.level is None else Leveller(self.features, self.level)

    @cached_property
    def frame_seconds(self) -> float:
        """Seconds from one encoder frame to the next."""
        return self.encoder.subsampling * self.features.hop / self.sample_rate

    @cached_property
    def decoders(self) -> tuple[DecoderName, ...]:
        """The decoders that this bundle has heads for."""
        missing = {"ctc": not self.has_ctc, "joiner": self.rnnt is None}
        return tuple(
            name for name, heads in HEADS.items() if not any(missing[head] for head in heads)
        )

    @cached_property
    def chunks_ms(self) -> tuple[float, ...]:
        """Chunk sizes that a stream may choose, in milliseconds."""
        return tuple(self.milliseconds(segment) for segment in self.encoder.segments)

    @cached_property
    def right_contexts_ms(self) -> tuple[float, ...]:
        """Right contexts that a stream may choose, in milliseconds."""
        return tuple(self.milliseconds(frames) for frames in self.encoder.right_contexts)

    def milliseconds(self, frames: int) -> float:
        """Length of so many feature frames."""
        return frames * self.features.hop * 1000 / self.sample_rate

    def segment_for(self, chunk_ms: float) -> int:
        """Feature frames of a chunk. Raises ConfigError unless the model was made for it."""
        return _choose("chunk_ms", chunk_ms, self.chunks_ms, self.encoder.segments)

    def right_context_for(self, right_context_ms: float | None) -> int:
        """Feature frames of right context, None for the default. Raises ConfigError."""
        if right_context_ms is None:
            return self.encoder.right_context
        allowed = self.encoder.right_contexts
        return _choose("right_context_ms", right_context_ms, self.right_contexts_ms, allowed)


def _choose(option: str, value: float, choices: tuple[float, ...], frames: tuple[int, ...]) -> int:
    if value not in choices:
        names = ", ".join(f"{choice:g}" for choice in choices)
        raise ConfigError(f"got {option} {value!r}, expected one of {names} for this model")
    return frames[choices.index(value)]


def _read(files: BundleFiles) -> Bundle:
    try:
        return _parse(files, json.loads(files.read(MANIFEST)))
    except json.JSONDecodeError as exc:
        raise BundleError(f"{files.where}: {MANIFEST} is no JSON: {exc}") from exc
    except UnicodeDecodeError as exc:
        raise BundleError(f"{files.where}: got a file that is not UTF-8: {exc}") from exc
    except BundleError as exc:
        raise BundleError(f"{files.where}: {exc}") from exc


def _parse(files: BundleFiles, manifest: object) -> Bundle:
    top = Fields(manifest, "")
    schema = top.integer("schema", 1)
    if schema > SCHEMA:
        raise BundleError(
            f"{MANIFEST}: got schema {schema}, expected no more than {SCHEMA}; the bundle is made "
            "for a newer Loquent: upgrade with `pip install -U loquent`"
        )
    features = _features(files, top.object("features"))
    sample_rate = top.integer("sample_rate", 1)
    if sample_rate != features.sample_rate:
        raise BundleError(
            f"{MANIFEST}: sample_rate is {sample_rate}, but its features are made for "
            f"{features.sample_rate} Hz; export the bundle again"
        )
    blank = top.integer("blank", 0)
    tokens, tokens_sha256 = _tokens(
        files, top.object("tokens"), top.integer("vocab_size", 2), blank
    )
    heads = top.object("heads")
    rnnt = _rnnt(heads.object("rnnt")) if heads.has("rnnt") else None
    bundle = Bundle(
        name=top.string("name"),
        version=top.string("version"),
        sample_rate=sample_rate,
        features=features,
        encoder=_encoder(top.object("encoder")),
        has_ctc=heads.boolean("ctc"),
        rnnt=rnnt,
        lm=_lm(top.object("lm")) if top.has("lm") else None,
        level=_level(top.object("level"), features) if top.has("level") else None,
        beams=_beams(top),
        default_decoder=cast(DecoderName, top.choice("default_decoder", DECODERS)),
        blank=blank,
        tokens=tokens,
        tokens_sha256=tokens_sha256,
        languages=top.strings("languages"),
        words=_words(top.object("words")) if top.has("words") else {},
        precision=top.choice("precision", ("fp32", "int8")),
        manifest=cast(Mapping[str, Any], manifest),
        files=files,
    )
    if bundle.default_decoder not in bundle.decoders:
        raise BundleError(
            f"{MANIFEST}: got default_decoder {bundle.default_decoder!r}, expected one that has a "
            f"head: {', '.join(bundle.decoders) or 'none has'}"
        )
    return bundle


def _features(files: BundleFiles, fields: Fields) -> FeatureSpec:
    data = _checked(files, fields.file("file"), fields.string("sha256"))
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return FeatureSpec.from_parts(fields.plain("spec"), dict(arrays))
    except (ValueError, TypeError, OSError) as exc:
        raise BundleError(f"{fields.file('file')}: {exc}; export the bundle again") from exc


def _tokens(
    files: BundleFiles, fields: Fields, vocab_size: int, blank: int
) -> tuple[tuple[str, ...], str]:
    name, sha256 = fields.file("file"), fields.string("sha256")
    # Not splitlines(): a piece may hold one of the rarer line separators of Unicode.
    tokens = tuple(_checked(files, name, sha256).decode().removesuffix("\n").split("\n"))
    if len(tokens) != vocab_size:
        raise BundleError(
            f"{name}: got {len(tokens)} tokens, expected vocab_size {vocab_size} of {MANIFEST}; "
            "tokens and model do not belong together: export the bundle again"
        )
    if blank >= vocab_size or tokens[blank] != BLANK_PIECE:
        found = tokens[blank] if blank < vocab_size else "nothing"
        raise BundleError(
            f"{name}: line {blank + 1}, the blank of {MANIFEST}, is {found!r}, expected "
            f"{BLANK_PIECE!r}; export the bundle again"
        )
    if fields.has("spm"):
        _checked(files, fields.file("spm"), fields.string("spm_sha256"))
    return tokens, sha256


def _encoder(fields: Fields) -> EncoderSpec:
    subsampling = fields.integer("subsampling", 1)
    segments, rights = fields.integers("segments", 1), fields.integers("right_contexts", 0)
    segment, right = fields.integer("segment", 1), fields.integer("right_context", 0)
    for key, chosen, values in (
        ("segment", segment, segments),
        ("right_context", right, rights),
    ):
        if any(value % subsampling for value in values):
            raise BundleError(
                f"{MANIFEST}: got encoder.{key}s = {list(values)}, expected multiples of the "
                f"subsampling, {subsampling}"
            )
        if chosen not in values:
            raise BundleError(
                f"{MANIFEST}: got encoder.{key} = {chosen}, expected one of {list(values)}"
            )
    return EncoderSpec(
        graph=_graph(fields),
        subsampling=subsampling,
        lookahead=fields.integer("lookahead", 0),
        segments=segments,
        segment=segment,
        right_contexts=rights,
        right_context=right,
        states=_states(fields),
    )


def _rnnt(fields: Fields) -> RnntSpec:
    predictor = fields.object("predictor")
    return RnntSpec(
        joiner_dim=fields.integer("joiner_dim", 1),
        predictor=_graph(predictor),
        states=_states(predictor),
        joiner=_graph(fields.object("joiner")),
    )


def _lm(fields: Fields) -> LmSpec:
    spelling = None
    if fields.has("spelling"):
        own, default = fields.object("spelling"), SpellingRules()
        try:
            spelling = SpellingRules(
                **{key: own.number(key, getattr(default, key)) for key in SPELLING_RULES}
            )
        except ConfigError as exc:
            raise BundleError(f"{MANIFEST}: lm.spelling: {exc}") from exc
    return LmSpec(
        file=fields.file("file"),
        sha256=fields.string("sha256"),
        spelling=spelling,
        neural=_neural(fields.object("neural")) if fields.has("neural") else None,
    )


def _level(fields: Fields, features: FeatureSpec) -> LevelRules:
    try:
        rules = LevelRules(quiet=fields.number("quiet", math.nan), most=fields.number("most", MOST))
        Leveller(features, rules)
    except (ConfigError, TypeError, ValueError, OverflowError) as exc:
        raise BundleError(f"{MANIFEST}: level: {exc}") from exc
    return rules


def _neural(fields: Fields) -> NeuralSpec:
    share = fields.number("share", 0.5)
    if not 0 < share <= 1:  # NaN too
        raise BundleError(f"{MANIFEST}: got lm.neural.share = {share}, expected above 0, at most 1")
    return NeuralSpec(
        graph=_graph(fields),
        words_sha256=fields.string("words_sha256"),
        share=share,
        states=_states(fields),
    )


def _beams(top: Fields) -> dict[DecoderName, BeamRules]:
    """The rules of the decoders that have some; what is left out has a default."""
    if not top.has("beams"):
        return {}
    beams = top.object("beams")
    found: dict[DecoderName, BeamRules] = {}
    for name in DECODERS:
        if beams.has(name):
            fields, default = beams.object(name), BeamRules()
            weights: dict[str, Any] = {
                key: fields.number(key, getattr(default, key)) for key in BEAM_WEIGHTS
            }
            try:
                found[name] = BeamRules(beam=fields.integer("beam", 1), **weights)
            except ConfigError as exc:
                raise BundleError(f"{MANIFEST}: beams.{name}: {exc}") from exc
    return found


def _words(fields: Fields) -> dict[str, WordRules]:
    found: dict[str, WordRules] = {}
    for name in DECODERS:
        if fields.has(name):
            own = fields.object(name)
            numbers = {key: own.number(key, 0.0) for key in WORD_RULES if own.has(key)}
            for key, value in numbers.items():
                if not abs(value) <= 100:  # NaN too
                    raise BundleError(
                        f"{MANIFEST}: got words.{name}.{key} = {value}, expected -100 to 100; "
                        "measure it again with `loquent words`"
                    )
            found[name] = WordRules(**numbers)
    return found


def _graph(fields: Fields) -> GraphFile:
    return GraphFile(file=fields.file("file"), sha256=fields.string("sha256"))


def _states(fields: Fields) -> tuple[StateSpec, ...]:
    states = tuple(
        StateSpec(
            name=state.string("name"),
            shape=state.integers("shape", 0),
            dtype=state.choice("dtype", DTYPES),
            init=state.number("init", 0),
            ring=state.integer("ring", 0) if state.has("ring") else None,
            every=state.integer("every", 1) if state.has("every") else 1,
        )
        for state in fields.objects("states")
    )
    counted = any((s.name, s.shape, s.dtype) == (PROCESSED, (), "int64") for s in states)
    for state in states:
        if state.ring is not None and not (state.ring < len(state.shape) and counted):
            raise BundleError(
                f"{MANIFEST}: got the state {state.name} {list(state.shape)} with ring "
                f"{state.ring}, expected one of its axes and an int64 state {PROCESSED} of shape []"
            )
    return states


def _checked(files: BundleFiles, name: str, sha256: str) -> bytes:
    data = files.read(name)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise BundleError(
            f"{name}: the SHA-256 is {found[:12]}..., expected {sha256[:12]}... of {MANIFEST}; the "
            "file is damaged or not of this bundle: copy or export the bundle again"
        )
    return data
