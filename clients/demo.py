"""``loquent demo``: caption the bundled sample clip as though it came from a microphone."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources import as_file, files

from loquent.clients.cli import fail
from loquent.clients.live import Float32, recognise, stream_rate
from loquent.clients.options import (
    add_decoder_options,
    add_model_options,
    add_session_options,
    load_recognizer,
    make_parser,
    open_stream,
)
from loquent.clients.terminal import Captions
from loquent.engine.audio import AudioFile
from loquent.engine.recognizer import Recognizer

EXAMPLES = """\
  loquent demo
  loquent demo --chunk-ms 80              sooner, and less accurate"""

PACKET = 0.02  # seconds; what sound cards and browsers deliver

NEXT_STEPS = """
That was a recording, sent at the speed of speech. Now with your own voice:
  loquent serve       then open http://127.0.0.1:8765/ and press Start
  loquent mic         in this terminal (needs: pip install 'loquent[mic]')
  loquent transcribe FILE..."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = make_parser(
        "demo",
        "Caption the sample clip that comes with Loquent, in real time; needs no microphone.",
        EXAMPLES,
    )
    add_model_options(parser)
    add_decoder_options(parser)
    add_session_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options = parser().parse_args(argv)
    samples = files("loquent.engine") / "samples"
    clips = sorted(
        (clip for clip in samples.iterdir() if clip.name.endswith((".flac", ".wav"))),
        key=lambda clip: clip.name,
    )
    if not clips:
        return fail("the sample clips are missing from this installation; install it again")
    recognizer = load_recognizer(options)
    for clip in clips:
        with as_file(clip) as path:
            _caption(recognizer, options, AudioFile(path))
    print(NEXT_STEPS)
    return 0


def _caption(recognizer: Recognizer, options: argparse.Namespace, file: AudioFile) -> None:
    rate = stream_rate(file)
    stream = open_stream(recognizer, options, rate)
    print(f"{file.path.name}, {file.duration:.0f} s, {options.chunk_ms} ms at a time:\n")
    captions = Captions(sys.stdout)
    blocks = paced(file.blocks(seconds=PACKET, sample_rate=rate), rate)
    try:
        for event in recognise(recognizer, stream, blocks):
            captions.show(event)
    finally:
        captions.close()


def paced(
    blocks: Iterable[Float32],
    rate: int,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Float32]:
    """`blocks` of `rate` Hz, each no sooner than a microphone would have heard all of it."""
    begin = clock()
    samples = 0
    for block in blocks:
        samples += len(block)
        if (wait := begin + samples / rate - clock()) > 0:
            sleep(wait)
        yield block
