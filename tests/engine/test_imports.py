"""What importing the engine costs and what it does not need."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import loquent.engine

MODULES = sorted(
    path.stem
    for path in Path(loquent.engine.__file__).parent.glob("*.py")
    if path.stem != "__init__"
)


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_export_exists() -> None:
    for name in loquent.engine.__all__:
        assert getattr(loquent.engine, name) is not None
    assert dir(loquent.engine) == sorted(loquent.engine.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = loquent.engine.Nothing


def test_import_is_light() -> None:
    loaded = python(
        "import sys, loquent.engine\n"
        "print(*(m for m in ('numpy', 'onnxruntime', 'soundfile', 'asyncio') if m in sys.modules))"
    )
    assert loaded == ""


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="proves nothing where there is no torch"
)
def test_the_engine_never_imports_torch(tiny_bundle: Path) -> None:
    loaded = python(
        "import sys, importlib, numpy\n"
        f"for name in {MODULES}: importlib.import_module('loquent.engine.' + name)\n"
        "from loquent.engine import Recognizer\n"
        f"Recognizer.load({str(tiny_bundle)!r}).transcribe(numpy.zeros(16000, 'float32'))\n"
        "print(*(m for m in ('torch', 'torchaudio', 'transformers') if m in sys.modules))\n"
        "print(*(m for m in sys.modules if m.startswith(('loquent.models', 'loquent.export',"
        " 'loquent.clients'))))"
    )
    assert loaded == ""


def test_without_onnxruntime_the_error_names_the_extra(tiny_bundle: Path) -> None:
    message = python(
        "import sys\n"
        "sys.modules['onnxruntime'] = None  # as if it were not installed\n"
        "from loquent.engine import MissingExtra, Recognizer\n"
        "try:\n"
        f"    Recognizer.load({str(tiny_bundle)!r})\n"
        "except MissingExtra as exc:\n"
        "    print(exc)\n"
    )
    assert 'pip install "loquent[cpu]"' in message
    assert "loquent[gpu]" in message


def test_onnx_runtime_reports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its telemetry keeps a device id and a database in the cache folder before it sends them."""
    for name in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    python("from loquent.engine import Recognizer; Recognizer.load('en')")
    assert list(tmp_path.iterdir()) == []
