"""The bundle that hears tones, recordings of tones, and a server in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

SPEECH = [(0, 0.3), (1, 0.4), (2, 0.3), (0, 0.1), (3, 0.5), (4, 0.3), (0, 1.2), (5, 0.4), (7, 0.4)]
TEXT = "bana bana kiwi\nsolo\n"


def _tiny() -> Any:
    path = Path(__file__).parent.parent / "engine" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tones() -> Callable[..., Float32]:
    """Audio of (token, seconds) pairs."""
    return _tiny().tones  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def english(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same bundle under the language that most clients ask for."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["languages"] = {"en": "default"}

    return str(_tiny().write_bundle(tmp_path_factory.mktemp("bundles") / "en", change=change))


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a bundle that hears tones."""
    return str(_tiny().write_bundle(tmp_path_factory.mktemp("bundles") / "tiny"))


@pytest.fixture(scope="session")
def speech(tones: Callable[..., Float32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording in which the tiny bundle hears TEXT."""
    path = tmp_path_factory.mktemp("audio") / "speech.wav"
    soundfile.write(path, tones(SPEECH), 16000)
    return path


class Program:
    """A running ``loquent``; its output is kept, and it does not outlive the test."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "loquent.clients.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **env, "PYTHONUNBUFFERED": "1"},
        )
        self.out = ""
        self.err = ""
        self._news = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(name,)) for name in ("out", "err")
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        pipe = self.process.stdout if name == "out" else self.process.stderr
        assert pipe is not None
        for line in pipe:
            with self._news:
                setattr(self, name, getattr(self, name) + line.decode())
                self._news.notify_all()

    def wait_for(self, text: str, *, timeout: float = 60) -> None:
        """Until `text` was printed, to stdout or stderr."""
        with self._news:
            found = self._news.wait_for(lambda: text in self.out + self.err, timeout)
        assert found, f"{text!r} did not come in {timeout} s, but {self.out}{self.err}"

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def wait(self, *, timeout: float = 60) -> int:
        """Exit status, once all the output is in."""
        status = self.process.wait(timeout)
        for reader in self._readers:
            reader.join(timeout)
        return status

    def close(self) -> None:
        """End it if it still runs."""
        self.process.kill()
        self.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


Start = Callable[..., Program]


@pytest.fixture
def start() -> Iterator[Start]:
    """Runs ``loquent`` with these arguments in the background."""
    with contextlib.ExitStack() as stack:

        def run(*arguments: str, env: Mapping[str, str] | None = None) -> Program:
            program = Program(arguments, env or {})
            stack.callback(program.close)
            return program

        yield run


@pytest.fixture
def serve(start: Start, bundle: str) -> Callable[..., tuple[Program, str]]:
    """Starts ``loquent serve`` with the tiny bundle; gives it and the address of its WebSocket."""

    def run(*arguments: str) -> tuple[Program, str]:
        program = start("serve", "--port", "0", "--bundle", bundle, *arguments)
        program.wait_for("Ctrl-C")
        address = next(line for line in program.err.splitlines() if "ws://" in line)
        return program, address.split()[-1]

    return run
