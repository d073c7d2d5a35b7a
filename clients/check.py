"""``loquent serve --check``: would the server start so, and who could get at it?"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from loquent.clients import serve
from loquent.clients.cli import EXIT_ERROR
from loquent.engine import tls
from loquent.engine.errors import LoquentError
from loquent.engine.web import is_loopback

_SOON = timedelta(days=14)


def check(options: argparse.Namespace) -> int:
    """Try everything that a start would need, print a line for each; returns the exit status."""
    checks: dict[str, Callable[[argparse.Namespace], str]] = {
        "model": _model,
        "keys": _keys,
        "tls": _tls,
        "port": _port,
        "record": _record,
        "workers": _workers,
    }
    failed = False
    for name, run in checks.items():
        try:
            verdict, said = "ok", run(options)
        except (LoquentError, OSError) as exc:
            verdict, said, failed = "FAIL", str(exc), True
        print(f"{verdict:<5} {name:<8} {said}")
    for said in _warnings(options):
        print(f"note  {said}")
    return EXIT_ERROR if failed else 0


def _model(options: argparse.Namespace) -> str:
    bundle = serve.open_recognizer(options).bundle
    return (
        f"{bundle.name} {bundle.version}, {bundle.precision}, {', '.join(bundle.languages)}, "
        f"chunks of {options.chunk_ms} ms, on {options.device}"
    )


def _keys(options: argparse.Namespace) -> str:
    keys = serve.load_keys(options)
    if not keys:
        return "none: no client needs one"
    return f"{len(keys)} for {', '.join(keys.names)}"


def _tls(options: argparse.Namespace) -> str:
    context = serve.server_config(options).tls
    if context is None:
        return "none: http and ws"
    ends = tls.expiry(context, options.tls_cert)
    left = ends - datetime.now(UTC)
    warning = ", RENEW IT SOON" if left < _SOON else ""
    return f"{options.tls_cert}, valid until {ends:%Y-%m-%d}{warning}"


def _port(options: argparse.Namespace) -> str:
    found = socket.getaddrinfo(
        options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            trial.bind(address)
            trial.listen()
    return f"{options.host} {options.port or 'any free one'}, can be listened on"


def _record(options: argparse.Namespace) -> str:
    folder = options.record
    if folder is None:
        return "none: no audio is kept"
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OSError(f"{nearest} is no folder that can be written to")
    return f"the audio of every session goes to {folder}"


def _workers(options: argparse.Namespace) -> str:
    if options.workers == 1:
        return "one process"
    return f"{options.workers} processes, up to {options.workers * options.max_sessions} sessions"


def _warnings(options: argparse.Namespace) -> list[str]:
    if is_loopback(options.host):
        return []
    notes = []
    if options.keys_file is None and not os.environ.get(serve.API_KEYS):
        notes.append(f"anyone who reaches {options.host} can use the server: --keys-file")
    if options.tls_cert is None and not options.trusted_proxy:
        notes.append("keys and audio go over the network as they are: --tls-cert, --tls-key")
    return notes
