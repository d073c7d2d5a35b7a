"""A real server, a real browser, and a microphone that plays a file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
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
