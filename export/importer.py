"""``loquent import``: models that others trained, as bundles.

``torchaudio-emformer`` takes the three files of ``torchaudio.pipelines``'
EMFORMER_RNNT_BASE_LIBRISPEECH, or of a model of the same form: weights, global statistics of the
features, SentencePiece model. The bundle has its features as the pipeline computes them offline,
which is what the model was trained with, and streams them exactly.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError

import numpy as np
import sentencepiece
import torch
from safetensors.torch import load_file
from torch import Tensor

from loquent.engine.bundle import BLANK_PIECE, Bundle
from loquent.engine.errors import LoquentError
from loquent.engine.features import FeatureSpec, torchaudio_spec
from loquent.engine.fields import MANIFEST
from loquent.export.bundle import BundleSpec, write_bundle, write_int8
from loquent.export.cli import PARITY_TOLERANCE, ExportRefused, check_parity, is_free
from loquent.models.student import Student
from loquent.models.torchaudio_weights import student_from_torchaudio

# What the model was trained with: 16 feature frames and 4 of right context.
CHUNK_MS, RIGHT_CONTEXT_MS = 160, 40
_URL = "https://download.pytorch.org/torchaudio"
_FILES = {
    "weights": "models/emformer_rnnt_base_librispeech.pt",
    "stats": "pipeline-assets/global_stats_rnnt_librispeech.json",
    "spm": "pipeline-assets/spm_bpe_4096_librispeech.model",
}


class ImportFailed(ValueError):  # noqa: N818
    """A file is missing or is not what it should be; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class TorchaudioFiles:
    """Paths of the three files."""

    weights: Path
    stats: Path
    spm: Path


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """A state dict from a ``.pt`` or ``.pth`` file, of tensors alone, or from safetensors.

    Raises:
        ImportFailed: the file holds anything but tensors (nothing in it is run), or is damaged.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ImportFailed(
            f"{path}: holds more than tensors, which is refused as it could run code; save "
            "`model.state_dict()` alone"
        ) from error
    except Exception as error:  # whatever the reader stumbles over in a damaged file
        raise ImportFailed(f"{path}: cannot be read as weights ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ImportFailed(
            f"{path}: got {type(found).__name__}, expected a state dict: names and tensors"
        )
    return found


def read_stats(path: Path) -> FeatureSpec:
    """The features: torchaudio's, with the global statistics in this JSON file."""
    try:
        blob = json.loads(path.read_text("utf-8"))
        mean, invstddev = (np.asarray(blob[k], np.float32) for k in ("mean", "invstddev"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImportFailed(
            f"{path}: {type(error).__name__} {error}; expected JSON with the lists mean and "
            "invstddev"
        ) from error
    if mean.shape != (80,) or invstddev.shape != (80,):
        raise ImportFailed(
            f"{path}: got mean {mean.shape} and invstddev {invstddev.shape}, expected 80 values "
            "each"
        )
    return torchaudio_spec(mean, invstddev)


def read_pieces(path: Path, vocabulary: int) -> list[str]:
    """The subwords by id, the blank last.

    Pieces that torchaudio's token processor drops (unknown, end, padding) are empty.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        count = processor.vocab_size()
    except (OSError, RuntimeError) as error:
        raise ImportFailed(f"{path}: cannot be read as a SentencePiece model ({error})") from error
    if count + 1 != vocabulary:
        raise ImportFailed(
            f"{path}: got {count} subwords, expected {vocabulary - 1}: one less than the symbols "
            "of the weights, whose last is the blank"
        )
    silent = {processor.unk_id(), processor.eos_id(), processor.pad_id()}
    pieces = ["" if i in silent else processor.id_to_piece(i) for i in range(count)]
    return [*pieces, BLANK_PIECE]


def import_torchaudio(files: TorchaudioFiles, folder: Path, *, name: str, licence: str) -> Student:
    """Write the bundle; returns the torch model that it was made of.

    Raises:
        ImportFailed: a file is not of this form.
    """
    try:
        student = student_from_torchaudio(read_weights(files.weights))
    except ValueError as error:
        raise ImportFailed(f"{files.weights}: {error}") from error
    spec = BundleSpec(
        name=name,
        features=read_stats(files.stats),
        pieces=read_pieces(files.spm, student.config.vocab),
        # The engine joins pieces itself; a SentencePiece model in a bundle has its blank at 0.
        spm=None,
        licence=licence,
        chunks_ms=(CHUNK_MS,),
        chunk_ms=CHUNK_MS,
        right_contexts_ms=(RIGHT_CONTEXT_MS,),
        right_context_ms=RIGHT_CONTEXT_MS,
        default_decoder="rnnt",
        training={"origin": {"start": f"torchaudio: {files.weights.name}"}},
    )
    write_bundle(student, spec, folder)
    return student


def fetch(given: Mapping[str, Path | None], folder: Path) -> TorchaudioFiles:
    """The files, those not given downloaded from where torchaudio has them.

    Raises:
        ImportFailed: there is no network.
    """
    paths: dict[str, Path] = {}
    for key, remote in _FILES.items():
        own = given[key]
        if own is not None:
            if not own.is_file():
                raise ImportFailed(f"--{key} {own}: no such file")
            paths[key] = own
            continue
        paths[key] = folder / Path(remote).name
        if not paths[key].exists():
            url = f"{_URL}/{remote}"
            print(f"fetching {url}", file=sys.stderr)
            try:
                torch.hub.download_url_to_file(url, str(paths[key]))
            except (URLError, OSError) as error:
                raise ImportFailed(
                    f"{url}: cannot be fetched ({error}); fetch it elsewhere and give its path "
                    f"with --{key}"
                ) from error
    return TorchaudioFiles(**paths)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="loquent import", description=__doc__)
    parser.add_argument("kind", choices=["torchaudio-emformer"], help="where the model comes from")
    for key, what in (
        ("weights", "state dict (.pt, .pth or .safetensors)"),
        ("stats", "global statistics of the features (JSON)"),
        ("spm", "SentencePiece model"),
    ):
        parser.add_argument(
            f"--{key}", type=Path, metavar="FILE", help=f"{what}; fetched if not given"
        )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--name", default="emformer-rnnt-base", help="name of the bundle")
    parser.add_argument(
        "--licence", default="unknown", help="licence of the weights, in words (torchaudio: BSD-2)"
    )
    parser.add_argument(
        "--int8", action="store_true", help="quantise the encoder: a quarter of the size"
    )
    args = parser.parse_args(argv)
    if not is_free(args.output, MANIFEST):
        parser.exit(1, f"loquent import: {args.output} exists and is no bundle; choose another\n")
    given = {key: getattr(args, key) for key in _FILES}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            files = fetch(given, Path(scratch))
            chosen = Path(scratch) / "fp32"
            student = import_torchaudio(files, chosen, name=args.name, licence=args.licence)
            check_parity(student, Bundle.load(chosen), PARITY_TOLERANCE)
            if args.int8:
                single, chosen = chosen, Path(scratch) / "int8"
                check_parity(student, write_int8(single, chosen), None)
            shutil.rmtree(args.output, ignore_errors=True)
            shutil.copytree(chosen, args.output)
    except (ExportRefused, ImportFailed, LoquentError, OSError) as error:
        print(f"loquent import: {error}", file=sys.stderr)
        return 1
    size = sum(f.stat().st_size for f in args.output.iterdir())
    bundle = Bundle.load(args.output)
    print(f"{args.output}: {bundle.name} {bundle.precision}, {size / 1e6:.1f} MB; try")
    print(f"  loquent transcribe FILE --bundle {args.output} --chunk-ms {CHUNK_MS}")
    return 0
