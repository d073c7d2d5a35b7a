"""The options that several subcommands share."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from loquent.engine.bundle import DECODERS
from loquent.engine.endpoint import EndpointRules, endpoint_rules
from loquent.engine.errors import ConfigError
from loquent.engine.hotwords import DEFAULT_BOOST, Hotword
from loquent.engine.recognizer import Recognizer
from loquent.engine.session import DEVICES, Device
from loquent.engine.stream import Stream

CHUNK_MS = 320


def make_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of ``loquent NAME``; `examples` are shown below its help as they stand."""
    return argparse.ArgumentParser(
        prog=f"loquent {name}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--bundle, --threads, --chunk-ms, --right-context-ms."""
    parser.add_argument(
        "--bundle",
        default="en",
        metavar="PATH|NAME",
        help="model: a bundle's folder or .tar, or the name of one that is built in (default: en)",
    )
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=1,
        metavar="N",
        help="CPU threads of the network (default: 1)",
    )
    parser.add_argument(
        "--chunk-ms",
        type=positive_int,
        default=CHUNK_MS,
        metavar="N",
        help="how much speech is recognised at a time: 40, 80, 160, 320, 640 or 1280 ms; "
        f"shorter is sooner, longer is more accurate and cheaper (default: {CHUNK_MS})",
    )
    add_right_context_option(parser)


def add_right_context_option(parser: argparse.ArgumentParser) -> None:
    """--right-context-ms."""
    parser.add_argument(
        "--right-context-ms",
        type=non_negative_int,
        metavar="N",
        help="how much speech behind a chunk is heard before the chunk is recognised: less is "
        "sooner and cheaper, more is more accurate (default: as the bundle says)",
    )


def add_decoder_options(parser: argparse.ArgumentParser) -> None:
    """--decoder, --blank-penalty, --lm-weight, --hotword, --hotwords."""
    parser.add_argument(
        "--decoder", choices=DECODERS, help="how to decode (default: as the bundle says)"
    )
    parser.add_argument(
        "--blank-penalty",
        type=finite_float,
        metavar="X",
        help="above 0 brings more words, below 0 fewer (default: as the bundle says)",
    )
    parser.add_argument(
        "--lm-weight",
        type=non_negative_float,
        metavar="X",
        help="how much the language model of a beam search counts, 0: not at all (default: as the "
        "bundle says)",
    )
    parser.add_argument(
        "--hotword",
        action="append",
        default=[],
        metavar="PHRASE[:BOOST]",
        help="a name or term to expect, in any casing; may be repeated; more boost finds more "
        f"and hears more that was not said (default: {DEFAULT_BOOST:g})",
    )
    parser.add_argument(
        "--hotwords", metavar="FILE", help="a text file with a PHRASE[:BOOST] on each line"
    )


def hotwords_of(options: argparse.Namespace) -> tuple[Hotword, ...]:
    """What --hotword and --hotwords name. Raises ConfigError."""
    lines = list(options.hotword)
    if options.hotwords is not None:
        try:
            lines += Path(options.hotwords).read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as exc:
            raise ConfigError(f"{options.hotwords}: got a file that is not UTF-8 ({exc})") from exc
    return tuple(Hotword.parse(line) for line in lines if line.strip())


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="cpu",
        help="where the network runs: cpu, or cuda with the extra [gpu] and a bundle that is not "
        "int8 (default: cpu)",
    )


def load_recognizer(options: argparse.Namespace, device: Device = "cpu") -> Recognizer:
    """The recogniser that `options` ask for. Raises BundleError, ConfigError, MissingExtra."""
    return Recognizer.load(options.bundle, threads=options.threads, device=device)


def add_session_options(parser: argparse.ArgumentParser) -> None:
    """--endpoint-silence, --leading-silence, --max-utterance, --vad, --stability, --finish."""
    parser.add_argument(
        "--endpoint-silence",
        type=non_negative_float,
        metavar="S",
        help="a segment ends after so many seconds of silence, 0 for never "
        f"(default: {EndpointRules().trailing_silence:g})",
    )
    parser.add_argument(
        "--leading-silence",
        type=non_negative_float,
        metavar="S",
        help="after so many seconds in which nobody has spoken the encoder starts anew "
        f"(default: {EndpointRules().leading_silence:g})",
    )
    parser.add_argument(
        "--max-utterance",
        type=non_negative_float,
        metavar="S",
        help="a segment longer than this is cut between two words "
        f"(default: {EndpointRules().max_utterance:g})",
    )
    parser.add_argument(
        "--vad", choices=["silero"], help="what this detector hears as speech is no silence"
    )
    parser.add_argument(
        "--stability",
        type=non_negative_float,
        metavar="S",
        help="a beam search commits words that lie so many seconds back: less is sooner, more is "
        "more accurate (default: 2)",
    )
    parser.add_argument(
        "--finish",
        action="store_true",
        help="write finals with casing, punctuation and digits; words keep their times",
    )


def open_stream(recognizer: Recognizer, options: argparse.Namespace, sample_rate: int) -> Stream:
    """A stream for audio of `sample_rate` Hz as `options` ask for. Raises ConfigError."""
    return recognizer.stream(
        sample_rate=sample_rate,
        chunk_ms=options.chunk_ms,
        right_context_ms=options.right_context_ms,
        decoder=options.decoder,
        blank_penalty=options.blank_penalty,
        lm_weight=options.lm_weight,
        endpoint=endpoint_rules(
            endpoint_silence=options.endpoint_silence,
            leading_silence=options.leading_silence,
            max_utterance=options.max_utterance,
        ),
        vad=options.vad,
        finish=options.finish,
        hotwords=hotwords_of(options),
        stability=options.stability or 0.0,
    )


def positive_int(text: str) -> int:
    """An argparse type: a whole number above 0."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above 0")
    return number


def finite_float(text: str) -> float:
    """An argparse type: a number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number")
    return number


def non_negative_int(text: str) -> int:
    """An argparse type: a whole number, 0 or above."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, 0 or above")
    return int(text)


def non_negative_float(text: str) -> float:
    """An argparse type: a number, 0 or above."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number, 0 or above")
    return number
