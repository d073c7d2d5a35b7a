"""Clients that others publish, against a server in a process of its own: what they hear is what
``loquent transcribe`` writes down of the same file.

A client that is not installed beside Loquent is looked for in the interpreters that the variable
LOQUENT_CLIENTS_PYTHON names, separated as in PATH, and skipped if none has it.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from loquent.clients import transcribe

Serve = Callable[..., tuple[Any, str]]
SCRIPT = Path(__file__).parent / "public_clients.py"
# Client -> module that it needs, rate of the audio.
CLIENTS = {
    "deepgram": ("deepgram", 16000),
    "deepgram_utterances": ("deepgram", 16000),
    "openai_turns": ("openai", 24000),
    "openai_hands_free": ("openai", 24000),
    "openai_commit": ("openai", 24000),
    "openai_file": ("openai", 16000),
    "vosk": ("vosk", 16000),
    "livekit_deepgram": ("livekit.plugins.deepgram", 16000),
    "livekit_openai": ("livekit.plugins.openai", 24000),
    "pipecat_deepgram": ("pipecat.services.deepgram", 16000),
    "pipecat_openai": ("pipecat.services.openai", 24000),
}
SPEECH = [(0, 0.3), (1, 0.4), (2, 0.3), (0, 0.1), (3, 0.5), (4, 0.3), (0, 1.2), (5, 0.4), (7, 0.4)]
QUICK = [
    *("deepgram", "deepgram_utterances", "openai_turns", "openai_hands_free", "openai_commit"),
    *("openai_file", "vosk"),
]
REAL_TIME = ["livekit_deepgram", "livekit_openai", "pipecat_deepgram", "pipecat_openai"]


@functools.cache
def interpreter(module: str) -> str | None:
    """The first interpreter that has the module."""
    others = os.environ.get("LOQUENT_CLIENTS_PYTHON", "").split(os.pathsep)
    find = f"from importlib.util import find_spec; raise SystemExit(not find_spec({module!r}))"
    for python in [sys.executable, *filter(None, others)]:
        if not subprocess.run([python, "-c", find], capture_output=True, check=False).returncode:
            return python
    return None


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(REAL_TIME, marks=pytest.mark.slow)], ids=["quick", "real_time"]
)
def test_public_clients_hear_what_transcribe_writes(
    serve: Serve,
    english: str,
    tones: Callable[..., NDArray[np.float32]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    names: list[str],
) -> None:
    """All at once, on one server."""
    program, url = serve("--bundle", english)
    port = str(urlsplit(url).port)
    running = {}
    expected = {}
    for name in names:
        module, rate = CLIENTS[name]
        python = interpreter(module)
        if python is None or (name == "vosk" and shutil.which("ffmpeg") is None):
            continue
        path = tmp_path / f"{rate}.wav"
        soundfile.write(path, tones(SPEECH, sample_rate=rate), rate, subtype="PCM_16")
        # Deepgram's clients ask for punctuation, here or by default, and OpenAI's files have it.
        finish = ["--finish"] if "deepgram" in name or name == "openai_file" else []
        assert transcribe.main(["-q", *finish, "--bundle", english, str(path)]) == 0
        written = expected[name] = capsys.readouterr().out.split()
        plain = ["bana", "bana", "kiwi", "solo"]
        assert [word.lower().rstrip(".,?") for word in written] == plain
        assert (written == plain) != bool(finish)
        running[name] = subprocess.Popen(
            [python, SCRIPT, name, port, path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    if not running:
        pytest.skip(f"none of these clients is installed: {', '.join(names)}")
    for name, client in running.items():
        out, err = client.communicate(timeout=120)
        assert client.returncode == 0, f"{name}: {err[-3000:]}"
        assert out.split() == expected[name], name
    program.interrupt()
    assert program.wait() == 0
    assert "Traceback" not in program.err
