"""The options that a Deepgram client puts into the query of its address."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from loquent.engine.endpoint import EndpointRules
from loquent.engine.hotwords import Hotword
from loquent.engine.recognizer import DEFAULT_ENDPOINT
from loquent.engine.stream import MAX_RATE, MIN_RATE
from loquent.engine.wire.pcm import MAX_CHANNELS, Raw
from loquent.engine.wire.phrases import MAX_PHRASES, hotwords

Query = Mapping[str, tuple[str, ...]]

_ENCODINGS: Mapping[str, Raw] = {
    "linear16": "s16le",
    "linear32": "f32le",
    "mulaw": "mulaw",
    "alaw": "alaw",
}
# Silence is what the decoder hears as blank, and it hears some between the tokens of one word:
# Deepgram's usual 10 ms would end every word.
MIN_ENDPOINTING = 0.2
_LONGEST = EndpointRules(trailing_silence=3600.0)

# Options that change nothing here, though we know what they mean: there is one model, its text is
# plain, and nobody trains on it.
_HARMLESS = frozenset({"model", "version", "mip_opt_out", "no_delay", "tag", "extra", "callback"})
_USED = frozenset(
    {
        "encoding",
        "sample_rate",
        "channels",
        "language",
        "interim_results",
        "endpointing",
        "utterance_end_ms",
        "vad_events",
        "punctuate",
        "smart_format",
        "keyterm",
        "keywords",
        "api_key",
        "access_token",
        "token",
    }
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What of it means something here.

    Attributes:
        raw: how samples are written; None for a wav file, which says it itself.
        endpoint: when a result is speech_final.
        hotwords: of keyterm, and of keywords without their ``:boost``, which is no measure of ours.
        utterance_end: seconds, 0 for no UtteranceEnd.
        punctuate: finals are finished, and words have a punctuated_word.
        unused: names of options that change nothing here, though a client may count on them.
    """

    raw: Raw | None
    sample_rate: int
    channels: int
    interim_results: bool
    endpoint: EndpointRules
    hotwords: tuple[Hotword, ...]
    utterance_end: float
    vad_events: bool
    punctuate: bool
    unused: tuple[str, ...]

    @property
    def segments(self) -> EndpointRules:
        """When a result is final: at the latest before its UtteranceEnd, as clients expect."""
        longest = max(self.utterance_end, MIN_ENDPOINTING)
        if not self.utterance_end or self.endpoint.trailing_silence <= longest:
            return self.endpoint
        return dataclasses.replace(self.endpoint, trailing_silence=longest)

    @classmethod
    def parse(
        cls,
        query: Query,
        languages: Collection[str],
        *,
        finishes: bool,
        spells: Callable[[str], bool],
    ) -> Options:
        """`finishes`, `spells`: see `Context`. Raises ValueError for what cannot be met."""
        encoding = _last(query, "encoding")
        if encoding is not None and encoding not in _ENCODINGS:
            raise ValueError(
                f"got encoding={encoding!a:.40}, expected one of {', '.join(_ENCODINGS)}, or none "
                "for a wav file"
            )
        language = _last(query, "language")
        known = {"multi", *languages}
        if language and languages and language.split("-")[0].lower() not in known:
            raise ValueError(
                f"got language={language!a:.40}, this server has {', '.join(sorted(languages))}"
            )
        interim = _flag(query, "interim_results")
        utterance_end = _number(query, "utterance_end_ms", 0, 0, 60_000) / 1000
        unused = {
            name
            for name, values in query.items()
            if name not in _USED | _HARMLESS and set(values) != {"false"}
        }
        written = [name for name in ("punctuate", "smart_format") if _flag(query, name)]
        if written and finishes:
            unused.discard("numerals")  # which come with them
        elif written:
            unused.update(written)
        terms = [*query.get("keyterm", ())]
        terms += [word.partition(":")[0] for word in query.get("keywords", ())]
        phrases, unknown = hotwords(terms, spells)
        unused.update(f"keyterm={phrase}" for phrase in unknown)
        if utterance_end and not interim:
            raise ValueError("utterance_end_ms needs interim_results=true")
        return cls(
            raw=None if encoding is None else _ENCODINGS[encoding],
            sample_rate=int(_number(query, "sample_rate", 16000, MIN_RATE, MAX_RATE)),
            channels=int(_number(query, "channels", 1, 1, MAX_CHANNELS)),
            interim_results=interim,
            endpoint=_endpoint(query),
            hotwords=phrases,
            utterance_end=utterance_end,
            vad_events=_flag(query, "vad_events"),
            punctuate=bool(written),
            unused=tuple(sorted(name[:40] for name in unused)),
        )


def keyterms(phrases: Sequence[object], spells: Callable[[str], bool]) -> tuple[Hotword, ...]:
    """Those of a message. Raises ValueError."""
    if len(phrases) > MAX_PHRASES:
        raise ValueError(f"got {len(phrases)} keyterms, expected at most {MAX_PHRASES}")
    for phrase in phrases:
        if not isinstance(phrase, str):
            raise ValueError(f"got {phrase!a:.40} among the keyterms, expected a phrase")
    found, unknown = hotwords([str(phrase) for phrase in phrases], spells)
    if unknown:
        raise ValueError(f"got the keyterm {unknown[0]!a:.40}, which this model cannot spell")
    return found


def _endpoint(query: Query) -> EndpointRules:
    value = _last(query, "endpointing")
    if value is None or value == "true":
        return DEFAULT_ENDPOINT
    if value == "false":
        return _LONGEST
    seconds = _number(query, "endpointing", 0, 0, 600_000) / 1000
    return EndpointRules(trailing_silence=max(seconds, MIN_ENDPOINTING))


def _last(query: Query, name: str) -> str | None:
    values = query.get(name)
    return values[-1] if values else None


def _flag(query: Query, name: str) -> bool:
    value = (_last(query, name) or "false").lower()
    if value not in ("true", "false"):
        raise ValueError(f"got {name}={value!a:.40}, expected true or false")
    return value == "true"


def _number(query: Query, name: str, default: float, least: float, most: float) -> float:
    value = _last(query, name)
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) < 10) or not (
        least <= int(value) <= most
    ):
        raise ValueError(f"got {name}={value!a:.40}, expected a whole number, {least} to {most}")
    return float(value)
