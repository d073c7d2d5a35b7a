"""The command line as a whole, and `loquent transcribe`, `demo` and `mic`."""

from __future__ import annotations

import json
import os
import pty
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from loquent.clients import cli, demo, mic
from loquent.engine.audio import AudioFile
from loquent.engine.errors import AudioError
from loquent.engine.recognizer import Recognizer

Float32 = NDArray[np.float32]
TEXT = "bana bana kiwi\nsolo\n"
LOQUENT = [sys.executable, "-m", "loquent.clients.cli"]
OURS = ("demo", "transcribe", "mic", "serve", "stream")


def loquent(*arguments: str, prelude: str = "pass") -> subprocess.CompletedProcess[str]:
    """Runs ``loquent`` in a process of its own; `prelude` is Python to run first."""
    code = f"import sys; {prelude}; from loquent.clients.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# The command.


def test_help_is_quick_and_loads_nothing() -> None:
    heavy = {"numpy", "onnxruntime", "soundfile", "websockets", "torch", "argparse", "asyncio"}
    report = f"import atexit; atexit.register(lambda: print({heavy} & set(sys.modules)))"
    result = loquent("--help", prelude=report)
    assert result.returncode == 0
    assert result.stdout.endswith("set()\n")
    for name in cli.COMMANDS:
        assert f"\n  {name} " in result.stdout
    assert "examples:" in result.stdout


def test_help_takes_less_than_150_ms() -> None:
    """Of CPU time, the best of five, so that a busy machine makes no difference."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        loquent("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.15


@pytest.mark.parametrize("name", OURS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: loquent {name}" in shown
    assert f"examples:\n  loquent {name}" in shown
    assert "%(" not in shown


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["fly"]) == 2
    assert "there is no command 'fly', expected one of demo, transcribe" in capsys.readouterr().err
    for arguments in (
        ["transcribe"],
        ["serve", "--port", "70000"],
        ["stream", "x", "--rate", "-1"],
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["version"], ["--version"], ["-V"]):
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out.startswith("loquent 0.")
    assert cli.main(["version", "x"]) == 2


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [("transcribe", "onnxruntime", "cpu"), ("mic", "sounddevice", "mic")],
)
def test_a_missing_extra_is_named(
    command: str, missing: str, extra: str, bundle: str, speech: Path
) -> None:
    arguments = ["--list-devices"] if command == "mic" else [str(speech), "--bundle", bundle]
    result = loquent(command, *arguments, prelude=f"sys.modules[{missing!r}] = None")
    assert result.returncode == 1
    assert f"loquent[{extra}]" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_command_whose_module_lacks_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "needy.py").write_text("import no_such_torch.nn\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cli, "COMMANDS", {"train": cli.Command("needy:main", "", "train")})
    assert cli.main(["train"]) == 1
    said = capsys.readouterr().err
    assert "`loquent train` needs no_such_torch" in said
    assert "pip install 'loquent[train]'" in said
    # A module of our own that is missing is a mistake of ours, not of the user.
    monkeypatch.setattr(cli, "COMMANDS", {"train": cli.Command("loquent.nowhere:main", "")})
    with pytest.raises(ModuleNotFoundError):
        cli.main(["train"])


def test_a_reader_that_stops_early(bundle: str, speech: Path) -> None:
    program = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "loquent.clients.cli",
            "transcribe",
            "--bundle",
            bundle,
            str(speech),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert program.stdout is not None
    program.stdout.close()
    assert program.stderr is not None
    with program.stderr as stderr:
        said = stderr.read()
    assert b"Traceback" not in said
    assert b"BrokenPipe" not in said
    assert program.wait() == 1


# transcribe


def transcribe(*arguments: object) -> int:
    return cli.main(["transcribe", *map(str, arguments)])


@pytest.mark.parametrize(
    ("name", "rate", "channels"),
    [
        ("a.wav", 16000, 1),
        ("a.wav", 8000, 1),
        ("a.wav", 44100, 2),
        ("a.wav", 96000, 1),
        ("a.flac", 22050, 2),
        ("a.ogg", 16000, 1),
        ("a.opus", 48000, 1),
        ("a.mp3", 44100, 2),
    ],
)
def test_any_file(
    tones: Callable[..., Float32],
    bundle: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    rate: int,
    channels: int,
) -> None:
    words = [
        (0, 0.3),
        (1, 0.4),
        (2, 0.3),
        (0, 0.1),
        (3, 0.5),
        (4, 0.3),
        (0, 1.2),
        (5, 0.4),
        (7, 0.4),
    ]
    pcm = np.repeat(tones(words, sample_rate=rate)[:, None], channels, axis=1)
    kind = {"format": "OGG", "subtype": "OPUS"} if name.endswith("opus") else {}
    soundfile.write(tmp_path / name, pcm, rate, **kind)
    assert transcribe(tmp_path / name, "--bundle", bundle) == 0
    assert capsys.readouterr().out == TEXT


def test_json(bundle: str, speech: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert transcribe(speech, speech, "--format", "json", "--bundle", bundle) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    result = json.loads(lines[0])
    assert list(result) == ["file", "text", "duration", "segments"]
    assert result["file"] == str(speech)
    assert result["text"] == "bana bana kiwi solo"
    assert result["duration"] == AudioFile(speech).duration == 3.9
    first, second = result["segments"]
    assert (first["text"], second["text"]) == ("bana bana kiwi", "solo")
    assert 0.2 < first["start"] < 0.5
    assert 3.0 < second["start"] < second["end"] <= 3.9
    assert [word["text"] for word in first["words"]] == ["bana", "bana", "kiwi"]
    assert all(list(word) == ["text", "start", "end", "confidence"] for word in first["words"])


def test_subtitles(bundle: str, speech: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert transcribe(speech, "--format", "srt", "--bundle", bundle) == 0
    assert capsys.readouterr().out.startswith("1\n00:00:00,")
    assert transcribe(speech, "--format", "vtt", "--bundle", bundle) == 0
    assert capsys.readouterr().out.startswith("WEBVTT\n\n00:00:00.")


def test_the_result_is_the_recognisers_own(
    bundle: str, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recognizer = Recognizer.load(bundle)
    pcm, rate = soundfile.read(speech, dtype="float32")
    for chunk_ms, right, decoder in [(40, 80, "ctc"), (1280, 0, "rnnt"), (320, None, "ctc")]:
        finals = recognizer.transcribe(
            pcm, rate, chunk_ms=chunk_ms, right_context_ms=right, decoder=decoder
        )
        assert finals
        options = ["--chunk-ms", chunk_ms, "--decoder", decoder, "--threads", 2]
        options += [] if right is None else ["--right-context-ms", right]
        assert transcribe(speech, "--bundle", bundle, *options) == 0
        assert capsys.readouterr().out == "".join(f"{final.text}\n" for final in finals)


def test_a_blank_that_nothing_beats(
    bundle: str, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transcribe(speech, "--bundle", bundle, "--blank-penalty", "-100") == 0
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit):
        transcribe(speech, "--bundle", bundle, "--lm-weight", "-1")
    assert "got '-1', expected a number, 0 or above" in capsys.readouterr().err


def test_hotwords(
    bundle: str, speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--bundle", bundle, "--decoder", "rnnt-beam"]
    texts = []
    for hotwords in ([], ["--hotword", "Mulo:10", "--hotword", "muna:10"]):
        assert transcribe(speech, *options, *hotwords) == 0
        texts.append(capsys.readouterr().out.lower())
    assert "mu" not in texts[0]
    assert "mu" in texts[1]  # so much that a little like it is it
    (tmp_path / "words.txt").write_text("BANA\n\nkiwi:0.1\n")
    assert transcribe(speech, *options, "--hotwords", tmp_path / "words.txt") == 0
    assert "bana" in capsys.readouterr().out
    assert transcribe(speech, *options, "--hotword", "xylophone") == 1
    assert "cannot spell the character 'x'" in capsys.readouterr().err
    assert transcribe(speech, *options, "--hotword", "bana:loud") == 1
    assert "expected PHRASE or PHRASE:BOOST with a number" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert transcribe(speech, *options, "--hotwords", tmp_path / "latin.txt") == 1
    assert "got a file that is not UTF-8" in capsys.readouterr().err


def test_bad_files_are_named_and_the_others_still_run(
    bundle: str, speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.wav").write_text("no audio\n" * 100)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    bad = [
        tmp_path / name
        for name in ("empty.wav", "text.wav", "none.wav", "nan.wav", "missing.wav", "folder")
    ]
    assert transcribe(speech, *bad, speech, "--bundle", bundle) == 1
    result = capsys.readouterr()
    assert result.out == f"==> {speech} <==\n{TEXT}" * 2
    errors = result.err.splitlines()
    assert len(errors) == len(bad)
    for error, path, said in zip(
        errors,
        bad,
        ["empty", "cannot be read", "no samples", "NaN", "No such file", "a folder"],
        strict=True,
    ):
        assert error.startswith(f"loquent: error: {path}: ")
        assert said in error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--chunk-ms", "50"], "320"),
        (["--right-context-ms", "50"], "got right_context_ms 50, expected one of 0, 40, 80"),
        (["--bundle", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_options(
    bundle: str,
    speech: Path,
    capsys: pytest.CaptureFixture[str],
    options: Sequence[str],
    said: str,
) -> None:
    assert transcribe(speech, "--bundle", bundle, *options) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("quiet", [False, True])
def test_the_progress_bar_is_for_terminals(bundle: str, speech: Path, quiet: bool) -> None:
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                shown.extend(os.read(ours, 1024))
            except OSError:
                return

    reader = threading.Thread(target=read)
    reader.start()
    arguments = ["transcribe", str(speech), "--bundle", bundle, *(["--quiet"] if quiet else [])]
    result = subprocess.run(
        [*LOQUENT, *arguments],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
        timeout=60,
        check=True,
    )
    os.close(theirs)
    reader.join(10)
    os.close(ours)
    assert result.stdout.decode() == TEXT
    assert (b"x real time" in shown) is not quiet
    assert quiet or shown.endswith(b"\r\x1b[K")


def test_ctrl_c(bundle: str, tones: Callable[..., Float32], tmp_path: Path, start: Any) -> None:
    path = tmp_path / "long.wav"
    soundfile.write(path, np.tile(tones([(1, 0.3), (2, 0.3)]), 3000), 16000)
    good = tmp_path / "good.wav"
    soundfile.write(good, tones([(1, 0.3)]), 16000)
    program = start("transcribe", str(good), str(path), "--bundle", bundle, "--chunk-ms", "40")
    program.wait_for("==> ")
    program.interrupt()
    assert program.wait() == 130
    assert "Traceback" not in program.err
    assert "stopped" in program.err


# demo


class Clock:
    """Time that passes only when someone sleeps or works."""

    def __init__(self) -> None:
        self.now = 5.0

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_blocks_come_no_sooner_than_from_a_microphone() -> None:
    clock = Clock()
    blocks = [np.zeros(n, np.float32) for n in (10, 30, 20)]
    taken = []
    for block in demo.paced(blocks, 100, clock=clock.read, sleep=clock.sleep):
        taken.append((len(block), round(clock.now - 5.0, 6)))
        clock.now += 0.25  # what recognising takes; the next block does not have to wait for it
    assert taken == [(10, 0.1), (30, 0.4), (20, 0.65)]


@pytest.mark.slow
def test_the_demo_takes_as_long_as_its_clips_and_says_how_to_go_on(bundle: str, start: Any) -> None:
    program = start("demo", "--bundle", bundle)
    program.wait_for("morning.flac", timeout=30)
    assert "bana" not in program.out
    program.wait_for("bana", timeout=30)
    assert "loquent serve" not in program.out, "captions come before the clip is over"
    assert program.wait(timeout=60) == 0
    assert "http://127.0.0.1:8765/" in program.out
    assert "loquent mic" in program.out
    assert "Traceback" not in program.err


def test_ctrl_c_in_the_demo(bundle: str, start: Any) -> None:
    program = start("demo", "--bundle", bundle)
    program.wait_for("morning.flac")
    program.interrupt()
    assert program.wait() == 130
    assert "Traceback" not in program.err


# mic; there is no sound card in a test, so everything up to it and behind it


def test_packets_arrive_in_order_and_complete() -> None:
    sounddevice = mic.load_sounddevice()
    packets = mic.Packets(1000)
    stopped = threading.Event()
    buffer = np.zeros((100, 1), np.float32)

    def sound_card() -> None:
        for number in range(50):
            buffer[:] = number  # the sound card writes into the same memory again and again
            packets.callback(buffer, 100, None, sounddevice.CallbackFlags())
        stopped.set()

    thread = threading.Thread(target=sound_card)
    thread.start()
    heard = np.concatenate(list(packets.blocks(stopped.is_set)))
    thread.join()
    assert heard.tolist() == [float(n // 100) for n in range(5000)]
    assert packets.behind == 0


def test_a_microphone_that_goes_on_after_ctrl_c() -> None:
    flags = mic.load_sounddevice().CallbackFlags()
    packets = mic.Packets(1000)
    heard: list[float] = []
    for number in range(3):
        packets.callback(np.full((10, 1), number, np.float32), 10, None, flags)
    for block in packets.blocks(lambda: len(heard) >= 1):
        heard.append(block[0])
        packets.callback(np.full((10, 1), 99, np.float32), 10, None, flags)
    assert heard == [0, 1, 2, 99]  # one packet had come before the stop, the others after it


def test_lost_audio_and_a_slow_machine_are_told() -> None:
    sounddevice = mic.load_sounddevice()
    told: list[str] = []
    packets = mic.Packets(1000, warn=told.append)
    flags = sounddevice.CallbackFlags(0x2)  # paInputOverflow
    packets.callback(np.zeros((100, 1), np.float32), 100, None, flags)
    packets.callback(np.zeros((4000, 1), np.float32), 4000, None, sounddevice.CallbackFlags())
    blocks = packets.blocks(lambda: False)
    next(blocks)
    assert len(told) == 2
    assert "lost some audio" in told[0]
    assert "4 s behind" in told[1]
    packets.callback(np.zeros((70000, 1), np.float32), 70000, None, sounddevice.CallbackFlags())
    with pytest.raises(AudioError, match=r"70 s behind.*too slow"):
        next(blocks)
    assert len(told) == 2


def test_a_microphone_that_is_not_there() -> None:
    with pytest.raises(AudioError, match=r"no-such-microphone.*--list-devices"):
        mic.find_device(mic.load_sounddevice(), "no-such-microphone")
    with pytest.raises(AudioError, match=r"999.*--list-devices"):
        mic.find_device(mic.load_sounddevice(), "999")


def test_the_list_of_microphones() -> None:
    devices = [
        {"name": "speakers", "max_input_channels": 0, "default_samplerate": 44100.0},
        {"name": "USB", "max_input_channels": 1, "default_samplerate": 48000.0},
    ]
    assert mic.device_lines(devices) == ["  1  USB  (1 channels, 48000 Hz)"]
    assert mic.device_lines(devices[:1]) == ["no microphone was found"]
    assert loquent("mic", "--list-devices").returncode == 0
