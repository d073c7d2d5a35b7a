"""Which protocol a WebSocket request asks for."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Literal

from loquent.engine.protocol import PATH, SUBPROTOCOL
from loquent.engine.wire.deepgram import DeepgramSession
from loquent.engine.wire.native import NativeSession
from loquent.engine.wire.openai import OpenAiSession
from loquent.engine.wire.session import Context, Factory, Handshake, Refused, WireSession
from loquent.engine.wire.sherpa import SherpaSession
from loquent.engine.wire.vosk import VoskSession

# What a WebSocket at / means: clients of Vosk and of sherpa-onnx both go there and cannot be told
# apart before they have sent audio.
Bare = Literal["vosk", "sherpa"]

PROTOCOLS: Mapping[str, Factory] = {
    PATH: NativeSession,
    "/vosk": VoskSession,
    "/sherpa": SherpaSession,
    "/v1/listen": DeepgramSession,
    "/v1/realtime": OpenAiSession,
}


def is_wire(path: str) -> bool:
    """Whether a WebSocket may be opened at this path."""
    return path in PROTOCOLS or path == "/"


def open_session(handshake: Handshake, context: Context, *, bare: Bare = "vosk") -> WireSession:
    """The session that the request asks for. Raises Refused."""
    path = handshake.path
    if path == "/":
        path = PATH if SUBPROTOCOL in handshake.subprotocols else f"/{bare}"
    factory = PROTOCOLS.get(path)
    if factory is None:
        raise Refused(
            HTTPStatus.NOT_FOUND,
            f"There is no WebSocket at {handshake.path}; there is at {', '.join(PROTOCOLS)}.",
        )
    return factory(handshake, context)
