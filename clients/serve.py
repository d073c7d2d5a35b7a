"""``loquent serve``: the captioning server with its web page."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from loquent.clients.cli import fail
from loquent.clients.options import (
    add_model_options,
    load_recognizer,
    make_parser,
    positive_int,
)
from loquent.engine.protocol import PATH
from loquent.engine.recognizer import Recognizer
from loquent.engine.server import Server, ServerConfig
from loquent.engine.web import is_loopback

EXAMPLES = """\
  loquent serve                                 then open http://127.0.0.1:8765/
  loquent serve --host 0.0.0.0 --port 9000      for other machines too
  loquent serve --record /tmp/sessions          keep the audio of all sessions
  loquent serve --allow-origin https://example.org"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = make_parser(
        "serve",
        "Caption over WebSocket, with a web page to try it. Ctrl-C or SIGTERM ends it: sessions "
        "get the rest of their text first.",
        EXAMPLES,
    )
    default = ServerConfig()
    parser.add_argument(
        "--host",
        default=default.host,
        help=f"address to listen on (default: {default.host}, only this machine)",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=default.port,
        help=f"port, 0 for any free one (default: {default.port})",
    )
    parser.add_argument(
        "--max-sessions",
        type=positive_int,
        default=default.max_sessions,
        metavar="N",
        help=f"clients at the same time (default: {default.max_sessions})",
    )
    parser.add_argument(
        "--record", type=Path, metavar="DIR", help="keep what every client sends as DIR/*.wav"
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages from this origin may connect too, e.g. https://example.org; '*' for all; "
        "may be given more than once",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log every session")
    add_model_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options = parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # Broken requests of strangers are no event for the log.
    logging.getLogger("websockets").setLevel(logging.CRITICAL)
    recognizer = load_recognizer(options)
    # A chunk size that the bundle does not have should stop the server, not every session.
    recognizer.stream(chunk_ms=options.chunk_ms)
    config = ServerConfig(
        host=options.host,
        port=options.port,
        chunk_ms=options.chunk_ms,
        max_sessions=options.max_sessions,
        page=files("loquent.clients") / "web",
        record=options.record,
        allow_origins=frozenset(options.allow_origin),
    )
    try:
        asyncio.run(_serve(recognizer, config))
    except OSError as exc:
        reason = exc.strerror or exc
        return fail(f"cannot listen on {options.host} port {options.port}: {reason}; try --port")
    return 0


async def _serve(recognizer: Recognizer, config: ServerConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C raises KeyboardInterrupt
        for number in signals:
            loop.add_signal_handler(number, stop.set)
    async with Server(recognizer, config) as server:
        host = f"[{config.host}]" if ":" in config.host else config.host
        _say(f"page       http://{host}:{server.port}/")
        _say(f"WebSocket  ws://{host}:{server.port}{PATH}")
        if not is_loopback(config.host):
            _say(
                "Anyone who reaches this address can use it. Browsers give the microphone only to "
                "https pages and to localhost: put a TLS proxy in front."
            )
        _say("Ctrl-C stops it.")
        await stop.wait()
        for number in signals:
            loop.remove_signal_handler(number)  # a second signal means it
        _say(f"stopping, {server.sessions} sessions open")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to 65535")
    return int(text)
