"""``loquent distill``: a teacher hears recordings; what it says is kept for a student.

Posteriors go into a folder that `loquent train student --distil FOLDER` takes; with --pseudo the
text that it heard, where it was sure, goes into a manifest to train on. A Whisper as it was
published is a teacher, too, of what its encoder gives out (--encoder).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from tqdm import tqdm

from loquent.engine.features import Fbank, whisper_spec
from loquent.models.checkpoint import CheckpointError, load_checkpoint, read_json, recover
from loquent.models.data import DataError, FeatureCache, Utterance, collate, read_manifest
from loquent.models.devices import cpu_has_bf16
from loquent.models.options import guarded, read_shares
from loquent.models.posteriors import PosteriorWriter, key_of
from loquent.models.scoring import ctc_greedy
from loquent.models.student import Student
from loquent.models.teacher import is_whisper, source_name, whisper_teacher
from loquent.models.tokens import BLANK, Tokenizer
from loquent.models.training import WHOLE
from loquent.models.whisper import load_whisper

Heard = tuple[NDArray[np.float32], NDArray[np.float32]]
# Whisper has learnt with 30 s each time, mostly silence behind the speech. Without any its output
# is another one (models/README.md has figures), and this much is nearly as good as all.
_SILENCE = 3.0  # seconds


class Teacher(Protocol):
    """Whatever hears recordings.

    Attributes:
        tokenizer: of its vocabulary, blank 0.
        width: of its encoder's output.
        about: what it is, for the folder and the model card; no paths.
        headless: its head has learnt nothing, only its encoder's output counts.
    """

    tokenizer: Tokenizer
    width: int
    about: dict[str, Any]
    headless: bool

    def prepare(self, utterances: Sequence[Utterance], features: Path) -> None:
        """What will be heard; ``features`` is where features may be kept."""

    def listen(self, indices: Sequence[int]) -> list[Heard]:
        """Log-probabilities (N, V) and encoder output (N, E) of these utterances."""


class StudentTeacher:
    """A student's checkpoint (a Whisper teacher is one), with the whole utterance in view.

    It hears some silence behind each utterance, too; what it says of that is not given.
    """

    def __init__(
        self,
        student: Student,
        tokenizer: Tokenizer,
        about: dict[str, Any],
        *,
        headless: bool = False,
    ) -> None:
        self._student, self.tokenizer, self.headless = student, tokenizer, headless
        self.width = self._student.config.encoder.width
        spec = whisper_spec()
        self._silence = torch.from_numpy(Fbank(spec).pad_frame)
        self._behind = round(_SILENCE * spec.sample_rate / spec.hop)
        self.about = about | {"silence": _SILENCE}
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._student.to(self._device)

    def prepare(self, utterances: Sequence[Utterance], features: Path) -> None:
        self._cache = FeatureCache(utterances, whisper_spec(), features)

    def listen(self, indices: Sequence[int]) -> list[Heard]:
        encoder = self._student.config.encoder
        clips = [torch.from_numpy(self._cache[i].astype(np.float32)) for i in indices]
        counts = [-(-len(clip) // encoder.subsampling) for clip in clips]
        behind = self._silence.expand(self._behind, -1)
        batch = collate(
            [torch.cat([clip, behind]) for clip in clips],
            [[] for _ in indices],
            indices,
            self._silence,
            multiple=encoder.subsampling,
            room=encoder.lookahead,
        )
        x, lengths = batch.x_BTF.to(self._device), batch.lengths_B.to(self._device)
        kind = self._device.type
        half = torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" or cpu_has_bf16())
        with torch.no_grad(), half:
            encoded, _ = self._student(x, lengths, WHOLE, 0)
            logs = self._student.ctc_log_probs(encoded)
        return [
            (logs[i, :n].float().cpu().numpy(), encoded[i, :n].float().cpu().numpy())
            for i, n in enumerate(counts)
        ]


class PretrainedTeacher:
    """A fine-tuned encoder of the wav2vec 2.0 family."""

    headless = False

    def __init__(self, folder: Path) -> None:
        from loquent.models.pretrained import load_pretrained

        checkpoint = load_pretrained(folder)
        self._teacher, self.tokenizer = checkpoint.teacher, checkpoint.tokenizer
        self.width = self._teacher.width
        self.about = _about(checkpoint.state)
        self._teacher.to("cuda" if torch.cuda.is_available() else "cpu")
        self._utterances: Sequence[Utterance] = ()

    def prepare(self, utterances: Sequence[Utterance], features: Path) -> None:
        self._utterances = utterances

    def listen(self, indices: Sequence[int]) -> list[Heard]:
        from loquent.models.pretrained import listen, read_wave, shortest

        least = shortest(self._teacher.encoder.config)
        return listen(self._teacher, [read_wave(self._utterances[i], least) for i in indices])


def _about(state: dict[str, Any]) -> dict[str, Any]:
    return {"origin": state.get("origin", {}), "progress": state.get("progress", {})}


def load_teacher(source: str, tokens: Path | None = None) -> Teacher:
    """The teacher of a checkpoint folder of `loquent train`, or a published Whisper's encoder.

    Args:
        source: the folder; or a Whisper, see :func:`~loquent.models.whisper.load_whisper`.
        tokens: subwords of the student, if it is a Whisper, which has others.

    Raises:
        CheckpointError: neither is there.
        DataError: a Whisper without ``tokens``.
    """
    folder = Path(source)
    recover(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("kind") == "pretrained":
        return PretrainedTeacher(folder)
    if "encoder" in config:
        checkpoint = load_checkpoint(folder)
        about = _about(checkpoint.state)
        return StudentTeacher(checkpoint.student, checkpoint.tokenizer, about)
    if folder.is_dir() and not config and not (folder / "model.bin").exists():
        raise CheckpointError(
            f"{folder}: no config.json; expected a checkpoint folder as `loquent train` writes "
            "(RUN/last or RUN/best), or a Whisper"
        )
    try:
        whisper = is_whisper(source)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; nor a checkpoint folder of `loquent train`") from error
    if not whisper:
        raise CheckpointError(
            f"{source}: a published encoder that is no Whisper; make a teacher of it first, with "
            "`loquent train teacher`"
        )
    if tokens is None:
        raise DataError(f"{source}: has none of our subwords; give the student's with --tokens")
    try:
        tokenizer = Tokenizer.load(tokens)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"--tokens {tokens}: no SentencePiece model ({error})") from error
    teacher = whisper_teacher(load_whisper(source), tokenizer.size)
    about = {"origin": {"start": source_name(source)}}
    return StudentTeacher(teacher, tokenizer, about, headless=True)


def transcript(logs_NV: NDArray[np.float32], tokenizer: Tokenizer) -> tuple[str, float]:
    """Greedy text, and how sure it is: the geometric mean of the tokens' best probabilities."""
    labels = logs_NV.argmax(1)
    spans: list[float] = []
    before = BLANK
    for label, log in zip(labels.tolist(), logs_NV.max(1).tolist(), strict=True):
        if label != BLANK:
            if label == before:
                spans[-1] = max(spans[-1], log)
            else:
                spans.append(log)
        before = label
    text = tokenizer.decode(ctc_greedy(labels.tolist(), BLANK))
    return text, float(np.exp(np.mean(spans))) if spans else 0.0


def _text_logs(heard: Sequence[Heard], targets: Sequence[Sequence[int]]) -> list[float | None]:
    """Log-posterior of each text over all alignments; None where there is none."""
    result: list[float | None] = []
    for (logs, _), target in zip(heard, targets, strict=True):
        if not target:
            result.append(None)
            continue
        loss = F.ctc_loss(
            torch.from_numpy(logs)[:, None],
            torch.tensor([target]),
            torch.tensor([len(logs)]),
            torch.tensor([len(target)]),
            blank=BLANK,
            reduction="sum",
        )
        result.append(-loss.item() if torch.isfinite(loss) else None)
    return result


def cache_outputs(
    teacher: Teacher,
    utterances: Sequence[Utterance],
    folder: Path,
    *,
    features: Path,
    kept: int = 8,
    keep_features: bool = False,
    batch_seconds: float = 60.0,
) -> dict[str, dict[str, Any]]:
    """Run the teacher over what the cache lacks; returns the cache's index by utterance.

    Args:
        kept: see :class:`PosteriorWriter`.
    """
    width = teacher.width if keep_features else 0
    utterances = list({key_of(u): u for u in reversed(utterances)}.values())[::-1]
    with PosteriorWriter(folder, teacher.tokenizer, teacher.about, kept, width) as writer:
        missing = [i for i, u in enumerate(utterances) if key_of(u) not in writer.done]
        if missing:
            teacher.prepare(utterances, features)
        total = sum(u.duration for u in utterances)
        left = sum(utterances[i].duration for i in missing)
        bar = tqdm(total=round(total), initial=round(total - left), unit="s audio")
        for batch in _by_length(utterances, missing, batch_seconds):
            heard = teacher.listen(batch)
            rows = [utterances[i] for i in batch]
            more: list[dict[str, Any]] = [{} for _ in rows]
            if kept:
                scores = _text_logs(heard, [teacher.tokenizer.encode(u.text) for u in rows])
                for entry, (logs, _), score in zip(more, heard, scores, strict=True):
                    text, confidence = transcript(logs, teacher.tokenizer)
                    entry |= {"text": text, "confidence": round(confidence, 4), "text_log": score}
            writer.add(
                rows,
                [logs for logs, _ in heard],
                [encoded for _, encoded in heard] if keep_features else None,
                more,
            )
            bar.update(round(sum(u.duration for u in rows)))
        bar.close()
        return dict(writer.done)


def _by_length(
    utterances: Sequence[Utterance], indices: Sequence[int], seconds: float
) -> list[list[int]]:
    batches: list[list[int]] = []
    for i in sorted(indices, key=lambda i: utterances[i].duration):
        # Sorted, so the newcomer is the longest.
        if batches and utterances[i].duration * (len(batches[-1]) + 1) <= seconds:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def write_pseudo(
    manifest: Path,
    output: Path,
    index: dict[str, dict[str, Any]],
    *,
    confidence: float,
    exclude_licences: Sequence[str] = (),
) -> tuple[int, float]:
    """Rows of ``manifest`` with the teacher's text where it was sure; their number and hours."""
    kept, hours = [], 0.0
    for line in manifest.read_text("utf-8").split("\n"):
        if not line.strip():
            continue
        row: dict[str, Any] = json.loads(line)
        audio = manifest.parent / row["audio"]
        entry = index.get(str(audio.resolve()))
        licence = str(row.get("licence", ""))
        if entry is None or any(part in licence for part in exclude_licences):
            continue
        if entry["text"] and entry["confidence"] >= confidence:
            row |= {
                "audio": os.path.relpath(audio.resolve(), output.parent.resolve()),
                "text": entry["text"],
                "confidence": entry["confidence"],
            }
            kept.append(json.dumps(row, ensure_ascii=False) + "\n")
            hours += float(row["duration"]) / 3600
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".part")
    partial.write_text("".join(kept), "utf-8")
    partial.replace(output)
    return len(kept), hours


def _run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.pseudo and not args.unlabelled:
        raise DataError("--pseudo needs --unlabelled MANIFEST to write the text of")
    exclude = args.exclude_licence
    utterances, _, _ = read_shares(args.data, exclude)
    for path in args.unlabelled:
        rows = read_manifest(path, exclude_licences=exclude, labelled=False)
        utterances += [u for u in rows if u.duration <= 30.0]
    if not utterances:
        raise DataError("nothing to listen to; give --data or --unlabelled")
    teacher = load_teacher(args.teacher, args.tokens)
    if teacher.headless and (args.pseudo or not args.encoder):
        raise DataError(
            f"{args.teacher}: as published it writes none of our subwords; give --encoder for what "
            "its encoder gives out, and no --pseudo, or make a teacher of it with "
            "`loquent train teacher`"
        )
    index = cache_outputs(
        teacher,
        utterances,
        args.output,
        features=args.features or args.output / "features",
        kept=0 if teacher.headless else args.kept,
        keep_features=args.encoder,
        batch_seconds=args.batch_seconds,
    )
    result: dict[str, Any] = {"utterances": len(index)}
    if args.pseudo:
        for path in args.unlabelled:
            name = args.pseudo / f"{path.stem}.pseudo.jsonl"
            count, hours = write_pseudo(
                path, name, index, confidence=args.confidence, exclude_licences=exclude
            )
            print(f"{name.name}: {count} utterances, {hours:.2f} h")
            result[name.name] = count
    print(json.dumps(result))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="loquent distill",
        description=__doc__,
        epilog="A killed run goes on where it was: give the same command again.",
    )
    parser.add_argument(
        "teacher",
        help="checkpoint folder, for example RUN/best; or a Whisper: hub id, folder or CTranslate2 "
        "model.bin",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the posteriors")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="MANIFEST[=SHARE]",
        help="with text; a share, as `loquent train` takes it, changes nothing here",
    )
    parser.add_argument(
        "--unlabelled", type=Path, action="append", default=[], metavar="MANIFEST", help="without"
    )
    parser.add_argument("--exclude-licence", action="append", default=[], metavar="TEXT")
    parser.add_argument("--features", type=Path, help="folder of the feature cache")
    parser.add_argument(
        "--kept", type=int, default=8, help="tokens kept of each frame (default %(default)s)"
    )
    parser.add_argument(
        "--encoder", action="store_true", help="keep the encoder's output too, in half precision"
    )
    parser.add_argument(
        "--tokens", type=Path, metavar="FILE", help="subwords of the student, for a Whisper"
    )
    parser.add_argument(
        "--pseudo", type=Path, metavar="FOLDER", help="write manifests with the teacher's text here"
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.8,
        help="least mean probability of a token in such a text (default %(default)s)",
    )
    parser.add_argument("--batch-seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: all)")
    args = parser.parse_args(argv)
    return guarded(parser, lambda: _run(args))
