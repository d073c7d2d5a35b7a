"""What the README shows is what works."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
import soundfile

from loquent.clients.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_commands_are_those_that_exist() -> None:
    shown = re.findall(r"^\| `loquent ([a-z]+(?: [a-z]+)?)", README, re.MULTILINE)
    assert sorted(shown) == sorted(COMMANDS)


def test_extras_are_those_that_exist() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shown = {name for names in re.findall(r"\.\[([\w,]+)\]", README) for name in names.split(",")}
    assert shown <= set(pyproject["project"]["optional-dependencies"])
    assert {"cpu", "mic", "train", "export", "dev"} <= shown


def test_continuous_integration_installs_what_the_readme_says() -> None:
    installs = re.compile(r"pip\"? install (?:-q )?(-e '\.\[[\w,]+\]')")
    in_readme, in_ci = (
        installs.findall(text) for text in (README, (ROOT / ".ci" / "run").read_text())
    )
    assert in_readme == in_ci
    assert len(in_ci) == 1


@pytest.mark.parametrize("link", re.findall(r"\]\(([^):]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_python_example_captions_a_file(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    with (files("loquent.engine") / "samples" / "morning.flac").open("rb") as clip:
        samples, rate = soundfile.read(clip, dtype="int16")
    soundfile.write(tmp_path / "talk.wav", samples, rate)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the" in done.stdout
