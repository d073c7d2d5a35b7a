"""Plain HTTP on the server's port: the page, health, and who may connect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.engine.loopback import (
    START,
    client,
    serving,
)
from websockets.exceptions import InvalidStatus

from loquent.engine.events import Event
from loquent.engine.recognizer import Recognizer
from loquent.engine.server import Server
from loquent.engine.web import origin_allowed, static_file

Float32 = NDArray[np.float32]
Message = dict[str, Any]
Speak = Callable[..., Float32]
Run = Callable[..., list[Event]]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    root = tmp_path / "page"
    (root / "sub").mkdir(parents=True)
    for name, text in {
        "index.html": "<!doctype html>",
        "app.js": "export {}",
        "style.css": "body{}",
        "icon.svg": "<svg/>",
        "sub/data.json": "{}",
        "blob.xyz": "?",
        ".hidden": "no",
    }.items():
        (root / name).write_text(text)
    (tmp_path / "secret.txt").write_text("secret")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    (root / "folder").symlink_to(tmp_path, target_is_directory=True)
    return root


async def http(server: Server, target: str, method: str = "GET") -> tuple[int, dict[str, str], str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


async def test_the_page(tiny: Recognizer, page: Path) -> None:
    async with serving(tiny, page=page) as server:
        for target, kind in {
            "/": "text/html; charset=utf-8",
            "/?x=1": "text/html; charset=utf-8",
            "/app.js": "text/javascript; charset=utf-8",
            "/style.css": "text/css; charset=utf-8",
            "/icon.svg": "image/svg+xml",
            "/sub/data.json": "application/json",
            "/blob.xyz": "application/octet-stream",
        }.items():
            status, headers, body = await http(server, target)
            assert (status, headers["content-type"]) == (200, kind), target
            assert headers["x-content-type-options"] == "nosniff"
            assert "default-src 'self'" in headers["content-security-policy"]
            assert len(body) == int(headers["content-length"]) > 0
        status, headers, body = await http(server, "/app.js", "HEAD")
        assert (status, headers["content-length"], body) == (200, "9", "")
        assert (await http(server, "/app.js", "POST"))[0] == 405
        assert (await http(server, "/v1/stream"))[0] == 426


@pytest.mark.parametrize(
    "target",
    [
        "/nothing.html",
        "/sub",
        "/sub/",
        "/.hidden",
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/sub/../../secret.txt",
        "/sub/..%5c..%5csecret.txt",
        "//secret.txt",
        "/./index.html",
        "/c:/secret.txt",
        "/index.html%00.js",
        "/link.txt",
        "/%2fetc%2fpasswd",
        "/%252e%252e/secret.txt",
        "/%c0%ae%c0%ae/secret.txt",
        "/sub%00/../../secret.txt",
        "/folder/secret.txt",
        "/..;/secret.txt",
        "/\\..\\secret.txt",
        "/" + "a/" * 2000,
        "/" + "a" * 5000,
    ],
)
async def test_no_way_out_of_the_page(tiny: Recognizer, page: Path, target: str) -> None:
    async with serving(tiny, page=page) as server:
        status, _, body = await http(server, target)
        assert status == 404, body
        assert "secret" not in body


async def test_a_server_without_a_page(tiny: Recognizer) -> None:
    async with serving(tiny) as server:
        assert (await http(server, "/"))[0] == 404
    assert static_file(None, "/").status_code == 404


async def test_health(tiny: Recognizer) -> None:
    async with serving(tiny, max_sessions=5) as server, client(server) as connection:
        await connection.send(START)
        await connection.recv()
        status, headers, body = await http(server, "/healthz")
        assert (status, headers["content-type"]) == (200, "application/json")
        health = json.loads(body)
        assert 0 <= health.pop("load") < 1
        assert health == {
            "status": "ok",
            "bundle": "tiny",
            "keys": False,
            "sessions": 1,
            "max_sessions": 5,
        }


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        ("http://192.0.2.1:8765", True),
        ("https://192.0.2.1:8765", True),
        ("http://192.0.2.1:9000", False),
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("http://[::1]:80", True),
        ("https://evil.example", False),
        ("https://localhost.evil.example", False),
        ("https://127.0.0.1.evil.example", False),
        ("null", False),
        ("file://", False),
        ("http://[", False),
        ("", False),
        ("https://friend.example", True),
    ],
)
def test_origins(origin: str | None, allowed: bool) -> None:
    assert origin_allowed(origin, "192.0.2.1:8765", ["https://friend.example"]) is allowed
    assert origin_allowed(origin, "192.0.2.1:8765", ["*"]) is True


async def test_pages_of_strangers_cannot_connect(tiny: Recognizer) -> None:
    async with serving(tiny, allow_origins=["https://friend.example"]) as server:
        with pytest.raises(InvalidStatus) as caught:
            async with client(server, origin="https://evil.example"):
                pass
        assert caught.value.response.status_code == 403
        for origin in ("https://friend.example", f"http://127.0.0.1:{server.port}"):
            async with client(server, origin=origin):
                pass
