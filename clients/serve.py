"""``loquent serve``: the captioning server with its web page."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from loquent.clients import logs
from loquent.clients.cli import fail
from loquent.clients.config import resolve
from loquent.clients.options import (
    add_device_option,
    add_model_options,
    load_recognizer,
    make_parser,
    non_negative_float,
    non_negative_int,
    positive_int,
)
from loquent.engine import tls
from loquent.engine.asgi import App
from loquent.engine.auth import Keys
from loquent.engine.errors import ConfigError, LoquentError
from loquent.engine.limits import Limits
from loquent.engine.protocol import PATH
from loquent.engine.recognizer import Recognizer
from loquent.engine.server import Server, ServerConfig
from loquent.engine.web import is_loopback

EXAMPLES = """\
  loquent serve                                 then open http://127.0.0.1:8765/
  loquent serve --host 0.0.0.0 --keys-file keys --tls-cert cert.pem --tls-key key.pem
  loquent serve --config loquent.toml --check   say whether all of it would work
  loquent serve --workers 4                     four processes on one port (Linux)"""

API_KEYS = "LOQUENT_API_KEYS"

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = make_parser(
        "serve",
        "Caption over WebSocket, with a web page to try it. Ctrl-C or SIGTERM ends it: sessions "
        "get the rest of their text first. Every option may also come from a variable "
        "(LOQUENT_MAX_SESSIONS=8) or from a TOML file (max-sessions = 8); flags beat variables, "
        "variables beat the file.",
        EXAMPLES,
    )
    default = ServerConfig()
    limits = Limits()
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="TOML file with options")
    add("--check", action="store_true", help="only say whether the server could start so, or why")
    add(
        "--host",
        default=default.host,
        help=f"address to listen on (default: {default.host}, only this machine)",
    )
    add(
        "--port",
        type=_port,
        default=default.port,
        help=f"port, 0 for any free one (default: {default.port})",
    )
    add(
        "--workers",
        type=positive_int,
        default=1,
        metavar="N",
        help="processes that share the port, each with its own model and limits; one that dies is "
        "started again (Linux only; default: 1)",
    )
    add(
        "--bare",
        choices=["vosk", "sherpa"],
        default=default.bare,
        help="whose protocol a WebSocket at / speaks, as the clients of both go there "
        f"(default: {default.bare}; /vosk and /sherpa speak theirs in any case)",
    )
    add("--record", type=Path, metavar="DIR", help="keep what every client sends as DIR/*.wav")
    add(
        "--snapshots",
        type=Path,
        metavar="DIR",
        help="private folder in which sessions that can be resumed wait while the server is "
        "restarted; what people said is in it",
    )
    add_model_options(parser)
    add_device_option(parser)

    add = parser.add_argument_group("who may connect").add_argument
    add(
        "--keys-file",
        type=Path,
        metavar="FILE",
        help="API keys, a line each: NAME KEY or NAME sha256:HEX. Keys may also be in the variable "
        f"{API_KEYS}, as NAME:KEY,NAME:KEY",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages from this origin may connect too, e.g. https://example.org; '*' for all; "
        "may be given more than once",
    )
    add(
        "--trusted-proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="believe the X-Forwarded-For of this reverse proxy; may be given more than once",
    )
    add("--tls-cert", type=Path, metavar="FILE", help="PEM certificate chain: serve https and wss")
    add("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")

    group = parser.add_argument_group("limits", "0 stands for no limit; times in seconds")
    for flag, kind, value, text in (
        ("--max-sessions", positive_int, default.max_sessions, "clients at the same time"),
        (
            "--max-load",
            non_negative_float,
            default.max_load,
            "share of the recogniser's time, measured, from which on nobody more is let in",
        ),
        (
            "--max-waiting",
            non_negative_int,
            default.max_waiting,
            f"requests that wait, for up to {default.wait_timeout:g} s, until there is a place",
        ),
        ("--max-batch", positive_int, default.max_batch, "streams in one step"),
        (
            "--resume-timeout",
            non_negative_float,
            default.resume_timeout,
            "that a session which asked for it waits for its client after a lost connection",
        ),
        ("--max-parked", non_negative_int, default.max_parked, "sessions that wait so at a time"),
        ("--sessions-per-key", non_negative_int, limits.sessions_per_key, "of one key's name"),
        (
            "--sessions-per-address",
            non_negative_int,
            limits.sessions_per_address,
            "of one IPv4 address or IPv6 /64, this machine excepted",
        ),
        ("--session-seconds", non_negative_float, limits.session_seconds, "length of a session"),
        (
            "--start-timeout",
            non_negative_float,
            limits.start_timeout,
            "for the request, and from there to the first message",
        ),
        (
            "--idle-timeout",
            _positive_float,
            default.idle_timeout,
            "without a message, then the session is finished",
        ),
        (
            "--drain-timeout",
            non_negative_float,
            default.drain_timeout,
            "for sessions to finish when the server is stopped",
        ),
        (
            "--max-speed",
            non_negative_float,
            limits.max_speed,
            "times faster than spoken that audio is read",
        ),
        (
            "--file-seconds",
            non_negative_float,
            limits.file_seconds,
            "of audio in an uploaded file",
        ),
        (
            "--messages-per-second",
            non_negative_float,
            limits.messages_per_second,
            "of a session, beside those with audio",
        ),
    ):
        group.add_argument(
            flag, type=kind, default=value, metavar="N", help=f"{text} (default: {value:g})"
        )

    add = parser.add_argument_group("watching it").add_argument
    add(
        "--metrics-token",
        metavar="TOKEN",
        help="bearer token for /metrics; better in a variable or the file than here. Without one "
        "only this machine may read them",
    )
    add("--log-format", choices=logs.FORMATS, default="text", help="text or JSON (default: text)")
    add(
        "--log-level",
        choices=logs.LEVELS,
        default="warning",
        help="info tells of every session (default: warning)",
    )
    add("-v", "--verbose", action="store_true", help="the same as --log-level info")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    options = resolve(parser(), argv, os.environ)
    set_up_logs(options)
    if options.check:
        from loquent.clients.check import check

        return check(options)
    if options.workers > 1:
        from loquent.clients.workers import supervise

        return supervise(options, argv)
    config = server_config(options)
    recognizer = open_recognizer(options)
    try:
        asyncio.run(_serve(recognizer, config, options))
    except OSError as exc:
        reason = exc.strerror or exc
        return fail(f"cannot listen on {options.host} port {options.port}: {reason}; try --port")
    return 0


def set_up_logs(options: argparse.Namespace) -> None:
    """As --log-format, --log-level and --verbose say."""
    logs.set_up(format=options.log_format, level="info" if options.verbose else options.log_level)


def open_recognizer(options: argparse.Namespace) -> Recognizer:
    """The recogniser, tried out. Raises BundleError, ConfigError, MissingExtra."""
    recognizer = load_recognizer(options, options.device)
    # A chunk size that the bundle does not have should stop the server, not every session.
    recognizer.stream(chunk_ms=options.chunk_ms, right_context_ms=options.right_context_ms)
    return recognizer


def load_keys(options: argparse.Namespace) -> Keys:
    """Those of the file and of the environment together. Raises ConfigError, OSError."""
    keys = Keys.from_environment(os.environ.get(API_KEYS, ""))
    return keys + Keys.load(options.keys_file) if options.keys_file is not None else keys


def server_config(options: argparse.Namespace) -> ServerConfig:
    """What `options` say about the server. Raises ConfigError, OSError."""
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key belong together; give both or neither")
    return ServerConfig(
        host=options.host,
        port=options.port,
        chunk_ms=options.chunk_ms,
        right_context_ms=options.right_context_ms,
        max_sessions=options.max_sessions,
        snapshots=options.snapshots,
        share_parked=options.workers > 1,
        max_load=options.max_load,
        max_waiting=options.max_waiting,
        max_batch=options.max_batch,
        resume_timeout=options.resume_timeout,
        max_parked=options.max_parked,
        page=files("loquent.clients") / "web",
        record=options.record,
        bare=options.bare,
        allow_origins=frozenset(options.allow_origin),
        keys=load_keys(options),
        limits=Limits(
            sessions_per_key=options.sessions_per_key,
            sessions_per_address=options.sessions_per_address,
            session_seconds=options.session_seconds,
            start_timeout=options.start_timeout,
            max_speed=options.max_speed,
            messages_per_second=options.messages_per_second,
            file_seconds=options.file_seconds,
        ),
        trusted_proxies=frozenset(options.trusted_proxy),
        tls=tls.server_context(options.tls_cert, options.tls_key) if options.tls_cert else None,
        metrics_token=options.metrics_token,
        idle_timeout=options.idle_timeout,
        drain_timeout=options.drain_timeout,
    )


def environment(**defaults: object) -> argparse.Namespace:
    """The options of a server under ASGI, which has no command line; with `defaults` of its own.

    Raises ConfigError, and OSError if the file that LOQUENT_CONFIG names cannot be read.
    """
    known = parser()
    # Where it is reached from is the ASGI server's business, or a proxy's before it.
    known.set_defaults(host="0.0.0.0", **defaults)
    return resolve(known, [], os.environ)


def create_app(options: argparse.Namespace | None = None) -> App:
    """The server as an ASGI application, by default as the `environment` wants it.

    Raises BundleError, ConfigError, MissingExtra, OSError.
    """
    options = options or environment()
    if options.tls_cert or options.tls_key or options.workers > 1:
        raise ConfigError(
            "got tls-cert, tls-key or workers, which only `loquent serve` has: sockets and "
            "processes are the ASGI server's (uvicorn: --ssl-certfile, --ssl-keyfile, --workers)"
        )
    if not logging.root.handlers:  # the ASGI server's own configuration comes first
        set_up_logs(options)
    # There may be other processes, which take sessions of this one through the folder.
    share_parked = options.snapshots is not None
    config = dataclasses.replace(server_config(options), share_parked=share_parked)
    return App(open_recognizer(options), config)


async def _serve(recognizer: Recognizer, config: ServerConfig, options: argparse.Namespace) -> None:
    stop = stop_event()
    # What is loaded stays, so the collector need not look at it: it then comes to sessions that
    # ended soon, and not when they are a quarter of everything.
    gc.collect()
    gc.freeze()
    async with Server(recognizer, config) as server:
        reload_on_hangup(server, options)
        announce(config, server.port)
        say("Ctrl-C stops it.")
        await stop.wait()
        say(f"stopping, {server.sessions} sessions open")


def stop_event() -> asyncio.Event:
    """Set by SIGINT or SIGTERM; a second one then ends the program at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def end() -> None:
        stop.set()
        for number in signals:
            loop.remove_signal_handler(number)

    with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C raises KeyboardInterrupt
        for number in signals:
            loop.add_signal_handler(number, end)
    return stop


def reload_on_hangup(server: Server, options: argparse.Namespace) -> None:
    """At SIGHUP read keys and certificate again; sessions go on, what is wrong changes nothing."""

    def reload() -> None:
        try:
            server.host.replace_keys(load_keys(options))
            if server.config.tls is not None:
                tls.load(server.config.tls, options.tls_cert, options.tls_key)
        except (LoquentError, OSError) as exc:
            logger.error("keys and certificate stay as they were: %s", exc)
        else:
            logger.warning("keys and certificate are read again")

    with contextlib.suppress(NotImplementedError, AttributeError):  # Windows has no SIGHUP
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


def announce(config: ServerConfig, port: int) -> None:
    """Say where the server is and who can get at it."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    secure = "s" if config.tls is not None else ""
    say(f"page       http{secure}://{host}:{port}/")
    say(f"WebSocket  ws{secure}://{host}:{port}{PATH}")
    if not is_loopback(config.host):
        if not config.keys:
            say("Anyone who reaches this address can use it: --keys-file asks for API keys.")
        if config.tls is None:
            say(
                "Browsers give the microphone only to https pages and to localhost: --tls-cert "
                "and --tls-key, or a TLS proxy in front."
            )


def say(text: str) -> None:
    """For the person who started the server."""
    print(text, file=sys.stderr, flush=True)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to 65535")
    return int(text)


def _positive_float(text: str) -> float:
    if (number := non_negative_float(text)) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0")
    return number
