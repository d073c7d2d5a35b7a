"""What is said on the wire, message by message, against recorded conversations.

In ``golden/*.txt`` a line is a message: ``>`` the client's, ``<`` the server's, ``x`` the close.
``> audio 0.5`` stands for so many seconds of the speech in ``conftest.py``. Ids, times and scores
are starred out: what they are is tested elsewhere, and better models may change them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loquent.engine.wire.deepgram import DeepgramSession
from loquent.engine.wire.openai import OpenAiSession
from loquent.engine.wire.session import Close
from loquent.engine.wire.sherpa import SherpaSession
from loquent.engine.wire.vosk import VoskSession

GOLDEN = Path(__file__).parent / "golden"
MASKED = {
    *("conf", "confidence", "start", "end", "start_time", "timestamps", "timestamp", "duration"),
    *("last_word_end", "audio_start_ms", "audio_end_ms", "seconds", "sha256", "logprob"),
    *("request_id", "model_uuid", "event_id", "item_id", "previous_item_id", "id"),
}
LISTEN = "/v1/listen?encoding=linear16&sample_rate=16000"
# File -> session, address, rate of the audio.
CONVERSATIONS: dict[str, tuple[Any, str, int]] = {
    "vosk": (VoskSession, "/vosk", 16000),
    "vosk_alternatives": (VoskSession, "/", 8000),
    "sherpa": (SherpaSession, "/sherpa", 16000),
    "deepgram": (
        DeepgramSession,
        f"{LISTEN}&interim_results=true&vad_events=true&utterance_end_ms=1000&punctuate=true&x=y",
        16000,
    ),
    "deepgram_finals": (DeepgramSession, LISTEN, 16000),
    "deepgram_utterances": (
        DeepgramSession,
        f"{LISTEN}&interim_results=true&utterance_end_ms=1000&endpointing=false",
        16000,
    ),
    "openai_turns": (OpenAiSession, "/v1/realtime?intent=transcription", 24000),
    "openai_commits": (OpenAiSession, "/v1/realtime?model=gpt-4o-transcribe", 24000),
    "openai_hands_free": (OpenAiSession, "/v1/realtime?intent=transcription", 24000),
    "openai_beta": (OpenAiSession, "/v1/realtime?intent=transcription", 24000),
}


def mask(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "*" if k in MASKED and v is not None else mask(v) for k, v in value.items()}
    return [mask(item) for item in value] if isinstance(value, list) else value


def line(message: Any) -> str:
    if isinstance(message, Close):
        return f"x {message.code} {message.reason}".rstrip()
    return "< " + (json.dumps(mask(message)) if isinstance(message, dict) else message)


def replay(script: list[str], talk: Any, name: str, audio: bytes) -> list[str]:
    """The conversation that the client's lines of a script lead to."""
    kind, target, rate = CONVERSATIONS[name]
    headers = {"openai-beta": "realtime=v1"} if name == "openai_beta" else {}
    conversation = talk(kind, target, headers)
    lines = [line(message) for message in conversation.sent]
    for said in [entry for entry in script if entry.startswith(">")]:
        text = said[2:]
        message: str | bytes = text
        if text.startswith("audio "):
            size = 2 * round(float(text.split()[1]) * rate)
            message, audio = audio[:size], audio[size:]
            if kind is SherpaSession:
                message = (np.frombuffer(message, "<i2") / 32768).astype("<f4").tobytes()
            if kind is OpenAiSession:
                data = base64.b64encode(message).decode()
                message = json.dumps({"type": "input_audio_buffer.append", "audio": data})
        lines += [said, *map(line, conversation.say(message))]
    if conversation.close is not None:
        lines.append(line(conversation.close))
    return lines


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation(talk: Any, s16: Callable[[int], bytes], name: str) -> None:
    script = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert replay(script, talk, name, s16(CONVERSATIONS[name][2])) == script
