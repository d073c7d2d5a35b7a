"""The distribution: what it contains, how it installs, and which way its imports go."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("engine", "models", "export", "clients")
# Which of our folders a folder may import: clients -> engine, export -> models -> engine.
MAY_IMPORT = {
    "engine": {"engine"},
    "models": {"models", "engine"},
    "export": {"export", "models", "engine"},
    "clients": {"clients", "engine"},
}
# What the base install and [cpu] do not bring; without an extra, engine must work without them.
HEAVY = ("torch", "torchaudio", "transformers", "lightning", "lhotse", "onnx", "onnxscript")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tree, so that no stale build folder can help it."""
    source = tmp_path_factory.mktemp("source")
    for name in _shipped_sources():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(out)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("loquent-*.whl")
    return zipfile.ZipFile(file)


def _shipped_sources() -> list[str]:
    top = ["pyproject.toml", "README.md", "LICENSE", "NOTICE"]
    below = [
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    return top + below


def _package_folders() -> list[Path]:
    """Every folder below the four that holds Python."""
    return sorted({file.parent for name in FOLDERS for file in (ROOT / name).rglob("*.py")})


def _dotted(folder: Path) -> str:
    return "loquent." + ".".join(folder.relative_to(ROOT).parts)


def test_package_list_is_the_tree(pyproject: dict[str, Any]) -> None:
    listed = pyproject["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(_dotted(folder) for folder in _package_folders())
    mapped = pyproject["tool"]["setuptools"]["package-dir"]
    assert mapped == {f"loquent.{name}": name for name in FOLDERS}


def test_every_package_is_typed_and_regular() -> None:
    for folder in _package_folders():
        assert (folder / "py.typed").is_file(), folder
        assert (folder / "__init__.py").is_file(), folder


def test_loquent_itself_is_a_namespace() -> None:
    spec = importlib.util.find_spec("loquent")
    assert spec is not None
    assert spec.origin is None


@pytest.mark.parametrize("name", FOLDERS)
def test_importroot_leads_to_the_tree(name: str) -> None:
    link = ROOT / "tests" / "importroot" / "loquent" / name
    assert link.is_symlink()
    assert link.readlink() == Path("../../..") / name
    assert link.resolve() == ROOT / name


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, at any depth, lazily or not."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} is a relative import"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way(folder: str) -> None:
    wrong = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        for line, name in _imports(file):
            parts = name.split(".")
            if parts[0] in FOLDERS:
                wrong.append(f"{file}:{line}: {name} makes a second copy; import loquent.{name}")
            if parts[0] == "loquent" and len(parts) > 1 and parts[1] not in MAY_IMPORT[folder]:
                wrong.append(f"{file}:{line}: loquent.{folder} may not import {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["engine", "clients"])
def test_engine_and_clients_name_nothing_heavy(folder: str) -> None:
    wrong = [
        f"{file}:{line}: {name}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line, name in _imports(file)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_installed_version_is_the_one_in_pyproject(pyproject: dict[str, Any]) -> None:
    assert importlib.metadata.version("loquent") == pyproject["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{pyproject['project']['version']}]" in changelog


def test_cpu_and_gpu_runtimes_never_come_together(pyproject: dict[str, Any]) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    both = [
        name
        for name, needs in extras.items()
        if any(need.startswith("onnxruntime-gpu") for need in needs) and name != "gpu"
    ]
    assert both == []
    # Both packages own the same files, so neither may ride in with another extra.
    cpu = [
        name
        for name, needs in extras.items()
        if any(need.startswith("onnxruntime") and "gpu" not in need for need in needs)
    ]
    assert cpu == ["cpu"]


def test_wheel_holds_everything(wheel: zipfile.ZipFile) -> None:
    ignored = {"clients/package.json"}  # tells node that the page's files are modules
    expected = {
        f"loquent/{name}"
        for name in _shipped_sources()
        if "/" in name
        and name not in ignored
        and not name.startswith("models/weights/")  # to fine-tune from: the repository has them
        and not _is_folder_page(name)
    }
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert "loquent/clients/web/index.html" in held
    assert "loquent/engine/bundles/en/manifest.json" in held
    assert "loquent/engine/samples/morning.flac" in held
    assert "loquent/__init__.py" not in held


def _is_folder_page(name: str) -> bool:
    """What is written about the packages themselves stays in the repository."""
    path = Path(name)
    return path.suffix == ".md" and ROOT / path.parent in _package_folders()


def test_wheel_carries_licence_and_command(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    for name in ("LICENSE", "NOTICE"):
        assert wheel.read(f"{info}/licenses/{name}") == (ROOT / name).read_bytes()
    scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert "loquent = loquent.clients.cli:main" in scripts
