"""What the source of ``models`` and ``export`` must not contain."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import loquent.export
import loquent.models

FILES = [
    file
    for package in (loquent.models, loquent.export)
    for file in sorted(Path(next(iter(package.__path__))).rglob("*.py"))
]


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


_JSON_ALONE = ("AutoConfig.from_pretrained", "AutoFeatureExtractor.from_pretrained")


def opens_pickle(source: str) -> list[str]:
    """What in this source unpickles, or may: a checkpoint from a stranger must stay data."""
    tree = ast.parse(source)
    modules = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve"}
    # Of pickle only the error may be known, which torch raises for what it refuses to read.
    found = [
        name
        for name in imports(tree)
        if name.split(".")[0] in modules and name != "pickle.UnpicklingError"
    ]
    for name, call in calls(tree):
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name == "torch.save":
            found.append(name)
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"{name} without weights_only=True")
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
            found.append(f"{name} without allow_pickle=False")
        weights = name.endswith(".from_pretrained") and name not in _JSON_ALONE
        if weights and keywords.get("use_safetensors") != "True":
            found.append(f"{name} without use_safetensors=True")
    return found


def test_there_are_files() -> None:
    assert len(FILES) > 15


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_no_pickle(file: Path) -> None:
    assert opens_pickle(file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "Model.from_pretrained('x')",
    ],
)
def test_pickle_would_be_found(source: str) -> None:
    assert opens_pickle(source)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_imports_go_one_way(file: Path) -> None:
    allowed = {"models": ("engine", "models"), "export": ("engine", "models", "export")}
    for name in imports(ast.parse(file.read_text())):
        parts = name.split(".")
        if parts[0] == "loquent" and len(parts) > 1:
            assert parts[1] in allowed[file.parent.name], name
