"""The live page in a real browser against a real ``loquent serve``, hearing the sample clip."""

from __future__ import annotations

import difflib
import json
import math
import re
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from playwright.sync_api import Browser, Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ARTIFACTS = Path(__file__).resolve().parents[2] / "test-artifacts"
WAIT = 30_000  # ms; how long anything on the page may take before the test gives up

# Lets a test at what the page has of the browser: its audio, its microphone, its wake locks.
LAY_OPEN = """
window.AudioContext = class extends AudioContext {
  constructor(options) {
    super(options);
    window.audio = this;
  }
  createMediaStreamSource(stream) {
    window.track = stream.getAudioTracks()[0];
    return super.createMediaStreamSource(stream);
  }
};
window.AudioWorkletNode = class extends AudioWorkletNode {
  constructor(...of) {
    super(...of);
    window.packets = this.port;
  }
};
window.locks = [];
const request = WakeLock.prototype.request;
WakeLock.prototype.request = async function (kind) {
  window.locks.push(await request.call(this, kind));
  return window.locks.at(-1);
};
"""
PRESSES = """(times) => {
  for (const value of times) {
    const press = new MouseEvent("click");
    Object.defineProperty(press, "timeStamp", { value });
    document.querySelector("#record").dispatchEvent(press);
  }
}"""

Serve = Callable[..., Any]
Browse = Callable[..., AbstractContextManager[Browser]]
Transcribe = Callable[[Path], list[str]]


def check_against_recording(shown: list[str], folder: Path, transcribe: Transcribe) -> None:
    """The page has shown all that the server's only recording says."""
    (recorded,) = folder.glob("*.wav")
    assert shown
    assert shown == transcribe(recorded)


class Watched:
    """A page, and everything about it that must not happen."""

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        self.url = url
        self.complaints: list[str] = []
        self._pressed = -math.inf
        self.strangers: list[str] = []
        self.page: Page = browser.new_context(**context).new_page()
        self.page.set_default_timeout(WAIT)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._console)
        self.page.on("request", self._request)
        self.ready: list[dict[str, Any]] = []  # what servers said to connections
        self.page.on("websocket", lambda ws: ws.on("framereceived", self._frame))
        self.page.add_init_script(LAY_OPEN)
        self.page.goto(url)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _frame(self, payload: str | bytes) -> None:
        message = json.loads(payload)
        if message["type"] == "ready":
            self.ready.append(message)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, f"blob:{self.url}")):
            self.strangers.append(request.url)

    def wait(self, *states: str) -> None:
        """Until the page is in one of the states."""
        self.page.wait_for_function(
            "states => states.includes(document.body.dataset.state)", arg=list(states)
        )

    def press(self) -> None:
        """Press once: what follows within half a second would be a double click's second."""
        time.sleep(max(0.0, self._pressed + 0.6 - time.monotonic()))
        self.page.click("#record")
        self._pressed = time.monotonic()

    def press_at(self, *times: float) -> None:
        """Presses at these moments in ms, however late a busy machine lets the page know."""
        self.page.evaluate(PRESSES, list(times))

    @property
    def now(self) -> float:
        """What the page calls the present, in ms."""
        return float(self.page.evaluate("performance.now()"))

    @property
    def elapsed(self) -> float:
        """Seconds recorded."""
        return self.seconds("#elapsed")

    def seconds(self, selector: str) -> float:
        """What a <time> says to machines."""
        value = self.page.locator(selector).get_attribute("datetime")
        return float((value or "PT0S").removeprefix("PT").removesuffix("S"))

    def wait_elapsed(self, seconds: float) -> None:
        while self.elapsed < seconds:
            self.page.wait_for_timeout(100)

    @property
    def finals(self) -> list[str]:
        return self.page.locator("#log .final .text").all_inner_texts()


def test_captions_while_the_audio_plays_and_the_same_text_as_transcribe(
    serve: Serve, browse: Browse, transcribe: Transcribe, clip: Path, tmp_path: Path
) -> None:
    duration = soundfile.info(clip).duration
    server = serve("--port", "0", "--record", str(tmp_path))
    with browse() as browser:
        watched = Watched(browser, server.url, viewport={"width": 1280, "height": 800})
        page = watched.page
        watched.press()
        watched.wait("live")
        page.wait_for_selector("#live:not([hidden]) .tentative", state="attached")
        page.wait_for_function("() => document.querySelector('#live').textContent.length > 4")
        assert watched.elapsed < duration - 2, "captions came after the audio, not with it"
        page.wait_for_selector("#log .final")
        assert watched.elapsed < duration - 1, "no final came while the audio was playing"
        ARTIFACTS.mkdir(exist_ok=True)
        page.wait_for_selector("#live:not([hidden])")
        page.screenshot(path=ARTIFACTS / "live.png")

        watched.wait_elapsed(duration + 1)
        watched.press()
        watched.wait("idle")
        page.screenshot(path=ARTIFACTS / "stopped.png")
        shown = watched.finals
        assert page.locator("#live").is_hidden()
        with page.expect_download() as download:
            page.click("#download")
        lines = download.value.path().read_text(encoding="utf-8").splitlines()
        assert [re.sub(r"^\[\d+:\d\d\] ", "", line) for line in lines] == shown
        page.click("#clear")
        expect(page.get_by_text("Press Start and speak.")).to_be_visible()
        assert watched.finals == []
        assert watched.complaints == []
        assert watched.strangers == [], "the page must work offline"
    assert server.end() == 0

    (recorded,) = tmp_path.glob("*.wav")
    assert soundfile.info(recorded).samplerate == 16000
    assert soundfile.info(recorded).duration > duration
    assert shown
    assert shown == transcribe(recorded)
    # The browser resampled the clip and opened the microphone when it liked, so the frames lie
    # elsewhere than in the file: nearly the same text, not the same bits.
    alike = difflib.SequenceMatcher(None, " ".join(shown), " ".join(transcribe(clip))).ratio()
    assert alike > 0.8, f"{shown} is not what is said in the clip"


def test_a_server_that_asks_for_keys(serve: Serve, browse: Browse, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alice correct-horse-battery\n")
    (tmp_path / "keys").chmod(0o600)
    server = serve("--port", "0", "--keys-file", str(tmp_path / "keys"))
    with browse() as browser:
        watched = Watched(browser, server.url)
        watched.page.wait_for_load_state("networkidle")
        watched.press()
        watched.wait("failed")
        expect(watched.page.locator("#notice")).to_contain_text("#key=")
        watched.page.goto(f"{server.url}#key=correct-horse-battery")
        watched.page.reload()
        watched.page.wait_for_load_state("networkidle")
        watched.press()
        watched.wait("live")
        watched.page.wait_for_selector("#live:not([hidden])", state="attached")
        watched.press()
        watched.wait("idle")
        assert watched.complaints == []
    assert server.end() == 0
    assert "correct-horse" not in "".join(server.log)


def test_who_leaves_the_page_leaves_the_seat(serve: Serve, browse: Browse, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alice correct-horse-battery\n")
    (tmp_path / "keys").chmod(0o600)
    server = serve(
        *("--port", "0", "--keys-file", str(tmp_path / "keys"), "--sessions-per-key", "1")
    )
    with browse() as browser:
        watched = Watched(browser, f"{server.url}#key=correct-horse-battery")
        watched.press()
        watched.wait("live")
        watched.page.reload()
        watched.page.wait_for_load_state("networkidle")
        watched.press()
        watched.wait("live")
        # Another page is told what it waits for.
        other = Watched(browser, f"{server.url}#key=correct-horse-battery")
        other.press()
        other.wait("waiting")
        expect(other.page.get_by_role("status")).to_contain_text("Server busy")
        watched.page.reload()
        other.wait("live")
        other.press()
        other.wait("idle")
        # Nor does a session that is aborted stay behind.
        other.page.evaluate(
            """async ([url, key]) => {
              const { Session } = await import("/session.js");
              let session;
              await new Promise((ready) => {
                const listener = { state() {}, ready: () => setTimeout(ready) };
                session = new Session(url, { chunk_ms: 320 }, listener, key);
              });
              session.abort();
            }""",
            [server.url.replace("http", "ws") + "v1/stream", "correct-horse-battery"],
        )
        watched.page.wait_for_load_state("networkidle")
        watched.press()
        watched.wait("live")
        assert watched.complaints == other.complaints == []
    assert server.end() == 0


def test_a_lost_connection_is_resumed(
    serve: Serve,
    link: Callable[..., Any],
    browse: Browse,
    transcribe: Transcribe,
    tmp_path: Path,
) -> None:
    server = serve("--port", "0", "--record", str(tmp_path))
    network = link(server)
    with browse() as browser:
        watched = Watched(browser, network.url)
        page = watched.page
        watched.press()
        page.wait_for_selector("#live:not([hidden])")
        begun = page.locator("#live .text").inner_text()
        network.cut()
        watched.wait("reconnecting")
        expect(page.get_by_role("status")).to_contain_text("Reconnecting")
        expect(page.get_by_role("alert")).to_contain_text("is kept and captioned")
        ARTIFACTS.mkdir(exist_ok=True)
        page.screenshot(path=ARTIFACTS / "reconnecting.png")
        page.wait_for_timeout(1200)
        assert page.locator("#live .text").inner_text().startswith(begun.split()[0])
        network.up = True
        watched.wait("live")
        expect(page.locator("#notice")).to_be_hidden()
        for seconds in (5, 6):
            watched.wait_elapsed(seconds)
            network.cut()
            watched.wait("reconnecting")
            network.up = True
            watched.wait("live")
        watched.wait_elapsed(7.5)
        network.cut()
        watched.press()  # stopped while there is no connection: the rest comes all the same
        network.up = True
        watched.wait("idle")
        shown, stopped = watched.finals, watched.elapsed
        assert len({ready["session"] for ready in watched.ready}) == 1
        assert len(watched.ready) == 5
    assert server.end() == 0
    # One session heard every sample once, so it says what a recording of them says.
    (recorded,) = tmp_path.glob("*.wav")
    assert soundfile.info(recorded).duration == pytest.approx(stopped, abs=0.006)
    assert shown == transcribe(recorded)
    assert shown


def test_a_restarted_server_goes_on_with_the_session(
    serve: Serve, browse: Browse, transcribe: Transcribe, tmp_path: Path
) -> None:
    flags = ["--record", str(tmp_path), "--snapshots", str(tmp_path / "sessions")]
    server = serve("--port", "0", *flags)
    with browse() as browser:
        watched = Watched(browser, server.url)
        page = watched.page
        watched.press()
        page.wait_for_selector("#log .final")
        page.wait_for_selector("#live:not([hidden])")
        assert server.end() == 0
        watched.wait("reconnecting")
        server = serve("--port", server.port, *flags)
        watched.wait("live")
        watched.wait_elapsed(watched.elapsed + 2)
        watched.press()
        watched.wait("idle")
        shown = watched.finals
        first, second = watched.ready
    assert server.end() == 0
    assert first["session"] == second["session"]
    parts = [soundfile.read(file, dtype="int16")[0] for file in sorted(tmp_path.glob("*.wav"))]
    assert len(parts) == 2
    # What the first server had and had not recognised yet was sent again.
    whole = np.concatenate([parts[0][: second["resume"]["samples"]], parts[1]])
    soundfile.write(tmp_path / "whole.wav", whole, 16000, subtype="PCM_16")
    assert shown == transcribe(tmp_path / "whole.wav")
    assert len(shown) > 1


def test_a_killed_server_costs_no_words(
    serve: Serve, browse: Browse, transcribe: Transcribe, clip: Path, tmp_path: Path
) -> None:
    duration = soundfile.info(clip).duration
    server = serve("--port", "0", "--record", str(tmp_path / "first"))
    with browse() as browser:
        watched = Watched(browser, server.url)
        page = watched.page
        watched.press()
        page.wait_for_selector("#log .final")
        page.wait_for_selector("#live:not([hidden])")
        server.end(signal.SIGKILL)
        watched.wait("waiting")
        unsettled = watched.seconds("#live time")
        expect(page.get_by_role("alert")).to_contain_text("does not answer")
        settled = watched.finals
        server = serve("--port", server.port, "--record", str(tmp_path / "second"))
        watched.wait("live")
        expect(page.locator("#notice")).to_be_hidden()
        watched.wait_elapsed(duration + 1)
        watched.press()
        watched.wait("idle")
        shown, stopped = watched.finals, watched.elapsed
    server.end()
    (recorded,) = (tmp_path / "second").glob("*.wav")
    assert shown == settled + transcribe(recorded)
    # The new session heard again what had no final text yet when the old one died.
    assert soundfile.info(recorded).duration > stopped - unsettled - 0.01


def test_a_busy_server_takes_the_page_when_there_is_room(
    serve: Serve, browse: Browse, transcribe: Transcribe, clip: Path, tmp_path: Path
) -> None:
    server = serve("--port", "0", "--max-sessions", "1", "--record", str(tmp_path))
    with browse() as browser:
        first = Watched(browser, server.url)
        second = Watched(browser, server.url)
        first.press()
        first.wait("live")
        second.press()
        second.wait("waiting")
        expect(second.page.get_by_role("status")).to_contain_text("Server busy")
        first.press()
        first.wait("idle")
        second.wait("live")
        second.press()
        second.wait("idle")
        heard = [transcribe(file) for file in sorted(tmp_path.glob("*.wav"))]
        assert [first.finals, second.finals] == heard
    server.end()


def test_a_double_click_on_stop_costs_no_words(
    serve: Serve, browse: Browse, transcribe: Transcribe, tmp_path: Path
) -> None:
    server = serve("--port", "0", "--record", str(tmp_path))
    with browse() as browser:
        watched = Watched(browser, server.url)
        page = watched.page
        watched.press_at(watched.now, watched.now)  # is one press, here too
        watched.wait("live")
        watched.wait_elapsed(2.5)
        page.wait_for_selector("#live:not([hidden])")
        watched.press_at(watched.now, watched.now)
        watched.wait("idle")
        shown = watched.finals
        page.wait_for_timeout(600)
        expect(page.get_by_role("button", name="Start")).to_be_visible()  # and does not begin again
        assert watched.complaints == []
    assert server.end() == 0
    check_against_recording(shown, tmp_path, transcribe)


def test_the_rest_is_skipped_by_a_press_that_is_meant(
    serve: Serve, link: Callable[..., Any], browse: Browse
) -> None:
    server = serve("--port", "0")
    network = link(server)
    with browse() as browser:
        watched = Watched(browser, network.url)
        page = watched.page
        watched.press()
        page.wait_for_selector("#live:not([hidden])")
        network.cut()  # what the server owes does not come
        begun = watched.now
        page.focus("#record")
        for _ in range(40):  # a key held down for more than a second
            page.keyboard.down("Enter")
            page.wait_for_timeout(30)
        page.keyboard.up("Enter")
        expect(page.get_by_role("button", name="Skip the rest")).to_be_focused()
        watched.press_at(begun + 300)  # the second of a double click
        assert page.get_attribute("body", "data-state") != "idle"
        page.keyboard.press("Space")
        watched.wait("idle")
    server.end()


def test_a_microphone_that_the_browser_pauses(
    serve: Serve, browse: Browse, transcribe: Transcribe, tmp_path: Path
) -> None:
    server = serve("--port", "0", "--record", str(tmp_path))
    with browse() as browser:
        watched = Watched(browser, server.url)
        page = watched.page
        notice, status = page.get_by_role("alert"), page.get_by_role("status")

        def paused() -> None:
            watched.wait("paused")
            expect(notice).to_contain_text("has paused the microphone")
            expect(status).to_contain_text("Microphone paused")
            expect(page.locator("#sound-text")).to_have_text("Microphone paused")

        def heard() -> None:
            watched.wait("live")
            expect(notice).to_be_hidden()
            expect(status).to_contain_text("Listening")
            watched.wait_elapsed(watched.elapsed + 0.2)

        watched.press()
        watched.wait("live")
        watched.wait_elapsed(1.5)
        page.evaluate("audio.suspend()")
        paused()
        ARTIFACTS.mkdir(exist_ok=True)
        page.screenshot(path=ARTIFACTS / "paused.png")
        page.click("h1")
        heard()
        page.evaluate("audio.suspend()")
        paused()
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        heard()
        # A switch on the device: silence comes, and the track says why.
        page.evaluate(
            "Object.defineProperty(track, 'muted', { configurable: true, value: true });"
            "track.dispatchEvent(new Event('mute'))"
        )
        paused()
        watched.wait_elapsed(watched.elapsed + 0.2)
        paused()
        page.evaluate("delete track.muted; track.dispatchEvent(new Event('unmute'))")
        heard()
        page.evaluate("audio.suspend()")
        paused()
        watched.press()
        watched.wait("idle")
        expect(notice).to_be_hidden()
        shown = watched.finals
        assert len(watched.ready) == 1
        assert watched.complaints == []
    assert server.end() == 0
    check_against_recording(shown, tmp_path, transcribe)


def test_a_microphone_that_falls_silent_for_good(
    serve: Serve, browse: Browse, transcribe: Transcribe, tmp_path: Path
) -> None:
    server = serve("--port", "0", "--record", str(tmp_path))
    with browse() as browser:
        watched = Watched(browser, server.url)
        page = watched.page
        page.clock.install()
        watched.press()
        page.wait_for_selector("#live:not([hidden])")
        page.evaluate("packets.close()")  # no more, not even the last, and no event that says so
        watched.wait("paused")
        expect(page.get_by_role("alert")).to_contain_text("has paused the microphone")
        page.clock.run_for(29_000)
        watched.wait("idle")
        expect(page.get_by_role("alert")).to_contain_text("press Start to go on")
        assert len(watched.ready) == 1
        shown = watched.finals
        assert watched.complaints == []
    assert server.end() == 0
    check_against_recording(shown, tmp_path, transcribe)


def test_the_screen_stays_on_while_there_is_something_to_hear(serve: Serve, browse: Browse) -> None:
    server = serve("--port", "0")
    with browse() as browser:
        watched = Watched(browser, server.url)
        page = watched.page

        def held(count: int) -> None:
            page.wait_for_function(
                "count => locks.filter((lock) => !lock.released).length === count", arg=count
            )

        assert page.evaluate("locks.length") == 0
        watched.press()
        watched.wait("live")
        held(1)
        # What a browser does to a page that is hidden, and to one that comes back.
        page.evaluate("locks[0].release()")
        held(0)
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        held(1)
        watched.wait_elapsed(1)
        watched.press()
        watched.wait("idle")
        held(0)
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        assert page.evaluate("locks.length") == 2
        # A browser that cannot do it is not asked.
        page.evaluate("Object.defineProperty(navigator, 'wakeLock', { value: undefined })")
        watched.press()
        watched.wait("live")
        page.wait_for_selector("#live:not([hidden])", state="attached")
        watched.press()
        watched.wait("idle")
        assert watched.complaints == []
    server.end()


def test_without_a_microphone_the_page_says_what_to_do(serve: Serve, browse: Browse) -> None:
    server = serve("--port", "0")
    with browse(microphone=False) as browser:
        watched = Watched(browser, server.url)
        watched.press()
        watched.wait("failed")
        expect(watched.page.get_by_role("alert")).to_contain_text("microphone was refused")
        expect(watched.page.get_by_role("button", name="Start")).to_be_enabled()


def test_keyboard_and_screen_reader(serve: Serve, browse: Browse) -> None:
    server = serve("--port", "0")
    with browse() as browser:
        page = Watched(browser, server.url).page
        assert page.get_attribute("html", "lang") == "en"
        stops = []
        for _ in range(5):
            page.keyboard.press("Tab")
            stops.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
            # A radio button is drawn by the text beside it.
            ring = page.evaluate(
                "(focused => getComputedStyle("
                "focused.type === 'radio' ? focused.nextElementSibling : focused).outlineStyle)"
                "(document.activeElement)"
            )
            assert ring == "solid", f"focus on {stops[-1]} cannot be seen"
        assert stops == ["", "captions", "record", "chunk", "decoder"]
        # Finals go into the only log; the text that still changes lies outside it.
        log = page.get_by_role("log")
        expect(log).to_have_count(1)
        expect(log.locator("#live")).to_have_count(0)
        assert page.locator("#live").get_attribute("aria-live") is None

        page.focus("input[name=chunk]:checked")
        page.keyboard.press("ArrowLeft")
        assert page.input_value("input[name=chunk]:checked") == "160"
        page.focus("#record")
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-state=live]")
        expect(page.get_by_role("button", name="Stop")).to_be_focused()
        expect(page.get_by_role("radio", name="160")).to_be_disabled()
        page.wait_for_timeout(600)  # sooner it would be the second press of a double one
        page.keyboard.press("Space")
        page.wait_for_selector("body[data-state=idle]")
        page.reload()
        assert page.input_value("input[name=chunk]:checked") == "160", "the choice was not kept"
