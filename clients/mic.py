"""``loquent mic``: live captions of the microphone."""

from __future__ import annotations

import argparse
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from loquent.clients.live import MAX_RATE, MIN_RATE, Float32, recognise
from loquent.clients.options import (
    add_decoder_options,
    add_model_options,
    add_session_options,
    load_recognizer,
    make_parser,
    open_stream,
)
from loquent.clients.terminal import Captions
from loquent.engine.errors import AudioError, MissingExtra

EXAMPLES = """\
  loquent mic
  loquent mic --list-devices
  loquent mic --device 3 --chunk-ms 160
  loquent mic > notes.txt                 only the finished sentences, one a line"""

# Audio waiting to be recognised, in seconds: from the first on we warn, at the second we give up.
BEHIND, TOO_FAR_BEHIND = 3.0, 60.0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = make_parser(
        "mic", "Caption what the microphone hears. Ctrl-C ends it, with the last words.", EXAMPLES
    )
    parser.add_argument(
        "--device", metavar="ID|NAME", help="the microphone (default: the system's)"
    )
    parser.add_argument("--list-devices", action="store_true", help="show the microphones and stop")
    add_model_options(parser)
    add_decoder_options(parser)
    add_session_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options = parser().parse_args(argv)
    sounddevice = load_sounddevice()
    if options.list_devices:
        for line in device_lines(sounddevice.query_devices()):
            print(line)
        return 0
    device = find_device(sounddevice, options.device)
    rate = int(device["default_samplerate"])
    if not MIN_RATE <= rate <= MAX_RATE:
        rate = MAX_RATE
    recognizer = load_recognizer(options)
    stream = open_stream(recognizer, options, rate)
    captions = Captions(sys.stdout)
    packets = Packets(rate)
    stop = threading.Event()

    def stop_once(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C means it

    signal.signal(signal.SIGINT, stop_once)
    try:
        with sounddevice.InputStream(
            device=device["index"],
            samplerate=rate,
            channels=1,
            dtype="float32",
            callback=packets.callback,
        ):
            print(f"loquent: listening to {device['name']} (Ctrl-C to stop)", file=sys.stderr)
            for event in recognise(recognizer, stream, packets.blocks(stop.is_set)):
                captions.show(event)
    except sounddevice.PortAudioError as exc:
        raise AudioError(
            f"the microphone {device['name']!r} cannot be opened ({exc}); "
            "see `loquent mic --list-devices`"
        ) from exc
    finally:
        captions.close()
    return 0


class Packets:
    """What the sound card's thread puts in and the recogniser takes out, in order."""

    def __init__(self, rate: int, warn: Callable[[str], None] | None = None) -> None:
        self._rate = rate
        self._queue: queue.SimpleQueue[Float32] = queue.SimpleQueue()
        self._lost = threading.Event()
        self._put = self._taken = 0  # samples; each is written by one thread only
        self._warn = warn or (lambda text: print(f"loquent: {text}", file=sys.stderr))
        self._warned = False

    def callback(self, data: Float32, frames: int, time: object, status: Any) -> None:
        """Called by the sound card's thread with (frames, 1) samples, which it will reuse."""
        if status.input_overflow:
            self._lost.set()
        self._queue.put(np.array(data[:, 0]))
        self._put += frames

    @property
    def behind(self) -> float:
        """Seconds of audio that wait."""
        return (self._put - self._taken) / self._rate

    def blocks(self, stopped: Callable[[], bool]) -> Iterator[Float32]:
        """The packets, up to those that were there when `stopped` became true."""
        end: int | None = None  # samples; the sound card goes on after that
        while end is None or self._taken < end:
            if end is None and stopped():
                end = self._put
                continue
            try:
                block = self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
            self._taken += len(block)
            self._complain()
            yield block

    def _complain(self) -> None:
        if self._lost.is_set():
            self._lost.clear()
            self._warn("the sound card lost some audio; is the machine very busy?")
        if self.behind > TOO_FAR_BEHIND:
            raise AudioError(
                f"{self.behind:.0f} s behind the microphone: this machine is too slow for these "
                "settings; try --chunk-ms 1280 or --decoder ctc"
            )
        if self.behind > BEHIND and not self._warned:
            self._warned = True
            self._warn(f"{self.behind:.0f} s behind the microphone; a larger --chunk-ms is cheaper")


def load_sounddevice() -> Any:
    """The sounddevice module. Raises MissingExtra where it or its PortAudio is missing."""
    try:
        import sounddevice
    except ImportError as exc:
        raise MissingExtra(
            "the microphone needs sounddevice, which is not installed: pip install 'loquent[mic]'"
        ) from exc
    except OSError as exc:  # the module is there, its C library is not
        raise MissingExtra(
            f"the microphone needs the PortAudio library ({exc}); install it, "
            "for example with: sudo apt install libportaudio2"
        ) from exc
    return sounddevice


def find_device(sounddevice: Any, wanted: str | None) -> dict[str, Any]:
    """The microphone that the user means: a number, a part of its name, None for the default.

    Raises AudioError.
    """
    key: int | str | None = int(wanted) if wanted is not None and wanted.isdecimal() else wanted
    try:
        device: dict[str, Any] = sounddevice.query_devices(key, "input")
    except (ValueError, sounddevice.PortAudioError) as exc:
        name = "no microphone was found" if wanted is None else f"there is no microphone {wanted!r}"
        raise AudioError(f"{name} ({exc}); see `loquent mic --list-devices`") from exc
    return device


def device_lines(devices: Sequence[dict[str, Any]]) -> list[str]:
    """What --list-devices prints."""
    lines = [
        f"{number:>3}  {device['name']}  ({device['max_input_channels']} channels, "
        f"{device['default_samplerate']:g} Hz)"
        for number, device in enumerate(devices)
        if device["max_input_channels"] > 0
    ]
    return lines or ["no microphone was found"]
