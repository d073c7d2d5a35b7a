"""Whisper's encoder weights as a start for our encoder.

An Emformer layer without its output norm is a pre-norm Transformer layer, so Whisper's weights
(MIT; arXiv 2212.04356) fit it one to one. With one unlimited segment our encoder computes what
Whisper's does; ``tests/models/test_whisper.py`` holds the two against each other.

Two forms are read: a Hugging Face model (hub id or folder) and a CTranslate2 ``model.bin`` (file
or the folder that holds it). Neither involves pickle.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loquent.models.encoder import Encoder

Tensors = dict[str, Tensor]

# CTranslate2's ``DataType`` (include/ctranslate2/types.h): value -> NumPy dtype.
_CT2_FLOATS = {0: "<f4", 4: "<f2"}
_CT2_VERSION = 6


class WhisperWeightsError(ValueError):
    """The weights cannot be read or do not fit; the message says why."""


def load_whisper(source: str | Path) -> Tensors:
    """Encoder tensors of a Whisper model, float32, with ``transformers``' names.

    Args:
        source: a CTranslate2 ``model.bin`` or a folder holding one; a Hugging Face folder; or a
            hub id such as ``openai/whisper-tiny``.

    Raises:
        WhisperWeightsError: nothing readable there.
    """
    path = Path(source)
    if path.is_dir() and (path / "model.bin").exists():
        path = path / "model.bin"
    if path.is_file():
        return _from_ctranslate2(path)
    return _from_transformers(str(source))


def _from_transformers(source: str) -> Tensors:
    from safetensors import SafetensorError
    from transformers import WhisperModel

    try:
        # Only safetensors: the older format is pickle, which runs code from strangers.
        loaded: Any = WhisperModel.from_pretrained(
            source, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise WhisperWeightsError(
            f"{source}: neither a CTranslate2 model.bin, nor a Hugging Face folder, nor a hub id "
            f"that can be fetched from here ({error})"
        ) from error
    model, report = loaded
    # transformers would fill these with random numbers.
    if missing := sorted(name for name in report["missing_keys"] if "encoder." in name):
        raise WhisperWeightsError(f"{source}: no Whisper encoder, {missing[0]} is missing")
    return {name: t.detach().float() for name, t in model.encoder.state_dict().items()}


def _read_bytes(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise WhisperWeightsError(
            f"{file.name}: ends early or is no CTranslate2 model: got {len(data)} bytes, "
            f"expected {size}"
        )
    return data


def _read(file: BinaryIO, form: str) -> int:
    value: int = struct.unpack(form, _read_bytes(file, struct.calcsize(form)))[0]
    return value


def _read_text(file: BinaryIO) -> str:
    return _read_bytes(file, _read(file, "<H")).rstrip(b"\0").decode("utf-8", "replace")


def _from_ctranslate2(path: Path) -> Tensors:
    """Read the variables of a CTranslate2 model.

    The format is that of ``python/ctranslate2/specs/model_spec.py``: variables, then aliases of
    variables with the same content (layer norms that are still all ones, for example).
    """
    found: dict[str, NDArray[np.floating]] = {}
    with path.open("rb") as file:
        version = _read(file, "<I")
        if version != _CT2_VERSION:
            raise WhisperWeightsError(
                f"{path}: binary version {version}, expected {_CT2_VERSION} (CTranslate2 3 or 4)"
            )
        spec = _read_text(file)
        if spec != "WhisperSpec":
            raise WhisperWeightsError(f"{path}: holds a {spec}, expected a WhisperSpec")
        _read(file, "<I")  # revision
        for _ in range(_read(file, "<I")):
            name = _read_text(file)
            shape = [_read(file, "<I") for _ in range(_read(file, "<B"))]
            dtype = _CT2_FLOATS.get(_read(file, "<B"))
            data = _read_bytes(file, _read(file, "<I"))
            if dtype is None:
                continue
            if len(data) != math.prod(shape) * np.dtype(dtype).itemsize:
                raise WhisperWeightsError(
                    f"{path}: {name} has {len(data)} bytes, which is not {shape} of {dtype}"
                )
            found[name] = np.frombuffer(data, dtype).reshape(shape)
        for _ in range(_read(file, "<I")):
            alias, name = _read_text(file), _read_text(file)
            if name in found:
                found[alias] = found[name]
    raw = {
        name.removeprefix("encoder/"): torch.from_numpy(array.astype(np.float32))
        for name, array in found.items()
        if name.startswith("encoder/")
    }
    if "conv1/weight" not in raw or "layer_0/ffn/linear_0/weight" not in raw:
        raise WhisperWeightsError(
            f"{path}: no float encoder weights (is it quantised to int8? convert with float16)"
        )
    try:
        return _rename_ctranslate2(raw)
    except KeyError as error:
        raise WhisperWeightsError(f"{path}: the encoder has no {error}") from error


def _rename_ctranslate2(raw: Tensors) -> Tensors:
    out = {
        f"{conv}.{kind}": raw[f"{conv}/{kind}"]
        for conv in ("conv1", "conv2")
        for kind in ("weight", "bias")
    }
    norms = {"weight": "gamma", "bias": "beta"}
    for ours, theirs in norms.items():
        out[f"layer_norm.{ours}"] = raw[f"layer_norm/{theirs}"]
    layer = 0
    while f"layer_{layer}/ffn/linear_0/weight" in raw:
        source, target = f"layer_{layer}", f"layers.{layer}"
        for kind in ("weight", "bias"):
            fused = raw[f"{source}/self_attention/linear_0/{kind}"].chunk(3)
            for name, part in zip("qkv", fused, strict=True):
                out[f"{target}.self_attn.{name}_proj.{kind}"] = part
            out[f"{target}.self_attn.out_proj.{kind}"] = raw[
                f"{source}/self_attention/linear_1/{kind}"
            ]
            out[f"{target}.fc1.{kind}"] = raw[f"{source}/ffn/linear_0/{kind}"]
            out[f"{target}.fc2.{kind}"] = raw[f"{source}/ffn/linear_1/{kind}"]
            gamma = norms[kind]
            out[f"{target}.self_attn_layer_norm.{kind}"] = raw[
                f"{source}/self_attention/layer_norm/{gamma}"
            ]
            out[f"{target}.final_layer_norm.{kind}"] = raw[f"{source}/ffn/layer_norm/{gamma}"]
        layer += 1
    return out


def whisper_shape(tensors: Tensors) -> tuple[int, int]:
    """Width and number of layers.

    Raises:
        WhisperWeightsError: it takes other features than ours.
    """
    dim, bins, _ = tensors["conv1.weight"].shape
    if bins != 80:
        raise WhisperWeightsError(f"this Whisper takes {bins} mel bins, expected 80")
    return dim, len({name.split(".")[1] for name in tensors if name.startswith("layers.")})


def initialise_from_whisper(
    encoder: Encoder, tensors: Tensors, layers: Sequence[int] | None = None
) -> None:
    """Copy Whisper's encoder weights into ours (made by ``presets.whisper_encoder``).

    Args:
        encoder: is overwritten.
        tensors: of :func:`load_whisper`.
        layers: which of Whisper's layers ours are to be; the lower ones by default.

    Raises:
        WhisperWeightsError: a width or the number of layers does not fit.
    """
    chosen = range(encoder.config.emformer.layers) if layers is None else layers
    zeros = torch.zeros_like(tensors["layers.0.self_attn.q_proj.weight"][0])
    state: Tensors = {
        f"frontend.{conv}.{kind}": tensors[f"{conv}.{kind}"]
        for conv in ("conv1", "conv2")
        for kind in ("weight", "bias")
    }
    for kind in ("weight", "bias"):
        state[f"final_norm.{kind}"] = tensors[f"layer_norm.{kind}"]
        for i, layer in enumerate(chosen):
            source, target = f"layers.{layer}", f"emformer.layers.{i}"
            if f"{source}.fc1.weight" not in tensors:
                raise WhisperWeightsError(
                    f"got layer {layer} for the encoder, Whisper's has {whisper_shape(tensors)[1]}"
                )
            attention = f"{source}.self_attn"
            # Whisper's keys have no bias; ours are fused with the values and do.
            key = tensors.get(f"{attention}.k_proj.{kind}", zeros)
            state |= {
                f"{target}.query.{kind}": tensors[f"{attention}.q_proj.{kind}"],
                f"{target}.key_value.{kind}": torch.cat(
                    [key, tensors[f"{attention}.v_proj.{kind}"]]
                ),
                f"{target}.out.{kind}": tensors[f"{attention}.out_proj.{kind}"],
                f"{target}.norm_input.{kind}": tensors[f"{source}.self_attn_layer_norm.{kind}"],
                f"{target}.norm_ffn.{kind}": tensors[f"{source}.final_layer_norm.{kind}"],
                f"{target}.ffn_in.{kind}": tensors[f"{source}.fc1.{kind}"],
                f"{target}.ffn_out.{kind}": tensors[f"{source}.fc2.{kind}"],
            }
    own = encoder.state_dict()
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            got = tuple(own[name].shape) if name in own else "no such parameter"
            raise WhisperWeightsError(
                f"{name}: Whisper's weight is {tuple(tensor.shape)}, the encoder has {got}"
            )
    encoder.load_state_dict(state, strict=False)
