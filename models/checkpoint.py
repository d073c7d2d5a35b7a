"""Checkpoints: a folder of safetensors and JSON. No pickle, so a stranger's checkpoint is data.

Layout of ``FOLDER``: ``config.json`` (the student's shape), ``tokens.spm``, ``model.safetensors``
(the weights to use: the running average), ``state.json`` (counters, settings), and for resuming
``raw.safetensors`` (weights being trained) and ``optimizer.safetensors``.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loquent.models.student import Student, StudentConfig
from loquent.models.tokens import Tokenizer

Tensors = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint is missing or does not fit; the message says what."""


@dataclass(frozen=True)
class Checkpoint:
    """A student ready for use.

    Attributes:
        student: in eval mode, float32.
        tokenizer: of its vocabulary.
        state: counters and training settings.
    """

    student: Student
    tokenizer: Tokenizer
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    student: StudentConfig,
    tokenizer: Tokenizer,
    model: Tensors,
    state: dict[str, Any],
    *,
    raw: Tensors | None = None,
    optimizer: Tensors | None = None,
) -> None:
    """Write a student's checkpoint, see :func:`save_folder`."""
    tensors = {"model": model, "raw": raw, "optimizer": optimizer}
    save_folder(folder, student.to_dict(), tokenizer, state, tensors)


def save_folder(
    folder: Path,
    config: dict[str, Any],
    tokenizer: Tokenizer | None,
    state: dict[str, Any],
    tensors: dict[str, Tensors | None],
    more: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one whole.

    Readers must call :func:`recover` first: a kill may fall between the two renames.
    """
    recover(folder)
    partial, old = folder.with_name(folder.name + ".part"), _old(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    for file, data in (more or {}).items():
        (partial / file).write_text(json.dumps(data, indent=1))
    if tokenizer is not None:
        (partial / "tokens.spm").write_bytes(tokenizer.model)
    for name, named in tensors.items():
        if named is not None:
            plain = {n: t.detach().contiguous() for n, t in named.items()}
            # transformers asks for the format.
            save_file(plain, partial / f"{name}.safetensors", metadata={"format": "pt"})
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def recover(folder: Path) -> None:
    """Put the previous checkpoint back if a kill came while the new one took its place."""
    if _old(folder).exists() and not folder.exists():
        _old(folder).rename(folder)


_SCALE = ".scale"


def shrink(tensors: Tensors, *, least: int = 4096) -> Tensors:
    """Half precision; matrices and kernels of ``least`` elements as int8, a scale for each row.

    About a quarter of float32. :func:`read_tensors` undoes it; what is lost is far less than a
    training step changes.
    """
    small: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2 or tensor.numel() < least:
            small[name] = tensor.half()
            continue
        rows = tensor.float().flatten(1)
        scale = (rows.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        steps = torch.round(rows / scale[:, None])
        small[name] = steps.to(torch.int8).reshape(tensor.shape)
        small[name + _SCALE] = scale
    return small


def read_tensors(path: Path) -> Tensors:
    """Tensors of a safetensors file as float32; it may hold halves, or what shrink made."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error
    result: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in tensors:
            continue
        if tensor.dtype == torch.int8:
            if name + _SCALE not in tensors:
                raise CheckpointError(f"{path}: {name} is int8, but there is no {name + _SCALE}")
            scale = tensors[name + _SCALE]
            tensor = tensor.float() * scale.reshape(-1, *[1] * (tensor.dim() - 1))
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        result[name] = tensor.float() if half else tensor
    return result


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: got a {type(data).__name__}, expected a JSON object")
    return data


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint for evaluation, export or fine-tuning.

    Raises:
        CheckpointError: a file is missing, unreadable, or weights and shape disagree.
    """
    recover(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no config.json; expected a checkpoint folder as `loquent train` writes "
            "(RUN/last or RUN/best)"
        )
    shape = read_json(folder / "config.json")
    try:
        student = Student(StudentConfig.from_dict(shape))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: not a student's shape ({error})"
        ) from error
    try:
        student.load_state_dict(read_tensors(folder / "model.safetensors"))
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: weights do not fit config.json: {error}") from error
    try:
        tokenizer = Tokenizer.load(folder / "tokens.spm")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'tokens.spm'}: no subword model ({error})") from error
    if tokenizer.size != student.config.vocab:
        raise CheckpointError(
            f"{folder / 'tokens.spm'}: got {tokenizer.size} subwords, expected "
            f"{student.config.vocab} of config.json"
        )
    return Checkpoint(
        student=student.eval(), tokenizer=tokenizer, state=read_json(folder / "state.json")
    )
