"""What `clients/deploy` ships fits the command, the tree and systemd."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from loquent.clients import probe
from loquent.clients.config import resolve
from loquent.clients.serve import parser

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = Path(str(files("loquent.clients"))) / "deploy"


def test_the_example_configuration_is_one(tmp_path: Path) -> None:
    text = (DEPLOY / "loquent.toml").read_text()
    found = resolve(parser(), ["--config", str(DEPLOY / "loquent.toml")], {})
    assert found.sessions_per_address == 16
    # What is commented out is allowed too, and those that have a default show it.
    shown = re.sub(r"^#(?=[\w-]+ = )", "", text, flags=re.MULTILINE)
    (tmp_path / "all.toml").write_text(shown)
    everything = resolve(parser(), ["--config", str(tmp_path / "all.toml")], {})
    defaults = parser().parse_args([])
    for name in ("host", "port", "workers", "bundle", "device", "start_timeout", "idle_timeout"):
        assert getattr(everything, name) == getattr(defaults, name)
    assert everything.max_speed == defaults.max_speed
    assert everything.messages_per_second == defaults.messages_per_second


def test_the_limits_in_the_readme_are_the_defaults() -> None:
    defaults = vars(parser().parse_args([]))
    table = (DEPLOY / "README.md").read_text()
    for option in ("session-seconds", "start-timeout", "idle-timeout", "max-speed", "max-sessions"):
        (shown,) = re.findall(rf"^\| `--{option}` \| (\d+)", table, re.MULTILINE)
        assert float(shown) == defaults[option.replace("-", "_")], option


def test_the_image_copies_what_is_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    sources = [
        name
        for line in re.findall(r"^COPY (?!--)(.*)", text, re.MULTILINE)
        for name in line.split()
    ]
    assert {"engine", "clients", "pyproject.toml"} <= set(sources)
    for name in sources:
        assert name == "./" or (ROOT / name).exists(), name
    for name in re.findall(r"LOQUENT_(\w+)=", text):
        assert name.lower() in vars(parser().parse_args([])), name
    assert "USER 10001" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_one_for_systemd(tmp_path: Path) -> None:
    text = (DEPLOY / "loquent.service").read_text()
    (command,) = re.findall(r"^ExecStart=(\S+) (.*)", text, re.MULTILINE)
    assert command[0].endswith("/loquent")
    assert parser().parse_args(command[1].split()[1:]).config == Path("/etc/loquent/loquent.toml")
    unit = tmp_path / "loquent.service"
    # What is commented out is allowed too.
    text = re.sub(r"^#(?=\w+=)", "", text, flags=re.MULTILINE)
    unit.write_text(text.replace(command[0], str(shutil.which("echo"))))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_probe(
    monkeypatch: pytest.MonkeyPatch, serve: object, capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = serve()  # type: ignore[operator]
    monkeypatch.setenv("LOQUENT_PORT", url.split(":")[2].split("/")[0])
    assert probe.main() == 0
    monkeypatch.setenv("LOQUENT_PORT", "1")
    assert probe.main() == 1
    assert "127.0.0.1:1" in capsys.readouterr().err
