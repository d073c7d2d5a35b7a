"""`loquent mic` from a sound card to the captions; the sound card is PulseAudio's virtual one."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ALSA_PLUGIN = Path("/usr/lib/x86_64-linux-gnu/alsa-lib/libasound_module_pcm_pulse.so")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("pulseaudio") is None or not ALSA_PLUGIN.exists(),
        reason="needs pulseaudio, pulseaudio-utils and libasound2-plugins (Debian's names)",
    ),
]


@pytest.fixture
def sound(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment with a sound card whose microphone hears what `paplay` plays."""
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "asoundrc").write_text(
        "</usr/share/alsa/alsa.conf>\n"
        'pcm.!default { type pulse device "speaker.monitor" '
        'hint { show on description "Monitor" } }\n'
        "ctl.!default { type pulse }\n"
    )
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
        "ALSA_CONFIG_PATH": str(tmp_path / "asoundrc"),
    }
    modules = ["module-null-sink sink_name=speaker", "module-native-protocol-unix"]
    options = [part for module in modules for part in ("-L", module)]
    with (tmp_path / "log").open("w") as log:
        daemon = subprocess.Popen(
            ["pulseaudio", "-n", "--daemonize=no", "--exit-idle-time=-1", *options],
            env=env,
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(100):
            ask = subprocess.run(["pactl", "info"], env=env, capture_output=True, check=False)
            if ask.returncode == 0:
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"PulseAudio did not start: {(tmp_path / 'log').read_text()}")
        yield env
    finally:
        daemon.terminate()
        daemon.wait(10)


def test_the_microphone_is_captioned_while_one_speaks(
    sound: dict[str, str], start: Any, bundle: str, speech: Path
) -> None:
    listed = start("mic", "--list-devices", env=sound)
    assert listed.wait() == 0
    assert "default" in listed.out
    program = start("mic", "--bundle", bundle, env=sound)
    program.wait_for("listening to default")
    subprocess.run(["paplay", "--device=speaker", speech], env=sound, check=True, timeout=30)
    program.wait_for("kiwi\n")
    # The last word is still open: hardly any pause has followed it when Ctrl-C comes.
    program.interrupt()
    assert program.wait() == 0
    # How often a held tone is heard depends on where in it the first sample lies.
    assert program.out.replace("bana bana", "bana") == "bana kiwi\nsolo\n"
    assert "Traceback" not in program.err


def test_a_microphone_that_cannot_be_opened(sound: dict[str, str], start: Any, bundle: str) -> None:
    broken = {**sound, "PULSE_SERVER": "unix:/nowhere"}
    program = start("mic", "--bundle", bundle, env=broken)
    assert program.wait() == 1
    assert "loquent: error: " in program.err
    assert "--list-devices" in program.err
    assert "Traceback" not in program.err
