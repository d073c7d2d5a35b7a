"""Streams as bytes: handed over to another process, a stream goes on where it was.

A stream is a graph of small objects. One encoder goes through all of it, whatever the fields are
called, so a new field is covered from the day on which it is added; an object of a class that is
not in `_CLASSES` is an error when the snapshot is made, and not a loss when it is read. What all
streams share (networks, language model, tables) is not written: a fresh stream of the reading
recogniser stands in for it, so a snapshot is good for the same bundle only, and says so.

The bytes are an npz of plain arrays, one of which is JSON. Nothing in them is executed: reading
makes objects of the listed classes and fills in their fields.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import zipfile
from collections import deque
from collections.abc import Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np

from loquent.engine import events
from loquent.engine.bundle import Bundle
from loquent.engine.calm import Calm
from loquent.engine.chunker import Chunker
from loquent.engine.decode import Frame, Token
from loquent.engine.decode.beam import BeamState
from loquent.engine.decode.ctc import CtcState
from loquent.engine.decode.fusion import BeamRules, Fusion, Words
from loquent.engine.decode.hypothesis import Hypothesis as Prefix
from loquent.engine.decode.leaning import Leaning
from loquent.engine.decode.neural import Said
from loquent.engine.decode.rnnt import RnntState
from loquent.engine.decode.transducer import Context
from loquent.engine.endpoint import Endpointer, EndpointRules
from loquent.engine.errors import LoquentError, SnapshotError
from loquent.engine.features import Fbank
from loquent.engine.finish import Finishing
from loquent.engine.hotwords import Hotword, HotwordGraph, HotwordState
from loquent.engine.pool import Slot
from loquent.engine.resample import Resampler
from loquent.engine.ring import Ring
from loquent.engine.stream import Stream, _Mark, _Trunk
from loquent.engine.text import Hypothesis
from loquent.engine.transcript import Echo, Transcript
from loquent.engine.vad import Voice
from loquent.engine.words import WordRules

if TYPE_CHECKING:
    from loquent.engine.recognizer import Recognizer

VERSION = 3
# A stream with its buffers full and a wide beam is about a megabyte.
MAX_BYTES = 32 << 20

_CLASSES: dict[str, type[Any]] = {
    f"{cls.__module__.removeprefix('loquent.engine.')}:{cls.__name__}": cls
    for cls in (
        Stream,
        _Mark,
        _Trunk,
        Resampler,
        Ring,
        Fbank,
        Chunker,
        Calm,
        Voice,
        Slot,
        Transcript,
        Hypothesis,
        Echo,
        Finishing,
        Endpointer,
        EndpointRules,
        WordRules,
        CtcState,
        RnntState,
        Context,
        Leaning,
        BeamState,
        Prefix,
        Words,
        Said,
        HotwordState,
        Token,
        Frame,
        *(getattr(events, name) for name in ("Word", "Partial", "Final", "Finalized", "Ended")),
    )
}
_NAMES = {cls: name for name, cls in _CLASSES.items()}
# Their state is not in Python's hands; they say themselves what makes them anew.
_SPECIAL: dict[type[Any], str] = {Resampler: "_soxr", Ring: "_data"}


def take(stream: Stream, recognizer: Recognizer) -> bytes:
    """The stream as bytes. Between two steps; nothing of it is changed.

    Raises:
        SnapshotError: it has a part that this module does not know.
    """
    writer = _Writer(_template(recognizer, stream), recognizer)
    kind = {
        "sample_rate": stream.sample_rate,
        "segment": stream.segment,
        "right_context": stream.right_context,
        "decoder": stream.decoder,
        "vad": stream.voice is not None,
        "finish": stream.transcript._finishing is not None,
    }
    root = writer.value(stream)
    head = {"version": VERSION, "bundle": digest(recognizer.bundle), "stream": kind, "root": root}
    head["objects"] = writer.objects
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(head).encode(), np.uint8)
    np.savez(buffer, json=text, **{f"a{i}": a for i, a in enumerate(writer.arrays)})
    data = buffer.getvalue()
    if len(data) > MAX_BYTES:
        raise SnapshotError(f"got a snapshot of {len(data)} bytes, expected at most {MAX_BYTES}")
    return data


def give(data: bytes, recognizer: Recognizer) -> Stream:
    """The stream that `take` wrote.

    Raises:
        SnapshotError: the bytes are damaged, or of another version or bundle.
    """
    try:
        head, arrays = _unpack(data)
        if head["version"] != VERSION:
            raise SnapshotError(f"got a snapshot of version {head['version']}, expected {VERSION}")
        if head["bundle"] != digest(recognizer.bundle):
            raise SnapshotError(
                f"got a snapshot made with another bundle than {recognizer.bundle.name}; "
                "it can go on only where it was"
            )
        kind = head["stream"]
        bundle = recognizer.bundle
        template = recognizer.stream(
            sample_rate=kind["sample_rate"],
            chunk_ms=bundle.milliseconds(kind["segment"]),
            right_context_ms=bundle.milliseconds(kind["right_context"]),
            decoder=kind["decoder"],
            vad="silero" if kind["vad"] else None,
            finish=kind["finish"],
        )
        stream = _Reader(template, recognizer, head["objects"], arrays).value(head["root"])
    except LoquentError:
        raise
    except Exception as exc:  # whatever a damaged graph leads to, it is the snapshot's fault
        raise SnapshotError(f"got a damaged snapshot ({type(exc).__name__}: {exc})") from exc
    if not isinstance(stream, Stream):
        raise SnapshotError("got a damaged snapshot: there is no stream in it")
    return stream


def digest(bundle: Bundle) -> str:
    """A hash over the manifest, which has the hashes of all files."""
    text = json.dumps(bundle.manifest, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _unpack(data: bytes) -> tuple[dict[str, Any], list[Any]]:
    if len(data) > MAX_BYTES:
        raise SnapshotError(f"got a snapshot of {len(data)} bytes, expected at most {MAX_BYTES}")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = sum(info.file_size for info in archive.infolist())
        if size > MAX_BYTES:
            raise SnapshotError(f"got a snapshot that unpacks to {size} bytes")
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        head = json.loads(archive["json"].tobytes())
        return head, [archive[f"a{i}"] for i in range(len(archive.files) - 1)]


def _template(recognizer: Recognizer, stream: Stream) -> Stream:
    bundle = recognizer.bundle
    return recognizer.stream(
        sample_rate=stream.sample_rate,
        chunk_ms=bundle.milliseconds(stream.segment),
        right_context_ms=bundle.milliseconds(stream.right_context),
        decoder=stream.decoder,
        vad=None if stream.voice is None else "silero",
        finish=stream.transcript._finishing is not None,
    )


def _fields(obj: Any) -> list[str]:
    """Names of an object's fields, wherever it keeps them."""
    names = [n for cls in type(obj).__mro__ for n in getattr(cls, "__slots__", ())]
    return [*names, *getattr(obj, "__dict__", ())]


def _shared(template: Stream) -> dict[str, Any]:
    """Everything in a fresh stream that is not a number or a string, by its path."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    queue: list[tuple[str, Any]] = [("", template)]
    while queue:
        path, obj = queue.pop(0)
        if obj is None or isinstance(obj, int | float | str | bytes) or id(obj) in seen:
            continue
        seen.add(id(obj))
        found[path] = obj
        if type(obj) in _NAMES and not isinstance(obj, tuple):
            queue += [(f"{path}.{name}", getattr(obj, name)) for name in _fields(obj)]
        elif isinstance(obj, tuple) and len(obj) < 100:
            queue += [(f"{path}[{i}]", item) for i, item in enumerate(obj)]
    return found


# Of a fresh stream, what is its own and what it has in common with all others? Whatever two fresh
# ones have both is shared.
def _common(recognizer: Recognizer, template: Stream) -> dict[str, Any]:
    other = {id(obj) for obj in _shared(_template(recognizer, template)).values()}
    return {path: obj for path, obj in _shared(template).items() if id(obj) in other}


class _Writer:
    def __init__(self, template: Stream, recognizer: Recognizer) -> None:
        self._recognizer = recognizer
        self._common = {id(obj): path for path, obj in _common(recognizer, template).items()}
        self._alive = template  # an id is good for as long as its object
        self._known: dict[int, int] = {}
        self._keep: list[Any] = []
        self.objects: list[Any] = []
        self.arrays: list[Any] = []

    def value(self, value: Any) -> Any:
        """As JSON: a plain value, or a list whose first item says how to read the rest."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        if (path := self._common.get(id(value))) is not None:
            return ["shared", path]
        if isinstance(value, np.generic):
            return ["scalar", value.dtype.str, value.item()]
        if isinstance(value, bytes | bytearray):
            return [type(value).__name__, base64.b64encode(value).decode()]
        if type(value) is tuple:
            return ["tuple", *map(self.value, value)]
        if isinstance(value, MethodType) and value == self._recognizer.hotwords:
            return ["hotwords"]
        if isinstance(value, HotwordGraph):
            return ["graph", [[word.phrase, word.boost] for word in value.hotwords]]
        if isinstance(value, Fusion):
            return ["fusion", dataclasses.asdict(value.rules), self.value(value.hotwords)]
        if isinstance(value, tuple) and type(value) in _NAMES:
            return ["named", _NAMES[type(value)], *map(self.value, value)]
        return ["object", self._object(value)]

    def _object(self, obj: Any) -> int:
        if id(obj) in self._known:
            return self._known[id(obj)]
        number = self._known[id(obj)] = len(self.objects)
        self._keep.append(obj)
        self.objects.append(None)
        self.objects[number] = self._contents(obj)
        return number

    def _contents(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            if obj.dtype.hasobject:
                raise SnapshotError("got an array of objects, which a snapshot cannot hold")
            self.arrays.append(obj)
            return ["array", len(self.arrays) - 1]
        if type(obj) is list:
            return ["list", *map(self.value, obj)]
        if type(obj) is deque:
            return ["deque", obj.maxlen, *map(self.value, obj)]
        if type(obj) is dict:
            return ["dict", *([self.value(k), self.value(v)] for k, v in obj.items())]
        if isinstance(obj, Slot):
            return ["slot", *([name, self.value(a)] for name, a in obj.state().items())]
        if type(obj) not in _NAMES:
            raise SnapshotError(
                f"got a {type(obj).__module__}.{type(obj).__qualname__} in a stream, which "
                "snapshots do not know: name its class in _CLASSES if its fields are all there is"
            )
        left_out = _SPECIAL.get(type(obj))
        fields = {n: self.value(getattr(obj, n)) for n in _fields(obj) if n != left_out}
        if isinstance(obj, Ring):
            fields["_data"] = ["tuple", obj.capacity, self.value(obj.read(obj.fill).copy())]
        return ["fields", _NAMES[type(obj)], fields]


class _Reader:
    def __init__(
        self, template: Stream, recognizer: Recognizer, objects: list[Any], arrays: list[Any]
    ) -> None:
        self._recognizer = recognizer
        self._objects = objects
        self._arrays = arrays
        self._common = _common(recognizer, template)
        self._names = {type(obj): set(_fields(obj)) for obj in _shared(template).values()}
        self._fusion = next((o for o in _shared(template).values() if isinstance(o, Fusion)), None)
        self._made: dict[int, Any] = {}

    def value(self, node: Any) -> Any:
        """Inverse of `_Writer.value`."""
        if not isinstance(node, list):
            return node
        kind, *rest = node
        match kind:
            case "shared":
                return self._common[rest[0]]
            case "scalar":
                return np.dtype(rest[0]).type(rest[1])
            case "bytes":
                return base64.b64decode(rest[0])
            case "bytearray":
                return bytearray(base64.b64decode(rest[0]))
            case "tuple":
                return tuple(map(self.value, rest))
            case "hotwords":
                return self._recognizer.hotwords
            case "graph":
                return self._recognizer.hotwords(
                    [Hotword(phrase=phrase, boost=boost) for phrase, boost in rest[0]]
                )
            case "fusion":
                assert self._fusion is not None, "the decoder has one"
                rules = BeamRules(**rest[0])
                fusion = self._fusion.adjusted(rules.lm_weight, rules.blank_penalty)
                return fusion.ruled(rules).biased(self.value(rest[1]))
            case "named":
                return _CLASSES[rest[0]](*map(self.value, rest[1:]))
            case "object":
                return self._object(rest[0])
        raise SnapshotError(f"got a value of unknown kind {kind!r}")

    def _object(self, number: int) -> Any:
        if number in self._made:
            return self._made[number]
        kind, *rest = self._objects[number]
        made: Any
        match kind:
            case "array":
                made = self._made[number] = self._arrays[rest[0]]
            case "list":
                made = self._made[number] = []
                made.extend(map(self.value, rest))
            case "deque":
                made = self._made[number] = deque(maxlen=rest[0])
                made.extend(map(self.value, rest[1:]))
            case "dict":
                made = self._made[number] = {}
                made.update((self.value(key), self.value(value)) for key, value in rest)
            case "slot":
                state = {name: self.value(array) for name, array in rest}
                made = self._recognizer.pool.put(state)
                self._made[number] = made
            case "fields":
                made = self._filled(number, _CLASSES[rest[0]], rest[1])
            case _:
                raise SnapshotError(f"got an object of unknown kind {kind!r}")
        return made

    def _filled(self, number: int, cls: type[Any], fields: dict[str, Any]) -> Any:
        left_out = {_SPECIAL[cls]} if cls is Resampler else set()
        expected = self._names.get(cls) or set(_declared(cls))
        if expected and set(fields) != expected - left_out:
            raise SnapshotError(
                f"got a snapshot of another release: its {cls.__name__} has the fields "
                f"{sorted(fields)}, expected {sorted(expected - left_out)}"
            )
        made = self._made[number] = object.__new__(cls)
        for name, node in fields.items():
            value = self.value(node)
            if cls is Ring and name == "_data":
                continue
            object.__setattr__(made, name, value)
        if isinstance(made, Ring):
            capacity, samples = self.value(fields["_data"])
            made.refill(capacity, samples)
        if isinstance(made, Resampler):
            made.restart()
        return made


def _declared(cls: type[Any]) -> Iterable[str]:
    """The fields that a class itself declares; none for one that only assigns them."""
    return [n for base in cls.__mro__ for n in getattr(base, "__slots__", ())]
