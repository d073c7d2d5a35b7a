"""A real server, a real browser, and a microphone that plays a file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path

import pytest
import soundfile
from playwright.sync_api import Browser, Playwright, sync_playwright

LOQUENT = Path(sys.executable).with_name("loquent")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Serving:
    """A running ``loquent serve``."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [str(LOQUENT), "serve", *options], stderr=subprocess.PIPE, text=True
        )
        self.log: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if line.startswith("page "):
                self.url = line.split()[1]
                break
        else:
            pytest.fail("loquent serve did not start:\n" + "".join(self.log))
        # Somebody has to read what it says, or it would stop at a full pipe.
        self._reader = threading.Thread(target=self.log.extend, args=[self.process.stderr])
        self._reader.start()

    @property
    def port(self) -> str:
        return self.url.rstrip("/").rpartition(":")[2]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(timeout=30)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


class Link:
    """The network between a browser and a server, which breaks when it is told to."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self.up = True
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            self._ends.append(here)
            if not self.up:
                here.close()
                continue
            there = socket.create_connection(self._target)
            self._ends.append(there)
            for ends in ((here, there), (there, here)):
                self._threads.append(threading.Thread(target=self._copy, args=ends))
                self._threads[-1].start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break all connections; no new ones come through until `up` is set."""
        self.up = False
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()


@pytest.fixture
def link() -> Iterator[Callable[[Serving], Link]]:
    """Puts a `Link` before a server."""
    with contextlib.ExitStack() as stack:

        def make(server: Serving) -> Link:
            link = Link(int(server.port))
            stack.callback(link.close)
            return link

        yield make


@pytest.fixture(scope="session")
def bundle() -> str:
    return "en"


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled sample as a wav file, which is what the browser's fake microphone plays.

    LOQUENT_TEST_CLIP names another recording (ten seconds or so, with a pause in the middle).
    """
    path = tmp_path_factory.mktemp("clip") / "clip.wav"
    sample = files("loquent.engine") / "samples" / "morning.flac"
    samples, rate = soundfile.read(os.environ.get("LOQUENT_TEST_CLIP", str(sample)), dtype="int16")
    soundfile.write(path, samples, rate, subtype="PCM_16")
    return path


@pytest.fixture
def serve(bundle: str) -> Iterator[Callable[..., Serving]]:
    """Starts servers with the options given; ends those that still run."""
    running: list[Serving] = []

    def start(*options: str) -> Serving:
        running.append(Serving("--bundle", bundle, *options))
        return running[-1]

    yield start
    for server in running:
        if server.process.poll() is None:
            server.end()


@pytest.fixture(scope="session")
def transcribe(bundle: str) -> Callable[[Path], list[str]]:
    """What ``loquent transcribe`` writes down for a file, one string a segment."""

    def run(file: Path) -> list[str]:
        command = [str(LOQUENT), "transcribe", "--bundle", bundle, "--format", "json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [segment["text"] for segment in json.loads(done.stdout)["segments"]]

    return run


# Not for the whole session: while it is open an event loop counts as running, which the asyncio
# tests of other modules would trip over.
@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="session")
def chromium() -> str:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("needs chromium on the PATH (Debian: apt-get install chromium)")
    return path


@pytest.fixture
def browse(
    playwright: Playwright, chromium: str, clip: Path
) -> Callable[..., AbstractContextManager[Browser]]:
    """Opens a browser whose microphone plays the clip once and is silent after it."""

    @contextlib.contextmanager
    def open_browser(*, microphone: bool = True) -> Iterator[Browser]:
        flags = [*FLAGS, "--use-fake-device-for-media-stream"]
        if microphone:
            flags.append("--use-fake-ui-for-media-stream")  # grants without asking
            flags.append(f"--use-file-for-fake-audio-capture={clip}%noloop")
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        try:
            yield browser
        finally:
            browser.close()

    return open_browser
