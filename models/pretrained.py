"""Encoders of the wav2vec 2.0 family as teachers: XLS-R, MMS, HuBERT, WavLM, UniSpeech, Data2Vec.

They come through transformers' Auto classes, from the hub or a local folder, safetensors only. An
old head is left behind: ours is a linear layer over this project's subwords with the blank at 0, so
it cannot meet a tokenizer's padding or a vocabulary of another language.

Batches give what single utterances give. Models whose CNN normalises over time (``feat_extract_norm
= "group"``) would see the padding, mask or not: those go through it one by one.

Shape suffixes: B utterances, T samples, N frames (20 ms), E width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from loquent.engine.audio import load_audio
from loquent.models.checkpoint import (
    CheckpointError,
    Tensors,
    read_json,
    read_tensors,
    save_folder,
)
from loquent.models.data import Utterance, epoch_batches
from loquent.models.loop import Loop, LoopConfig
from loquent.models.scoring import Score, ctc_greedy
from loquent.models.tokens import Tokenizer

SAMPLE_RATE = 16000
FAMILIES = (
    "wav2vec2",
    "hubert",
    "wavlm",
    "unispeech",
    "unispeech-sat",
    "data2vec-audio",
)
KIND = "pretrained"  # in a checkpoint's config.json


def model_type(source: str) -> str:
    """The ``model_type`` of a hub id or folder.

    Raises:
        CheckpointError: nothing there.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    # Its table of weights that an old head leaves over; what is missing we say ourselves.
    log: Any = logging
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        return str(AutoConfig.from_pretrained(source).model_type)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: neither a Hugging Face folder nor a hub id that can be fetched from here "
            f"({str(error).splitlines()[0]})"
        ) from error


def load_encoder(source: str, *, adapter: str | None = None) -> tuple[Any, bool]:
    """The encoder of a hub id or folder, and whether it wants normalised samples.

    Args:
        adapter: language of an MMS adapter to load (``source`` must have it), or ``new`` for fresh
            ones, which then learn instead of the layers around them.

    Raises:
        CheckpointError: nothing readable there, or no encoder of this family.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCTC

    kind = model_type(source)
    if kind not in FAMILIES:
        raise CheckpointError(f"{source}: is a {kind}, expected one of {', '.join(FAMILIES)}")
    try:
        if adapter in (None, "new"):
            config = AutoConfig.from_pretrained(source)
            if adapter and config.adapter_attn_dim is None:
                config.adapter_attn_dim = 16  # MMS's
            model, report = AutoModel.from_pretrained(
                source, config=config, use_safetensors=True, output_loading_info=True
            )
            fresh = {n for n in report["missing_keys"] if "adapter_layer" not in n}
        else:
            whole, report = AutoModelForCTC.from_pretrained(
                source,
                target_lang=adapter,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            model = whole.base_model
            fresh = {n for n in report["missing_keys"] if not n.startswith("lm_head")}
        if adapter == "new":
            model.init_adapter_layers()
    except (OSError, RuntimeError, ValueError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{source}: cannot be loaded ({error})") from error
    # transformers would fill these with random numbers (the mask's vector is only for training).
    if missing := sorted(n for n in fresh if "masked_spec_embed" not in n):
        raise CheckpointError(f"{source}: {missing[0]} is missing, {len(missing)} weights in all")
    return model.float(), wants_normalised(source, model.config)


def wants_normalised(source: str, config: Any) -> bool:
    """Whether a model was trained on samples of mean 0 and variance 1."""
    from transformers import AutoFeatureExtractor

    try:
        extractor = AutoFeatureExtractor.from_pretrained(source)  # type: ignore[no-untyped-call]
        return bool(extractor.do_normalize)
    except (OSError, ValueError):
        return bool(config.feat_extract_norm == "layer")  # as every published model has it


def frames_of(config: Any, lengths_B: Tensor) -> Tensor:
    """Output frames of utterances of so many samples."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        lengths_B = torch.div(lengths_B - kernel, stride, rounding_mode="floor") + 1
    return lengths_B


def shortest(config: Any) -> int:
    """Samples that give one output frame."""
    samples = 1
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        samples = (samples - 1) * stride + kernel
    return samples


class Pretrained(nn.Module):
    """An encoder with a CTC head.

    Args:
        model: a bare model of transformers.
        vocab: tokens of the head; 0 is the blank.
        normalise: bring every utterance to mean 0 and variance 1 first.
    """

    blank = 0

    def __init__(self, model: Any, vocab: int, *, normalise: bool) -> None:
        super().__init__()
        self.encoder, self.normalise = model, normalise
        self.ctc = nn.Linear(model.config.hidden_size, vocab)

    @property
    def width(self) -> int:
        """Width of the encoder's output."""
        return int(self.encoder.config.hidden_size)

    def to_dict(self) -> dict[str, Any]:
        """Shape, ready for JSON; inverse of :meth:`from_dict`."""
        return {
            "kind": KIND,
            "vocab": self.ctc.out_features,
            "normalise": self.normalise,
            "model": json.loads(self.encoder.config.to_json_string(use_diff=False)),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Pretrained:
        """An encoder of that shape with random weights."""
        from transformers import AutoConfig, AutoModel

        shape = dict(data["model"])
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
        auto: Any = AutoModel
        model = auto.from_config(config)
        return cls(model, int(data["vocab"]), normalise=bool(data["normalise"]))

    def encode(self, wave_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) samples -> (B, N, E) and the valid frames of each."""
        frames_B = frames_of(self.encoder.config, lengths_B)
        wave_BT = self.prepared(wave_BT, lengths_B, self.normalise)
        if self.encoder.config.feat_extract_norm == "group":
            each = [
                self.encoder(wave_BT[i : i + 1, :n])[0][0] for i, n in enumerate(lengths_B.tolist())
            ]
            return nn.utils.rnn.pad_sequence(each, batch_first=True), frames_B
        mask = (torch.arange(wave_BT.shape[1], device=wave_BT.device) < lengths_B[:, None]).long()
        out: Tensor = self.encoder(wave_BT, attention_mask=mask)[0]
        return out, frames_B

    @staticmethod
    def prepared(wave_BT: Tensor, lengths_B: Tensor, normalise: bool) -> Tensor:
        """Bring every utterance to mean 0 and variance 1, its padding left out, if so wished."""
        if not normalise:
            return wave_BT
        inside = torch.arange(wave_BT.shape[1], device=wave_BT.device) < lengths_B[:, None]
        count = lengths_B[:, None].float()
        mean = (wave_BT * inside).sum(1, keepdim=True) / count
        centred = (wave_BT - mean) * inside
        variance = centred.square().sum(1, keepdim=True) / count
        return centred / torch.sqrt(variance + 1e-7)

    def forward(self, wave_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T) samples -> (B, N, V) log-probabilities, valid frames, (B, N, E) encoder output."""
        encoded, frames = self.encode(wave_BT, lengths_B)
        return F.log_softmax(self.ctc(encoded).float(), dim=-1), frames, encoded


class AudioBatch:
    """Samples padded with zeros, and tokens."""

    def __init__(
        self, waves: Sequence[Tensor], targets: Sequence[Sequence[int]], indices: Sequence[int]
    ) -> None:
        self.wave_BT = nn.utils.rnn.pad_sequence(list(waves), batch_first=True)
        self.lengths_B = torch.tensor([len(w) for w in waves])
        self.targets = torch.tensor([t for row in targets for t in row], dtype=torch.int64)
        self.targets_B = torch.tensor([len(row) for row in targets])
        self.indices = tuple(indices)


def read_wave(utterance: Utterance, least: int) -> Tensor:
    """Samples at 16 kHz, padded to ``least``."""
    wave = torch.from_numpy(load_audio(utterance.audio, sample_rate=SAMPLE_RATE))
    return F.pad(wave, (0, max(0, least - len(wave))))


class _Objective(nn.Module):
    def __init__(self, teacher: Pretrained) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, batch: AudioBatch, step: int) -> dict[str, Tensor]:
        device = self.teacher.ctc.weight.device
        wave, lengths = batch.wave_BT.to(device), batch.lengths_B.to(device)
        logs, frames, _ = self.teacher(wave, lengths)
        loss = F.ctc_loss(
            logs.transpose(0, 1),
            batch.targets.to(device),
            frames,
            batch.targets_B.to(device),
            blank=Pretrained.blank,
            reduction="sum",
            zero_infinity=True,
        )
        count = batch.targets_B.sum().float().to(device)
        return {"loss": loss, "count": count, "ctc": loss}


class AudioLoop(Loop[AudioBatch]):
    """A loop over recordings.

    Args:
        run, module, config: see :class:`Loop`.
        model_config: transformers' config of the encoder.
        train, weights: utterances and the share of each per epoch.
        targets: tokens of each.
    """

    def __init__(
        self,
        run: Path,
        module: nn.Module,
        config: LoopConfig,
        *,
        model_config: Any,
        train: Sequence[Utterance],
        weights: Sequence[float],
        targets: Sequence[Sequence[int]],
    ) -> None:
        self.train, self.weights, self.targets = list(train), list(weights), targets
        self.least = shortest(model_config)
        self._samples = [round(u.duration * SAMPLE_RATE) for u in train]
        super().__init__(run, module, config)

    def _epoch(self, epoch: int) -> Iterable[list[int]]:
        c = self.config
        per_batch = round(c.batch_seconds * SAMPLE_RATE)
        return epoch_batches(self._samples, self.weights, per_batch, seed=c.seed * 1000 + epoch)

    def _make(self, index: int, indices: list[int]) -> AudioBatch:
        waves = [read_wave(self.train[i], self.least) for i in indices]
        return AudioBatch(waves, [self.targets[i] for i in indices], indices)

    def _seconds(self, batch: AudioBatch) -> float:
        return float(batch.lengths_B.sum()) / SAMPLE_RATE

    def _describe(self, batch: AudioBatch) -> str:
        return f"utterances {[str(self.train[i].audio) for i in batch.indices[:3]]}"


class PretrainedTrainer(AudioLoop):
    """Fine-tunes a pretrained encoder with CTC; the folder is like that of a student's run."""

    def __init__(
        self,
        run: Path,
        teacher: Pretrained,
        tokenizer: Tokenizer,
        train: Sequence[Utterance],
        dev: Sequence[Utterance],
        weights: Sequence[float],
        config: LoopConfig,
        origin: dict[str, Any],
    ) -> None:
        self.teacher, self.tokenizer, self.dev, self.origin = teacher, tokenizer, dev, origin
        super().__init__(
            run,
            _Objective(teacher),
            config,
            model_config=teacher.encoder.config,
            train=train,
            weights=weights,
            targets=[tokenizer.encode(u.text) for u in train],
        )

    def _name(self, name: str) -> str:
        return name.removeprefix("teacher.")

    def _write(self, name: str, raw: Tensors | None, optimizer: Tensors | None) -> None:
        state = {
            "progress": dataclasses.asdict(self.progress),
            "training": dataclasses.asdict(self.config),
            "origin": self.origin,
        }
        save_folder(
            self.run / name,
            self.teacher.to_dict(),
            self.tokenizer,
            state,
            {"model": self.average, "raw": raw, "optimizer": optimizer},
        )

    def _check(self, folder: Path) -> None:
        if read_json(folder / "config.json") != json.loads(json.dumps(self.teacher.to_dict())):
            raise CheckpointError(
                f"{folder}: the run that it belongs to trains another teacher; choose another "
                "folder for the run"
            )

    def _score(self) -> tuple[float, dict[str, float]]:
        self.teacher.eval()
        scores: dict[str, Score] = {}
        samples = [round(u.duration * SAMPLE_RATE) for u in self.dev]
        limit = round(self.config.batch_seconds * SAMPLE_RATE)
        for indices in epoch_batches(samples, [1.0] * len(samples), limit, seed=0):
            waves = [read_wave(self.dev[i], self.least) for i in indices]
            for i, (logs, _) in zip(indices, listen(self.teacher, waves), strict=True):
                u = self.dev[i]
                ids = ctc_greedy(logs.argmax(1).tolist(), Pretrained.blank)
                score = Score.of(u.text, self.tokenizer.decode(ids))
                scores[u.source] = scores.get(u.source, Score()) + score
        total = sum(scores.values(), Score())
        return total.wer, {f"wer.{source}": s.wer for source, s in sorted(scores.items())}


def listen(teacher: Pretrained, waves: Sequence[Tensor]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities (N, V) and encoder output (N, E) of each recording."""
    device = teacher.ctc.weight.device
    batch = AudioBatch(waves, [[] for _ in waves], range(len(waves)))
    with torch.no_grad():
        logs, frames, encoded = teacher(batch.wave_BT.to(device), batch.lengths_B.to(device))
    return [
        (logs[i, :n].float().cpu().numpy(), encoded[i, :n].float().cpu().numpy())
        for i, n in enumerate(frames.tolist())
    ]


@dataclass(frozen=True)
class PretrainedCheckpoint:
    """A fine-tuned encoder ready for use."""

    teacher: Pretrained
    tokenizer: Tokenizer
    state: dict[str, Any]


def load_pretrained(folder: Path) -> PretrainedCheckpoint:
    """Read what :class:`PretrainedTrainer` wrote.

    Raises:
        CheckpointError: a file is missing, unreadable, or does not fit.
    """
    try:
        teacher = Pretrained.from_dict(read_json(folder / "config.json"))
        weights = read_tensors(folder / "model.safetensors")
        names = {name for name, _ in teacher.named_parameters()}
        if names != weights.keys():
            raise KeyError(min(names ^ weights.keys()))
        teacher.load_state_dict(weights, strict=False)  # buffers are no weights
        tokenizer = Tokenizer.load(folder / "tokens.spm")
    except (KeyError, RuntimeError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: no teacher that can be read ({error})") from error
    return PretrainedCheckpoint(teacher.eval(), tokenizer, read_json(folder / "state.json"))
