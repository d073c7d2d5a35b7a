"""``loquent pretrain``: an encoder goes on learning from speech without text.

wav2vec 2.0's task (arXiv 2006.11477): of masked frames, tell the quantised truth from distractors.
The model with its quantiser is transformers' ``Wav2Vec2ForPreTraining``; RUN/last and RUN/best are
folders in its own format, which `loquent train teacher --teacher` takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from loquent.models.checkpoint import CheckpointError, Tensors, read_json, save_folder
from loquent.models.data import DataError, Utterance, epoch_batches, read_manifest
from loquent.models.loop import LoopConfig
from loquent.models.options import (
    RESUMES,
    about,
    add_loop_options,
    guarded,
    loop_settings,
    start_torch,
)
from loquent.models.pretrained import (
    SAMPLE_RATE,
    AudioBatch,
    AudioLoop,
    Pretrained,
    frames_of,
    model_type,
    read_wave,
    wants_normalised,
)


def load_for_pretraining(source: str) -> tuple[Any, bool]:
    """The model of a hub id or folder, and whether it wants normalised samples.

    A quantiser that the source lacks (a fine-tuned model has none) starts from random weights.

    Raises:
        CheckpointError: nothing readable there, or it is no wav2vec 2.0.
    """
    from transformers import Wav2Vec2ForPreTraining

    kind = model_type(source)
    if kind != "wav2vec2":
        raise CheckpointError(f"{source}: is a {kind}, expected a wav2vec2 (XLS-R and MMS are)")
    try:
        loaded: Any = Wav2Vec2ForPreTraining.from_pretrained(
            source, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{source}: cannot be loaded ({error})") from error
    model, report = loaded
    missing = sorted(n for n in report["missing_keys"] if n.startswith("wav2vec2."))
    if missing := [n for n in missing if "masked_spec_embed" not in n]:
        raise CheckpointError(f"{source}: {missing[0]} is missing, {len(missing)} weights in all")
    if model.config.feat_extract_norm == "group":
        raise CheckpointError(
            f"{source}: its CNN normalises over time, so that padding changes what it hears; "
            "expected feat_extract_norm = layer, as XLS-R has it"
        )
    return model.float(), wants_normalised(source, model.config)


class _Objective(nn.Module):
    """The contrastive loss with the quantiser's diversity."""

    def __init__(self, model: Any, *, normalise: bool) -> None:
        super().__init__()
        self.model, self.normalise = model, normalise

    def forward(self, batch: AudioBatch, step: int) -> dict[str, Tensor]:
        from transformers.models.wav2vec2.modeling_wav2vec2 import (
            _compute_mask_indices,
            _sample_negative_indices,
        )

        config = self.model.config
        device = next(self.model.parameters()).device
        lengths = batch.lengths_B.to(device)
        wave = Pretrained.prepared(batch.wave_BT.to(device), lengths, self.normalise)
        frames = frames_of(config, batch.lengths_B)
        shape = (len(frames), int(frames.max()))
        valid = torch.arange(shape[1]) < frames[:, None]
        # Seeded by the loop: transformers draws with NumPy's global generator.
        masked = _compute_mask_indices(
            shape,
            mask_prob=config.mask_time_prob,
            mask_length=min(config.mask_time_length, max(1, int(frames.min()) - 1)),
            attention_mask=cast(Any, valid.long()),
            min_masks=max(2, config.mask_time_min_masks),
        )
        negatives = _sample_negative_indices(shape, config.num_negatives, masked)
        # Annealed as in the paper's appendix: a soft choice at first, a hard one later.
        self.model.set_gumbel_temperature(max(2.0 * 0.999995**step, 0.5))
        out = self.model(
            wave,
            attention_mask=(torch.arange(wave.shape[1], device=device) < lengths[:, None]).long(),
            mask_time_indices=torch.from_numpy(masked).to(device),
            sampled_negative_indices=torch.from_numpy(negatives).to(device),
        )
        return {
            "loss": out.loss,
            "count": torch.tensor(float(masked.sum()), device=device),
            "contrastive": out.contrastive_loss,
            "diversity": out.diversity_loss,
        }


class PretrainingTrainer(AudioLoop):
    """One run in one folder, watched by the contrastive loss on the dev set."""

    metric = "loss"

    def __init__(
        self,
        run: Path,
        model: Any,
        train: Sequence[Utterance],
        dev: Sequence[Utterance],
        config: LoopConfig,
        origin: dict[str, Any],
        *,
        normalise: bool,
    ) -> None:
        self.model, self.dev, self.origin, self.normalise = model, dev, origin, normalise
        super().__init__(
            run,
            _Objective(model, normalise=normalise),
            config,
            model_config=model.config,
            train=train,
            weights=[1.0] * len(train),
            targets=[[] for _ in train],
        )

    def _name(self, name: str) -> str:
        return name.removeprefix("model.")

    def _shape(self) -> dict[str, Any]:
        shape: dict[str, Any] = json.loads(self.model.config.to_json_string(use_diff=False))
        return shape | {"architectures": ["Wav2Vec2ForPreTraining"]}

    def _write(self, name: str, raw: Tensors | None, optimizer: Tensors | None) -> None:
        state = {
            "progress": dataclasses.asdict(self.progress),
            "training": dataclasses.asdict(self.config),
            "origin": self.origin,
        }
        features = {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": 1,
            "sampling_rate": SAMPLE_RATE,
            "padding_value": 0.0,
            "do_normalize": self.normalise,
            "return_attention_mask": True,
        }
        save_folder(
            self.run / name,
            self._shape(),
            None,
            state,
            {"model": self.average, "raw": raw, "optimizer": optimizer},
            more={"preprocessor_config.json": features},
        )

    def _check(self, folder: Path) -> None:
        if read_json(folder / "config.json") != self._shape():
            raise CheckpointError(
                f"{folder}: the run that it belongs to trains another model; choose another "
                "folder for the run"
            )

    def _score(self) -> tuple[float, dict[str, float]]:
        self.module.eval()
        torch.manual_seed(0)
        np.random.seed(0)
        loss = count = 0.0
        samples = [round(u.duration * SAMPLE_RATE) for u in self.dev]
        limit = round(self.config.batch_seconds * SAMPLE_RATE)
        for indices in epoch_batches(samples, [1.0] * len(samples), limit, seed=0):
            waves = [read_wave(self.dev[i], self.least) for i in indices]
            with torch.no_grad():
                values = self.module(AudioBatch(waves, [[] for _ in waves], indices), 0)
            loss += float(values["contrastive"])
            count += float(values["count"])
        return loss / max(count, 1.0), {}


def _unlabelled(path: Path, exclude: Sequence[str]) -> list[Utterance]:
    rows = read_manifest(path, exclude_licences=exclude, labelled=False)
    return [u for u in rows if 1.0 <= u.duration <= 30.0]


def _run(args: argparse.Namespace) -> None:
    start_torch(args)
    train: list[Utterance] = []
    names: list[str] = []
    for path in args.data:
        rows = _unlabelled(path, args.exclude_licence)
        train += rows
        names.append(about(path, rows, 1.0))
    dev = _unlabelled(args.dev, [])
    if not train or not dev:
        raise DataError("no recording of 1 to 30 s is left to train on, or none in --dev")
    print("\n".join(names))
    model, normalise = load_for_pretraining(args.teacher)
    origin = {
        "data": names,
        "excluded_licences": args.exclude_licence,
        "start": Path(args.teacher).name if Path(args.teacher).exists() else args.teacher,
    }
    config = LoopConfig(**loop_settings(args))
    trainer = PretrainingTrainer(args.run, model, train, dev, config, origin, normalise=normalise)
    trainer.fit()
    print(json.dumps({"run": str(args.run), **vars(trainer.progress)}))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="loquent pretrain", description=__doc__, epilog=RESUMES)
    parser.add_argument(
        "--teacher", required=True, metavar="SOURCE", help="wav2vec 2.0: hub id or folder"
    )
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        type=Path,
        metavar="MANIFEST",
        help="JSONL manifest of speech, with or without text",
    )
    parser.add_argument("--dev", required=True, type=Path, help="JSONL manifest to watch")
    parser.add_argument("--run", required=True, type=Path, help="folder of the run")
    parser.add_argument("--exclude-licence", action="append", default=[], metavar="TEXT")
    add_loop_options(parser, steps=20000, batch_seconds=80.0, lr=5e-5, head_lr=5e-5)
    args = parser.parse_args(argv)
    return guarded(parser, lambda: _run(args))
