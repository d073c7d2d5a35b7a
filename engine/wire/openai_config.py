"""The settings of an OpenAI Realtime transcription session."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from loquent.engine.endpoint import EndpointRules
from loquent.engine.errors import ConfigError
from loquent.engine.hotwords import Hotword
from loquent.engine.protocol import WireError
from loquent.engine.recognizer import DEFAULT_ENDPOINT
from loquent.engine.stream import MAX_RATE, MIN_RATE
from loquent.engine.wire.pcm import Raw
from loquent.engine.wire.phrases import MAX_PHRASES, hotwords, listed

# A wait for better text means longer chunks.
_DELAYS = {"minimal": 80.0, "low": 160.0, "medium": 320.0, "high": 640.0, "xhigh": 1280.0}
# Seconds of silence after which semantic_vad answers at the latest are 8, 4 and 2; without a model
# of meaning silence is all there is, so that its words become shorter silences.
_EAGERNESS = {"low": 1.6, "medium": 0.8, "auto": 0.8, "high": 0.4}
# Silence is what the decoder hears as blank; it hears some between the tokens of one word.
MIN_SILENCE = 0.2
MAX_PROMPT = 10_000  # characters
_BETA_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
_RAW: Mapping[str, Raw] = {"audio/pcm": "s16le", "audio/pcmu": "mulaw", "audio/pcma": "alaw"}
LOGPROBS = "item.input_audio_transcription.logprobs"
Json = Mapping[str, Any]


class SettingError(WireError):
    """A setting that cannot be met; `param` is its name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__("bad_config", message)
        self.param = param


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is in force.

    Attributes:
        languages: those that may be asked for.
        spells: see `Context`.
        keywords, prompt: as given.
        hotwords: those of both, of the prompt where it is a list.
        turns: "server_vad" or "semantic_vad", None where the client commits.
        silence: seconds that end a turn; None for the server's own rule.
        unused: settings of the last update that change nothing here.
    """

    model: str
    languages: tuple[str, ...]
    spells: Callable[[str], bool] = bool
    language: str | None = None
    kind: str = "audio/pcm"
    rate: int = 24000
    turns: str | None = "server_vad"
    silence: float | None = None
    eagerness: str = "auto"
    prefix_padding: float = 0.3
    delay: str | None = None
    keywords: tuple[str, ...] = ()
    prompt: str = ""
    hotwords: tuple[Hotword, ...] = ()
    logprobs: bool = False
    unused: tuple[str, ...] = ()

    @property
    def format(self) -> tuple[Raw, int]:
        """How samples are written, and their rate in Hz."""
        return _RAW[self.kind], self.rate

    @property
    def endpoint(self) -> EndpointRules:
        """When a segment ends."""
        if self.turns == "semantic_vad":
            return EndpointRules(trailing_silence=_EAGERNESS[self.eagerness])
        if self.silence is None or self.turns is None:
            return DEFAULT_ENDPOINT
        return EndpointRules(trailing_silence=self.silence)

    def chunk_ms(self, available: Sequence[float]) -> float | None:
        """The chunk size that `delay` asks for, None for the server's own."""
        wanted = _DELAYS[self.delay] if self.delay else None
        return wanted if wanted in available else None

    def updated(self, session: object) -> Config:
        """With the settings that an update names, in the names of today or of the beta.

        Raises SettingError.
        """
        fields = _object(session, "session")
        unused = fields.keys() - _SESSION
        given = dict(_object(_object(fields.get("audio"), "audio").get("input"), "audio.input"))
        unused |= {f"audio.input.{name}" for name in given.keys() - _INPUT}
        for beta, name in _BETA_NAMES.items():
            if beta in fields:
                given.setdefault(name, fields[beta])
        changes: dict[str, Any] = {}
        if (kind := given.get("format")) is not None:
            changes |= _format({"type": kind} if isinstance(kind, str) else kind)
        if (about := given.get("transcription")) is not None:
            changes |= self._transcription(_object(about, "transcription"), unused)
        if "turn_detection" in given:
            changes |= _turns(given["turn_detection"], unused)
        if given.get("noise_reduction") is not None:
            unused.add("noise_reduction")
        if (include := fields.get("include")) is not None:
            changes["logprobs"] = isinstance(include, list) and LOGPROBS in include
        names = tuple(sorted(name[:40] for name in unused))[:20]
        return dataclasses.replace(self, **changes, unused=names)

    def describe(self, *, beta: bool) -> dict[str, Any]:
        """The session as the client is told of it."""
        transcription = {
            "model": self.model,
            "language": self.language,
            "delay": self.delay,
            **({"keywords": list(self.keywords)} if self.keywords else {}),
            **({"prompt": self.prompt} if self.prompt else {}),
        }
        include = [LOGPROBS] if self.logprobs else []
        more = {"unsupported": list(self.unused)} if self.unused else {}
        if beta:
            names = {kind: name for name, kind in _BETA_FORMATS.items()}
            return {
                "object": "realtime.transcription_session",
                "input_audio_format": names[self.kind],
                "input_audio_transcription": transcription,
                "input_audio_noise_reduction": None,
                "turn_detection": self._turn_detection(),
                "include": include,
                **more,
            }
        kind = {"type": self.kind, **({"rate": self.rate} if self.kind == "audio/pcm" else {})}
        about = {
            "format": kind,
            "transcription": transcription,
            "noise_reduction": None,
            "turn_detection": self._turn_detection(),
        }
        return {
            "object": "realtime.transcription_session",
            "type": "transcription",
            "audio": {"input": about},
            "include": include,
            **more,
        }

    def _turn_detection(self) -> dict[str, Any] | None:
        if self.turns == "semantic_vad":
            return {"type": self.turns, "eagerness": self.eagerness}
        if self.turns is None:
            return None
        return {
            "type": self.turns,
            "threshold": 0.5,
            "prefix_padding_ms": round(self.prefix_padding * 1000),
            "silence_duration_ms": round(self.endpoint.trailing_silence * 1000),
        }

    def _transcription(self, about: Json, unused: set[str]) -> dict[str, Any]:
        unused |= {f"transcription.{name}" for name in about.keys() - _TRANSCRIPTION}
        changes: dict[str, Any] = {}
        if (model := about.get("model")) is not None:
            changes["model"] = _string(model, "model")
        if (language := about.get("language")) is not None:
            code = _string(language, "language")
            if code and self.languages and code.split("-")[0].lower() not in self.languages:
                raise SettingError(
                    "language", f"got {code!a:.40}, this server has {', '.join(self.languages)}"
                )
            changes["language"] = code or None
        if (delay := about.get("delay")) is not None:
            changes["delay"] = _choice(delay, "delay", _DELAYS)
        keywords, prompt = self.keywords, self.prompt
        if (given := about.get("keywords")) is not None:
            keywords = _keywords(given)
        if (given := about.get("prompt")) is not None:
            prompt = _string(given, "prompt", MAX_PROMPT)
            if prompt and not listed(prompt):
                unused.add("transcription.prompt")
        if (keywords, prompt) != (self.keywords, self.prompt):
            changes |= {"keywords": keywords, "prompt": prompt}
            try:
                changes["hotwords"], unknown = hotwords(
                    [*keywords, *listed(prompt)][:MAX_PHRASES], self.spells
                )
            except ConfigError as exc:
                raise SettingError("keywords", str(exc)) from exc
            unused |= {f"the phrase {phrase}" for phrase in unknown}
        return changes


_SESSION = {
    "type",
    "audio",
    "include",
    "model",
    "id",
    "object",
    "expires_at",
    "input_audio_format",
    "input_audio_transcription",
    "turn_detection",
    "input_audio_noise_reduction",
}
_INPUT = {"format", "transcription", "turn_detection", "noise_reduction"}
_TRANSCRIPTION = {"model", "language", "delay", "keywords", "prompt"}
_BETA_NAMES = {
    "input_audio_format": "format",
    "input_audio_transcription": "transcription",
    "turn_detection": "turn_detection",
    "input_audio_noise_reduction": "noise_reduction",
}


def _object(value: object, name: str) -> Json:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SettingError(name, f"got {value!a:.40}, expected an object")
    return value


def _string(value: object, name: str, most: int = 100) -> str:
    if not isinstance(value, str):
        raise SettingError(name, f"got {value!a:.40}, expected a string")
    return value[:most]


def _keywords(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_PHRASES:
        raise SettingError(
            "keywords", f"got {value!a:.40}, expected a list of at most {MAX_PHRASES} phrases"
        )
    return tuple(_string(phrase, "keywords") for phrase in value)


def _choice(value: object, name: str, choices: Collection[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(sorted(choices))
        raise SettingError(name, f"got {value!a:.40}, expected one of {expected}")
    return value


def _whole(about: Json, name: str, least: int, most: int) -> int | None:
    value = about.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise SettingError(name, f"got {value!a:.40}, expected a whole number, {least} to {most}")
    return value


def _format(value: object) -> dict[str, Any]:
    about = _object(value, "format")
    kind = _choice(about.get("type", "audio/pcm"), "format", {*_RAW, *_BETA_FORMATS})
    kind = _BETA_FORMATS.get(kind, kind)
    if kind != "audio/pcm":
        return {"kind": kind, "rate": 8000}
    return {"kind": kind, "rate": _whole(about, "rate", MIN_RATE, MAX_RATE) or 24000}


def _turns(value: object, unused: set[str]) -> dict[str, Any]:
    if value is None:
        return {"turns": None}
    about = _object(value, "turn_detection")
    kind = about.get("type", "server_vad")
    changes: dict[str, Any] = {
        "turns": _choice(kind, "turn_detection", ("server_vad", "semantic_vad"))
    }
    padding = _whole(about, "prefix_padding_ms", 0, 10_000)
    silence = _whole(about, "silence_duration_ms", 0, 60_000)
    if padding is not None:
        changes["prefix_padding"] = padding / 1000
    if silence is not None:
        changes["silence"] = max(silence / 1000, MIN_SILENCE)
    if (eagerness := about.get("eagerness")) is not None:
        changes["eagerness"] = _choice(eagerness, "eagerness", _EAGERNESS)
    unused |= {f"turn_detection.{name}" for name in ("threshold",) if about.get(name) is not None}
    return changes
