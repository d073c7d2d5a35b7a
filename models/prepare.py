"""``loquent data prepare``: corpora of other forms to our JSONL manifests, and to lhotse's.

Kaldi folders and LibriSpeech are read by lhotse; Common Voice's TSV is plain enough to read here.
A recording that a row uses whole is referred to where it lies; a part of one (Kaldi's segments,
cuts, shards) is written as FLAC beside the manifest.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lhotse
import soundfile
from tqdm import tqdm

from loquent.engine.audio import AudioFile
from loquent.engine.errors import AudioError
from loquent.models.data import DataError

# lhotse's names for what our rows call otherwise.
_OWN = ("id", "audio", "text", "duration", "lang", "speaker")
FORMATS = ("jsonl", "kaldi", "common-voice", "librispeech", "lhotse")


def read(kind: str, source: Path, *, split: str | None = None) -> lhotse.CutSet:
    """A corpus as lhotse's cuts, one supervision each.

    Args:
        kind: one of ``FORMATS``.
        source: a JSONL manifest; a Kaldi folder (wav.scp, text, ...); a Common Voice TSV with
            ``clips/`` beside it; LibriSpeech's folder; lhotse's cuts (``.jsonl``, ``.jsonl.gz``) or
            a folder of shards.
        split: of LibriSpeech, for example ``train-clean-100``; all that are there if None.

    Raises:
        DataError: it is not of this form.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    try:
        if kind == "jsonl":
            return lhotse.CutSet.from_cuts(_from_rows(_jsonl(source), source.parent))
        if kind == "common-voice":
            return lhotse.CutSet.from_cuts(_from_rows(_common_voice(source), source.parent))
        if kind == "kaldi":
            return _kaldi(source)
        if kind == "librispeech":
            return _librispeech(source, split)
        if source.is_dir():
            return lhotse.CutSet.from_shar(in_dir=source)
        return lhotse.CutSet.from_file(source)
    except (OSError, ValueError, KeyError, TypeError, AssertionError, AudioError) as error:
        raise DataError(f"{source}: not {kind} ({type(error).__name__}: {error})") from error


def _jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    for line in path.read_text("utf-8").split("\n"):
        if line.strip():
            yield json.loads(line)


def _common_voice(path: Path) -> Iterator[Mapping[str, Any]]:
    """Common Voice's columns: client_id, path, sentence, locale, accents, gender, age."""
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            extra = {k: row[k] for k in ("accents", "gender", "age") if row.get(k)}
            if "accents" in extra:
                extra["accent"] = extra.pop("accents")
            yield {
                "id": Path(row["path"]).stem,
                "audio": f"clips/{row['path']}",
                "text": row["sentence"],
                "lang": row.get("locale") or "",
                "speaker": row["client_id"],
                "source": "common-voice",
                "licence": "CC0-1.0",
                **extra,
            }


def _from_rows(rows: Iterator[Mapping[str, Any]], folder: Path) -> Iterator[lhotse.MonoCut]:
    for number, row in enumerate(rows):
        path = folder / row["audio"]
        AudioFile(path)  # says more of a file that is none than lhotse does
        name = str(row.get("id") or f"{path.stem}-{number}")
        recording = lhotse.Recording.from_file(path, recording_id=name)
        segment = lhotse.SupervisionSegment(
            id=name,
            recording_id=name,
            start=0.0,
            duration=recording.duration,
            text=row["text"],
            language=row.get("lang") or None,
            speaker=row.get("speaker") or None,
            custom={k: v for k, v in row.items() if k not in _OWN} or None,
        )
        yield lhotse.MonoCut(
            id=name,
            start=0.0,
            duration=recording.duration,
            channel=0,
            recording=recording,
            supervisions=[segment],
        )


def _kaldi(folder: Path) -> lhotse.CutSet:
    for line in (folder / "wav.scp").read_text("utf-8").splitlines():
        if line.rstrip().endswith("|"):
            raise ValueError(
                f"wav.scp has the command {line.split(maxsplit=1)[1]!r}, and commands of strangers "
                "are not run; write its output to a file and name that"
            )
    rate = AudioFile((folder / "wav.scp").read_text("utf-8").split(maxsplit=2)[1]).sample_rate
    recordings, supervisions, _ = lhotse.kaldi.load_kaldi_data_dir(folder, sampling_rate=rate)
    if supervisions is None:
        raise ValueError("no text or segments")
    cuts = lhotse.CutSet.from_manifests(recordings=recordings, supervisions=supervisions)
    return cuts.trim_to_supervisions(keep_overlapping=False)


def _librispeech(folder: Path, split: str | None) -> lhotse.CutSet:
    from lhotse.recipes import prepare_librispeech

    parts = prepare_librispeech(folder, dataset_parts=split or "auto")
    cuts = [
        lhotse.CutSet.from_manifests(**manifests).to_eager()
        for _, manifests in sorted(parts.items())
    ]
    return cast(lhotse.CutSet, sum(cuts[1:], cuts[0]))


def write_jsonl(
    cuts: lhotse.CutSet, out: Path, *, defaults: Mapping[str, str] | None = None
) -> int:
    """Our manifest; returns the number of rows.

    Args:
        cuts: what :func:`read` gave.
        out: the manifest. It appears when it is complete.
        defaults: fields for rows that do not have them: lang, source, licence.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    audio = out.with_name(out.stem + ".audio")
    partial = out.with_name(out.name + ".part")
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        for cut in tqdm(cuts, unit="clip", disable=None):
            for segment in cut.supervisions[:1]:
                row: dict[str, Any] = {
                    "id": segment.id,
                    "audio": _place(cut, audio, out.parent),
                    "duration": round(cut.duration, 3),
                    "text": segment.text or "",
                    "lang": segment.language or "",
                    "speaker": segment.speaker or "",
                    **(segment.custom or {}),
                }
                for key, value in (defaults or {}).items():
                    row[key] = row.get(key) or value
                row = {k: v for k, v in row.items() if v != "" or k == "text"}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
    partial.replace(out)
    return count


def _place(cut: Any, audio: Path, folder: Path) -> str:
    """Where the samples of a cut are, relative to ``folder``; written there if need be."""
    sources = cut.recording.sources
    whole = cut.start == 0 and abs(cut.duration - cut.recording.duration) < 1e-3
    if whole and len(sources) == 1 and sources[0].type == "file" and not cut.recording.transforms:
        return os.path.relpath(sources[0].source, folder)
    path = audio / f"{cut.id.replace('/', '_')}.flac"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        samples = cut.load_audio().mean(axis=0)
        soundfile.write(partial, samples, cut.sampling_rate, format="FLAC")
        partial.replace(path)
    return os.path.relpath(path, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``loquent data prepare``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="loquent data prepare", description=__doc__)
    parser.add_argument("format", choices=FORMATS, help="what the source is")
    parser.add_argument("source", type=Path)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="NAME.jsonl: our manifest; NAME.jsonl.gz: lhotse's cuts; else a folder of shards",
    )
    parser.add_argument("--split", help="part of LibriSpeech, for example train-clean-100")
    parser.add_argument("--lang", default="", help="language of rows that do not name theirs")
    parser.add_argument("--name", default="", help="source of rows that do not name theirs")
    parser.add_argument("--licence", default="", help="licence of rows that do not name theirs")
    parser.add_argument(
        "--shard-size", type=int, default=1000, help="clips in a shard (default %(default)s)"
    )
    args = parser.parse_args(argv)
    cuts = read(args.format, args.source, split=args.split)
    defaults = {"lang": args.lang, "source": args.name, "licence": args.licence}
    out: Path = args.output
    try:
        if out.suffix == ".jsonl":
            count = write_jsonl(cuts, out, defaults={k: v for k, v in defaults.items() if v})
        elif out.name.endswith(".jsonl.gz"):
            out.parent.mkdir(parents=True, exist_ok=True)
            cuts = cuts.to_eager()
            cuts.to_file(out)
            count = len(cuts)
        else:
            out.mkdir(parents=True, exist_ok=True)
            cuts = cuts.to_eager()
            cuts.to_shar(out, fields={"recording": "flac"}, shard_size=args.shard_size)
            count = len(cuts)
    except (OSError, ValueError, AudioError) as error:
        raise DataError(f"{args.source}: {error}") from error
    print(f"{out}: {count} clips", file=sys.stderr)
    return 0
