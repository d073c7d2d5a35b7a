"""Other recognisers, run on the same clips: pocketsphinx, and Whisper through CTranslate2.

They are optional (``pip install 'loquent[peers]'``), hear each clip as a whole, and use one thread.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loquent.models.data import DataError

Float32 = NDArray[np.float32]
# Takes 16 kHz mono float32 in [-1, 1].
Peer = Callable[[Float32], str]

WHISPER = "whisper-"
INT8 = "-int8"
_PROMPT = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
_SECONDS = 30


def open_peers(names: str, folders: Mapping[str, str]) -> dict[str, Peer]:
    """Recognisers by name.

    Args:
        names: separated by commas: ``pocketsphinx``, ``whisper-tiny``, ``whisper-base``, ...
        folders: of the Whisper models by name.

    Raises:
        DataError: an unknown name, a model without a folder, or a package that is missing.
    """
    peers: dict[str, Peer] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name == "pocketsphinx":
            peers[name] = _pocketsphinx()
        elif name.startswith(WHISPER):
            size = name.removesuffix(INT8)
            if size not in folders:
                raise DataError(
                    f"--peers {name}: got no model, expected --{size} DIR, a folder with a "
                    "CTranslate2 model (model.bin, config.json, tokenizer.json)"
                )
            peers[name] = _whisper(name, Path(folders[size]))
        else:
            raise DataError(
                f"--peers: got {name!r}, expected pocketsphinx, whisper-tiny, whisper-base (both "
                "in single precision), whisper-tiny-int8 or whisper-base-int8"
            )
    return peers


def _require(module: str, peer: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"--peers {peer} needs {module}, which cannot be imported ({error}); install it with: "
            "pip install 'loquent[peers]'"
        ) from error


def _pocketsphinx() -> Peer:
    """The American English model that comes with the package."""
    pocketsphinx = _require("pocketsphinx", "pocketsphinx")
    decoder = pocketsphinx.Decoder(samprate=16000, loglevel="FATAL")

    def hear(pcm: Float32) -> str:
        samples = (np.clip(pcm, -1, 1) * 32767).astype("<i2")
        decoder.start_utt()
        decoder.process_raw(samples.tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return found.hypstr if found else ""

    return hear


def _whisper(name: str, folder: Path) -> Peer:
    """Beam search of 5 over 30 s windows, English, no timestamps: Whisper's own defaults.

    Numbers that it writes in digits are spelt out, as the references are.
    """
    for file in ("model.bin", "config.json", "tokenizer.json"):
        if not (folder / file).is_file():
            raise DataError(
                f"--{name.removesuffix(INT8)} {folder}: {file} is missing; expected a "
                "Whisper model that `ct2-transformers-converter` wrote, with its tokenizer.json"
            )
    ctranslate2 = _require("ctranslate2", name)
    tokenizer = _require("tokenizers", name).Tokenizer.from_file(str(folder / "tokenizer.json"))
    spell = _require("num2words", name).num2words
    extractor = _require("transformers", name).WhisperFeatureExtractor(feature_size=80)
    precision = "int8" if name.endswith(INT8) else "float32"
    model = ctranslate2.models.Whisper(
        str(folder), device="cpu", compute_type=precision, intra_threads=1
    )
    prompt = [tokenizer.token_to_id(token) for token in _PROMPT]

    def hear(pcm: Float32) -> str:
        texts: list[str] = []
        window = _SECONDS * 16000
        for start in range(0, max(1, len(pcm)), window):
            features: Any = extractor(pcm[start : start + window], sampling_rate=16000)
            view = ctranslate2.StorageView.from_array(
                np.ascontiguousarray(features.input_features[0][None], np.float32)
            )
            (result,) = model.generate(view, [prompt], beam_size=5, max_length=224)
            texts.append(tokenizer.decode(result.sequences_ids[0], skip_special_tokens=True))
        return spell_digits(" ".join(texts), spell)

    return hear


def spell_digits(text: str, spell: Callable[..., str]) -> str:
    """Whole numbers in words: ``spell`` is ``num2words``; what it cannot read stays."""
    words = []
    for token in text.split():
        bare = token.strip(".,;:!?\"'()").replace(",", "")
        kind = "ordinal" if bare[-2:] in ("st", "nd", "rd", "th") else "cardinal"
        digits = bare[:-2] if kind == "ordinal" else bare
        if digits.isascii() and digits.isdigit() and len(digits) <= 9:
            token = spell(int(digits), to=kind)
        words.append(token)
    return " ".join(words)
