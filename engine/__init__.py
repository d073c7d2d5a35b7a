"""Loquent's engine: from samples to captions, without torch.

Names are imported on first use, so that ``import loquent.engine`` costs next to nothing and needs
no ONNX Runtime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loquent.engine.audio import AudioFile, load_audio
    from loquent.engine.bundle import Bundle
    from loquent.engine.endpoint import EndpointRules
    from loquent.engine.errors import (
        AudioError,
        BufferFull,
        BundleError,
        ConfigError,
        LoquentError,
        MissingExtra,
        ProtocolError,
        StreamClosed,
    )
    from loquent.engine.events import Ended, Event, Final, Finalized, Partial, Word
    from loquent.engine.features import Fbank, FeatureSpec
    from loquent.engine.hotwords import Hotword
    from loquent.engine.recognizer import Recognizer
    from loquent.engine.stream import Stream

__all__ = [
    "AudioError",
    "AudioFile",
    "BufferFull",
    "Bundle",
    "BundleError",
    "ConfigError",
    "Ended",
    "EndpointRules",
    "Event",
    "Fbank",
    "FeatureSpec",
    "Final",
    "Finalized",
    "Hotword",
    "LoquentError",
    "MissingExtra",
    "Partial",
    "ProtocolError",
    "Recognizer",
    "Stream",
    "StreamClosed",
    "Word",
    "load_audio",
]

_MODULES = {
    "audio": ("AudioFile", "load_audio"),
    "bundle": ("Bundle",),
    "endpoint": ("EndpointRules",),
    "errors": (
        "AudioError",
        "BufferFull",
        "BundleError",
        "ConfigError",
        "LoquentError",
        "MissingExtra",
        "ProtocolError",
        "StreamClosed",
    ),
    "events": ("Ended", "Event", "Final", "Finalized", "Partial", "Word"),
    "features": ("Fbank", "FeatureSpec"),
    "hotwords": ("Hotword",),
    "recognizer": ("Recognizer",),
    "stream": ("Stream",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
