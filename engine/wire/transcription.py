"""OpenAI's transcription of a file, ``POST /v1/audio/transcriptions``: its form and its answers.

The form is read as it comes in: the file goes to whoever holds `MultipartForm.sink`, in pieces; the
other fields are few and short. Knows neither sockets nor files.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from loquent.engine.errors import ConfigError
from loquent.engine.events import Final
from loquent.engine.hotwords import Hotword
from loquent.engine.subtitles import srt, vtt
from loquent.engine.wire.languages import name_of
from loquent.engine.wire.phrases import MAX_PHRASES, hotwords, listed
from loquent.engine.wire.session import Refused
from loquent.engine.wire.written import MARKS, written

PATH = "/v1/audio/transcriptions"
FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
MAX_FIELD = 10_000  # bytes of a field that is not the file
MAX_PARTS = 128
_USED = {"file", "model", "language", "response_format", "timestamp_granularities[]"}
_KEYWORDS = ("keywords[]", "keywords")


class MultipartForm:
    """Reads a body of ``multipart/form-data``.

    Args:
        content_type: the request's.
        sink: takes the bytes of ``file``, in order.

    Attributes:
        fields: the other fields; of one that comes again, all values.
        filename: what the client calls its file, None before it came.

    Raises:
        Refused: the body is no such form, or one that is out of bounds.
    """

    def __init__(self, content_type: str, sink: Callable[[bytes], object]) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise _bad(f"got Content-Type {content_type!a:.60}, expected multipart/form-data")
        self.fields: dict[str, list[str]] = {}
        self.filename: str | None = None
        self._sink = sink
        self._parts = 0
        self._header: tuple[bytes, bytes] = (b"", b"")
        self._name = ""
        self._value = b""
        self._over = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, a, b: self._head(data[a:b], b""),
                "on_header_value": lambda data, a, b: self._head(b"", data[a:b]),
                "on_header_end": self._disposition,
                "on_part_data": lambda data, a, b: self._data(data[a:b]),
                "on_part_end": self._end,
                "on_end": self._finish,
            },
        )

    def accept(self, data: bytes) -> None:
        """The next piece of the body."""
        try:
            self._parser.write(data)
        except FormParserError as exc:
            raise _bad(f"got a body that is no multipart form: {exc}") from exc

    def finish(self) -> None:
        """The body is over."""
        if not self._over:
            raise _bad("got a multipart form that breaks off")
        if self.filename is None:
            raise _bad("got no file, expected one in the field `file`", "file")

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _bad(f"got more than {MAX_PARTS} fields")
        self._header, self._name, self._value = (b"", b""), "", b""

    def _head(self, field: bytes, value: bytes) -> None:
        self._header = (self._header[0] + field, self._header[1] + value)
        if sum(map(len, self._header)) > MAX_FIELD:
            raise _bad(f"got a header of more than {MAX_FIELD} bytes in the form")

    def _disposition(self) -> None:
        name, value = self._header
        self._header = (b"", b"")
        if name.lower() != b"content-disposition":
            return
        options = parse_options_header(value)[1]
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == "file":
            if self.filename is not None:
                raise _bad("got two files, expected one", "file")
            self.filename = options.get(b"filename", b"file").decode(errors="replace")[:200]

    def _data(self, data: bytes) -> None:
        if self._name == "file":
            self._sink(data)
            return
        self._value += data
        if len(self._value) > MAX_FIELD:
            raise _bad(f"got a field of more than {MAX_FIELD} bytes, expected a short one")

    def _end(self) -> None:
        if self._name and self._name != "file":
            value = self._value.decode(errors="replace")
            self.fields.setdefault(self._name, []).append(value)

    def _finish(self) -> None:
        self._over = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the fields ask for.

    Attributes:
        kind: one of `FORMATS`.
        words, segments: what verbose_json has times of.
        hotwords: of the keywords, and of a prompt that is a list.
        ignored: fields that change nothing here.
    """

    kind: str = "json"
    words: bool = False
    segments: bool = True
    language: str | None = None
    hotwords: tuple[Hotword, ...] = ()
    ignored: tuple[str, ...] = ()

    @classmethod
    def parse(
        cls,
        fields: Mapping[str, Sequence[str]],
        languages: Collection[str],
        spells: Callable[[str], bool] = bool,
    ) -> Options:
        """`spells`: see `Context`. Raises Refused for what cannot be met."""
        kind = (fields.get("response_format") or ["json"])[-1]
        if kind not in FORMATS:
            raise _bad(
                f"got response_format {kind!a:.40}, expected one of {', '.join(FORMATS)}",
                "response_format",
            )
        language = (fields.get("language") or [""])[-1]
        if language and languages and language.split("-")[0].lower() not in languages:
            raise _bad(
                f"got language {language!a:.40}, this server has {', '.join(sorted(languages))}",
                "language",
            )
        if (fields.get("stream") or ["false"])[-1].lower() == "true":
            raise _bad("got stream=true; use the WebSocket at /v1/realtime for that", "stream")
        wanted = fields.get("timestamp_granularities[]") or ["segment"]
        prompt = (fields.get("prompt") or [""])[-1]
        keywords = [phrase for name in _KEYWORDS for phrase in fields.get(name, ())]
        try:
            known, unknown = hotwords([*keywords, *listed(prompt)][:MAX_PHRASES], spells)
        except ConfigError as exc:
            raise _bad(str(exc), "keywords") from exc
        ignored = fields.keys() - _USED - {"stream", "prompt", *_KEYWORDS}
        ignored |= {f"the phrase {phrase}" for phrase in unknown}
        if prompt and not listed(prompt):
            ignored.add("prompt")
        return cls(
            kind=kind,
            words="word" in wanted,
            segments="segment" in wanted,
            language=language or next(iter(languages), None),
            hotwords=known,
            ignored=tuple(sorted(name[:40] for name in ignored)),
        )

    @property
    def report(self) -> str:
        """The ignored fields, as a header can hold them."""
        return ", ".join(name.encode("unicode_escape").decode() for name in self.ignored)

    def render(self, finals: Sequence[Final], duration: float) -> tuple[str, str]:
        """The body of the answer, and its content type."""
        text = " ".join(final.text for final in finals)
        match self.kind:
            case "text":
                return f"{text}\n", "text/plain; charset=utf-8"
            case "srt":
                return srt(map(_as_written, finals)), "text/plain; charset=utf-8"
            case "vtt":
                return vtt(map(_as_written, finals)), "text/vtt; charset=utf-8"
        usage = {"type": "duration", "seconds": math.ceil(duration)}
        answer: dict[str, Any] = {"text": text}
        if self.kind == "verbose_json":
            answer = {
                "task": "transcribe",
                "language": name_of(self.language) if self.language else None,
                "duration": round(duration, 3),
                **answer,
            }
            if self.segments:
                answer["segments"] = [_segment(final) for final in finals]
            if self.words:
                answer["words"] = [
                    {
                        "word": word.text.rstrip(MARKS),
                        "start": round(word.start, 3),
                        "end": round(word.end, 3),
                    }
                    for final in finals
                    for word in _as_written(final).words
                ]
        return json.dumps({**answer, "usage": usage}, ensure_ascii=False), "application/json"


def error_body(status: HTTPStatus, message: str, param: str | None = None) -> str:
    """An error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = {401: "invalid_api_key", 429: "rate_limit_exceeded"}.get(status.value)
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


class _FormError(Refused):
    """A form that cannot be used; `param` names the field."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(HTTPStatus.BAD_REQUEST, message)
        self.param = param


def _bad(message: str, param: str | None = None) -> Refused:
    return _FormError(message, param)


def _as_written(final: Final) -> Final:
    """With words as its text has them: cased, with their marks, numbers in digits."""
    words = (dataclasses.replace(word, text=s) for word, s in written(final.words, final.text))
    return dataclasses.replace(final, words=tuple(words))


def _segment(final: Final) -> dict[str, Any]:
    # Whisper's fields. What its decoder knows and ours does not is what it would be if all is well.
    data = final.text.encode()
    scores = [math.log(max(word.confidence, 1e-6)) for word in final.words]
    return {
        "id": final.segment,
        "seek": 0,
        "start": round(final.start, 3),
        "end": round(final.end, 3),
        "text": f" {final.text}",  # so that segments, joined, are the text
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": round(sum(scores) / max(len(scores), 1), 4),
        "compression_ratio": round(len(data) / len(zlib.compress(data)), 3),
        "no_speech_prob": 0.0,
    }
