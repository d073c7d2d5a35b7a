"""The plain HTTP side of the server's port: static files, ``/healthz``, and the Origin rule."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Collection, Mapping
from email.utils import formatdate
from http import HTTPStatus
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from websockets.datastructures import Headers
from websockets.http11 import Response

CONTENT_TYPES: Mapping[str, str] = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}

# The page loads nothing from elsewhere and talks to nobody else, and the browser holds it to that.
SECURITY_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self)",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def respond(status: HTTPStatus, body: bytes, content_type: str, *, head: bool = False) -> Response:
    """A complete response. `head` leaves the body out, as HEAD asks."""
    headers = Headers(
        {
            "Date": formatdate(usegmt=True),
            "Connection": "close",
            "Content-Length": str(len(body)),
            "Content-Type": content_type,
            "Cache-Control": "no-cache",
            **SECURITY_HEADERS,
        }
    )
    return Response(status.value, status.phrase, headers, b"" if head else body)


def respond_text(status: HTTPStatus, text: str) -> Response:
    """A short plain answer, one line."""
    # Raw bytes of a header are lone surrogates here.
    return respond(status, f"{text}\n".encode(errors="replace"), "text/plain; charset=utf-8")


def respond_json(status: HTTPStatus, fields: Mapping[str, object], *, head: bool) -> Response:
    """A JSON object."""
    return respond(status, json.dumps(fields).encode() + b"\n", "application/json", head=head)


def static_file(root: Traversable | None, path: str, *, head: bool = False) -> Response:
    """The file below `root` that the request path names; ``/`` is ``index.html``; else 404."""
    file = _find(root, path) if root is not None else None
    if file is None:
        return respond_text(HTTPStatus.NOT_FOUND, "There is nothing here.")
    kind = CONTENT_TYPES.get(PurePosixPath(file.name).suffix.lower(), "application/octet-stream")
    return respond(HTTPStatus.OK, file.read_bytes(), kind, head=head)


def _find(root: Traversable, path: str) -> Traversable | None:
    parts = unquote(urlsplit(path).path).split("/")[1:]
    if parts == [""]:
        parts = ["index.html"]
    # A name that begins with a dot is "..", "." or a hidden file; a backslash or a drive's colon
    # would mean a path on Windows. None of them is a name of ours.
    if not all(part and part[0] != "." and not set(part) & set("\\:\0") for part in parts):
        return None
    file = root
    for part in parts:
        file = file.joinpath(part)
    try:
        if not file.is_file():
            return None
    except OSError:  # a name longer than the file system has
        return None
    # A symbolic link may not lead out either.
    if (
        isinstance(file, Path)
        and isinstance(root, Path)
        and not file.resolve().is_relative_to(root.resolve())
    ):
        return None
    return file


def origin_allowed(origin: str | None, host: str | None, allowed: Collection[str] = ()) -> bool:
    """Whether a page from `origin` may open a session on the server that it calls `host`.

    Browsers always send an Origin and let any page connect anywhere, so it is for the server to
    refuse strangers. Programs that are no browsers send none. Fine are the server's own pages,
    pages from this machine, and those in `allowed` ("https://example.org", or "*" for all).
    """
    if origin is None or "*" in allowed or origin in allowed:
        return True
    try:
        url = urlsplit(origin)
        name = url.hostname or ""
    except ValueError:
        return False
    if url.scheme not in ("http", "https"):
        return False
    return url.netloc.lower() == (host or "").lower() or is_loopback(name)


def share_headers(origin: str, asked: str | None = None) -> dict[str, str]:
    """What lets a page from `origin` read an answer (CORS).

    `asked`: the page's browser asks first (``OPTIONS``) whether it may send these headers, too.
    """
    headers = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
    if asked is None:
        return {**headers, "Access-Control-Expose-Headers": "Retry-After, X-Loquent-Ignored"}
    return {
        **headers,
        "Access-Control-Allow-Methods": "POST",
        "Access-Control-Allow-Headers": asked,
        "Access-Control-Max-Age": "600",
    }


def host_name(host: str | None) -> str:
    """The name or address in a Host header, without the port."""
    try:
        return urlsplit(f"//{host or ''}").hostname or ""
    except ValueError:
        return ""


def is_loopback(name: str) -> bool:
    """Whether a host name or address means this machine."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
