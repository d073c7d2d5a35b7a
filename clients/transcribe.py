"""``loquent transcribe``: write down audio files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loquent.clients.cli import EXIT_ERROR, EXIT_USAGE, fail
from loquent.clients.live import recognise, stream_rate
from loquent.clients.options import (
    add_decoder_options,
    add_model_options,
    add_session_options,
    load_recognizer,
    make_parser,
    open_stream,
)
from loquent.clients.output import open_output, refusal
from loquent.clients.terminal import ProgressBar
from loquent.engine.audio import AudioFile
from loquent.engine.errors import AudioError
from loquent.engine.events import Ended, Final
from loquent.engine.recognizer import Recognizer
from loquent.engine.subtitles import srt, vtt

EXAMPLES = """\
  loquent transcribe talk.mp3
  loquent transcribe --format json *.wav > talks.jsonl
  loquent transcribe --format srt -o talk.srt talk.opus
  loquent transcribe --format vtt -o subtitles/ *.flac"""


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """What was said in one file; duration in seconds."""

    file: str
    duration: float
    finals: tuple[Final, ...]

    def render(self, kind: str) -> str:
        """As text (a line per segment), json (one line), srt or vtt."""
        match kind:
            case "json":
                return json.dumps(self._fields(), ensure_ascii=False) + "\n"
            case "srt":
                return srt(self.finals)
            case "vtt":
                return vtt(self.finals)
        return "".join(f"{final.text}\n" for final in self.finals)

    def _fields(self) -> dict[str, object]:
        return {
            "file": self.file,
            "text": " ".join(final.text for final in self.finals),
            "duration": round(self.duration, 3),
            "segments": [
                {
                    "start": round(final.start, 3),
                    "end": round(final.end, 3),
                    "text": final.text,
                    "words": [asdict(word) for word in final.words],
                }
                for final in self.finals
            ],
        }


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = make_parser(
        "transcribe",
        "Write down audio files: wav, flac, ogg, opus or mp3, any sample rate, mono or stereo.",
        EXAMPLES,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="an audio file")
    parser.add_argument(
        "--format",
        choices=["text", "json", "srt", "vtt"],
        default="text",
        help="text: a line per segment; json: a line per file with the times of all words; "
        "srt, vtt: subtitles (default: text)",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="write to this file, or, if it is a folder or ends with /, one file per recording "
        "into it (default: standard output)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    add_model_options(parser)
    add_decoder_options(parser)
    add_session_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options = parser().parse_args(argv)
    folder = _output_folder(options.output)
    if options.format in ("srt", "vtt") and len(options.files) > 1 and folder is None:
        return fail(
            f"got {len(options.files)} recordings, but one {options.format} file holds only one; "
            "give a folder with -o FOLDER/, or use --format json",
            EXIT_USAGE,
        )
    if folder is not None and (twice := _same_output(options.files)):
        return fail(
            f"{twice[0]} and {twice[1]} would be written to the same file; run them one by one",
            EXIT_USAGE,
        )
    targets = _targets(options, folder)
    if why := refusal(set(targets.values()), options.files):
        return fail(why, EXIT_USAGE)
    recognizer = load_recognizer(options)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

        def put(name: str, text: str) -> None:
            with open_output(targets[name]) as write:
                write(text)

        return _run(recognizer, options, put)
    headed = options.format == "text" and len(options.files) > 1
    with open_output(targets.get(options.files[0])) as write:
        return _run(
            recognizer,
            options,
            lambda name, text: write(f"==> {name} <==\n{text}" if headed else text),
        )


def _run(
    recognizer: Recognizer, options: argparse.Namespace, put: Callable[[str, str], object]
) -> int:
    status = 0
    for name in options.files:
        try:
            text = _transcribe(recognizer, options, name).render(options.format)
        except AudioError as exc:
            status = fail(str(exc), EXIT_ERROR)
        else:
            put(name, text)
    return status


def _transcribe(recognizer: Recognizer, options: argparse.Namespace, name: str) -> Transcript:
    file = AudioFile(name)
    rate = stream_rate(file)
    stream = open_stream(recognizer, options, rate)
    bar = ProgressBar(
        sys.stderr, Path(name).name, file.duration, live=False if options.quiet else None
    )
    finals: list[Final] = []
    duration = 0.0
    try:
        blocks = bar.watch(file.blocks(sample_rate=rate), lambda: stream.processed)
        for event in recognise(recognizer, stream, blocks):
            if isinstance(event, Final):
                finals.append(event)
            elif isinstance(event, Ended):
                duration = event.duration
    finally:
        bar.close()
    return Transcript(file=name, duration=duration, finals=tuple(finals))


def _output_folder(output: str | None) -> Path | None:
    if output is not None and (output.endswith("/") or Path(output).is_dir()):
        return Path(output)
    return None


def _targets(options: argparse.Namespace, folder: Path | None) -> dict[str, Path]:
    """The file that the text of each recording goes to; none for standard output."""
    if options.output is None:
        return {}
    if folder is None:
        return dict.fromkeys(options.files, Path(options.output))
    suffix = ".txt" if options.format == "text" else f".{options.format}"
    return {name: folder / Path(name).with_suffix(suffix).name for name in options.files}


def _same_output(names: Sequence[str]) -> tuple[str, str] | None:
    seen: dict[str, str] = {}
    for name in names:
        first = seen.setdefault(Path(name).stem, name)
        if first != name:
            return first, name
    return None
