"""Where `loquent transcribe -o` writes, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from loquent.clients import cli

Float32 = NDArray[np.float32]
TEXT = "bana bana kiwi\nsolo\n"
LOQUENT = [sys.executable, "-m", "loquent.clients.cli"]


def transcribe(*arguments: object) -> int:
    return cli.main(["transcribe", *map(str, arguments)])


def test_output_to_a_file_and_to_a_folder(
    bundle: str, speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.flac"
    soundfile.write(other, soundfile.read(speech)[0], 16000)
    assert transcribe(speech, "-o", tmp_path / "out.txt", "--bundle", bundle) == 0
    assert (tmp_path / "out.txt").read_text() == TEXT
    folder = tmp_path / "new" / "folder"
    options = ["--format", "srt", "-o", f"{folder}/", "--bundle", bundle]
    assert transcribe(speech, other, *options) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["other.srt", "speech.srt"]
    assert transcribe(speech, tmp_path / "speech.mp3", *options) == 2
    assert "same file" in capsys.readouterr().err
    assert transcribe(speech, other, "--format", "vtt", "--bundle", bundle) == 2
    assert "-o FOLDER/" in capsys.readouterr().err
    assert transcribe(speech, "-o", tmp_path / "no" / "such" / "x", "--bundle", bundle) == 1
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["missing", "no audio"])
def test_an_output_is_as_it_was_when_nothing_was_heard(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = tmp_path / "out.txt"
    out.write_text("the notes of last week\n")
    if kind == "no audio":
        (tmp_path / "talk.wav").write_text("no audio\n")
    before = sorted(tmp_path.iterdir())
    assert transcribe(tmp_path / "talk.wav", "-o", out, "--bundle", bundle) == 1
    assert "talk.wav" in capsys.readouterr().err
    assert out.read_text() == "the notes of last week\n"
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_never_destroys_a_recording(
    bundle: str,
    speech: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    recording = speech.read_bytes()
    for name in ("talk.wav", "other.wav", "notes.txt"):
        Path(name).write_bytes(recording)
    Path("link.wav").symlink_to("talk.wav")
    Path("hard.wav").hardlink_to("talk.wav")
    Path("talk.srt").write_text("1\n")
    for arguments, said in (
        (["talk.wav", "-o", "talk.wav"], "talk.wav is the same file as the recording talk.wav"),
        (["other.wav", "./talk.wav", "-o", "link.wav"], "the recording ./talk.wav"),
        (["hard.wav", "-o", "talk.wav"], "the recording hard.wav"),
        (["notes.txt", "-o", "."], "notes.txt is the same file"),  # it is audio, whatever its name
        (["talk.srt", "-o", "talk.wav"], "talk.wav is there already and is no text"),  # swapped
        (["other.wav", "-o", "notes.txt"], "is no text (a recording?)"),
    ):
        before = {path: path.read_bytes() for path in Path().iterdir()}
        assert transcribe(*arguments, "--bundle", bundle) == 2
        assert said in capsys.readouterr().err
        assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_an_output_is_replaced_as_a_whole(bundle: str, speech: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    real = place / "real.txt"
    real.write_text("old and much longer than what comes\n" * 10)
    real.chmod(0o640)
    (tmp_path / "out.txt").symlink_to(real)
    assert transcribe(speech, "-o", tmp_path / "out.txt", "--bundle", bundle) == 0
    assert (tmp_path / "out.txt").is_symlink()
    assert real.read_text() == TEXT
    assert real.stat().st_mode & 0o777 == 0o640
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(16000), 16000)
    assert transcribe(silent, "-o", real, "--bundle", bundle) == 0
    assert real.read_text() == ""  # nothing was said, which is a result
    bad = tmp_path / "missing.wav"
    assert transcribe(bad, speech, bad, "-o", real, "--bundle", bundle) == 1
    assert real.read_text() == f"==> {speech} <==\n{TEXT}"
    assert list(place.iterdir()) == [real]


def test_an_interrupted_run_keeps_the_old_output_and_the_new_text(
    bundle: str, speech: Path, tones: Callable[..., Float32], tmp_path: Path, start: Any
) -> None:
    long = tmp_path / "long.wav"
    soundfile.write(long, np.tile(tones([(1, 0.3), (2, 0.3)]), 3000), 16000)
    out = tmp_path / "out.txt"
    out.write_text("old\n")
    for number in (1, 2):  # what is left of one run is safe from the next
        options = ["-o", str(out), "--bundle", bundle, "--chunk-ms", "40"]
        program = start("transcribe", str(speech), str(long), *options)
        kept = tmp_path / f"out.txt.{number}.part"
        until = time.monotonic() + 60
        while not (kept.exists() and kept.stat().st_size):
            assert time.monotonic() < until
            time.sleep(0.05)
        program.interrupt()
        assert program.wait() == 130
        assert f"what was done so far is in {kept}" in program.err
        assert out.read_text() == "old\n"
        assert kept.read_text() == f"==> {speech} <==\n{TEXT}"


def test_output_to_pipes(bundle: str, speech: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()
    assert transcribe(speech, "-o", pipe, "--bundle", bundle) == 0
    reader.join(10)
    assert heard == [TEXT]
    assert pipe.is_fifo()
    # stdout may be a pipe or a file that holds something already.
    arguments = ["transcribe", str(speech), "-o", "/dev/stdout", "--bundle", bundle]
    printed = subprocess.run(
        [*LOQUENT, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    assert printed.stdout == TEXT
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    with log.open("a") as file:
        subprocess.run([*LOQUENT, *arguments], stdout=file, timeout=60, check=True)
        file.write("after\n")
    assert log.read_text() == f"before\n{TEXT}after\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "pipe"]
