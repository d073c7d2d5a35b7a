"""Metrics, health and TLS of a real server; latencies with a clock of their own."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from loquent.engine import tls
from loquent.engine.auth import Keys
from loquent.engine.errors import ConfigError
from loquent.engine.events import Final, Partial
from loquent.engine.metrics import Metrics, SessionMetrics
from loquent.engine.protocol import END, PATH, Start
from loquent.engine.recognizer import Recognizer
from loquent.engine.server import Server, ServerConfig

TOKEN = "a-token-for-prometheus"


def numbers(text: str | bytes) -> dict[tuple[str, ...], float]:
    """Samples by name and label values."""
    text = text if isinstance(text, str) else text.decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@asynccontextmanager
async def serving(recognizer: Recognizer, **config: Any) -> AsyncIterator[Server]:
    async with Server(recognizer, ServerConfig(port=0, **config)) as server:
        yield server


async def get(
    server: Server, target: str, *, context: ssl.SSLContext | None = None, **headers: str
) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    writer.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return int(head.split()[1]), body


async def talk(url: str, *messages: str | bytes, **options: Any) -> list[dict[str, Any]]:
    async with connect(url, proxy=None, **options) as connection:
        for message in messages:
            await connection.send(message)
        return [json.loads(text) async for text in connection]


def url_of(server: Server, scheme: str = "ws") -> str:
    return f"{scheme}://127.0.0.1:{server.port}{PATH}"


START = Start(sample_rate=16000, chunk_ms=160).encode()


async def test_what_happens_is_counted(
    tiny: Recognizer, tones: Callable[..., NDArray[np.float32]]
) -> None:
    spoken = tones([(1, 0.4), (2, 0.3), (0, 1.2), (5, 0.4)])
    pcm = (spoken * 32767).astype("<i2").tobytes()
    keys = Keys.parse("alice correct-horse-battery", "test")
    async with serving(tiny, keys=keys) as server:
        url = url_of(server) + "?token=correct-horse-battery"
        said = await talk(url, START, pcm, END)
        finals = [message for message in said if message["type"] == "final"]
        assert {final["reason"] for final in finals} == {"endpoint", "end"}
        with pytest.raises(ConnectionClosed, match="1003"):
            await talk(url, "nonsense")
        with pytest.raises(InvalidStatus):
            await talk(url_of(server))
        async with connect(url, proxy=None) as connection:
            await connection.send(START)
            await connection.recv()
            status, text = await get(server, "/metrics")
        assert status == 200
    found = numbers(text)
    assert found["loquent_info", "tiny"] == 1
    assert found["loquent_sessions_open", "native"] == 1
    assert found["loquent_sessions_total", "native"] == 3
    assert found["loquent_errors_total", "bad_json"] == 1
    assert found["loquent_refused_total", "401"] == 1
    assert found["loquent_audio_seconds_total", "native"] == pytest.approx(len(spoken) / 16000)
    assert found["loquent_first_partial_seconds_count",] == len(finals)
    assert found["loquent_final_seconds_count", "endpoint"] == 1
    assert found["loquent_final_seconds_count", "end"] == 1
    assert found["loquent_step_seconds_count",] == found["loquent_batch_size_count",] > 10
    assert found["loquent_batch_size_sum",] == found["loquent_batch_size_count",]
    assert found["loquent_lag_seconds",] == 0.0
    assert "correct-horse" not in text


def test_latencies_count_from_the_audio() -> None:
    metrics = Metrics("tiny")
    session = SessionMetrics(metrics, "native")
    for packet in range(40):  # 4 s in real time, from 100.1 on
        session.heard(0.1, 100.1 + packet * 0.1)
    partial = Partial(segment=0, start=1.0, end=1.4, committed="", tentative="a", words=())
    session.said(partial, 101.4)  # what was said at 1.0 s had arrived at 101.1
    session.said(partial, 103.0)
    final = Final(segment=0, start=1.0, end=2.05, text="a", words=(), reason="endpoint")
    session.said(final, 103.1)  # its last word had arrived at 102.1
    found = numbers(metrics.render())
    assert found["loquent_first_partial_seconds_count",] == 1
    assert found["loquent_first_partial_seconds_sum",] == pytest.approx(0.4, abs=0.11)
    assert found["loquent_final_seconds_sum", "endpoint"] == pytest.approx(1.0, abs=0.11)


async def test_metrics_are_for_this_machine_or_for_the_token(tiny: Recognizer) -> None:
    async with serving(tiny, trusted_proxies=["127.0.0.1"]) as server:
        assert (await get(server, "/metrics"))[0] == 200
        assert (await get(server, "/metrics", X_Forwarded_For="192.0.2.1"))[0] == 401
    async with serving(tiny, metrics_token=TOKEN) as server:
        assert (await get(server, "/metrics"))[0] == 401
        assert (await get(server, "/metrics", Authorization=f"Bearer {TOKEN}x"))[0] == 401
        assert (await get(server, "/metrics", Authorization=f"Bearer {TOKEN}"))[0] == 200
        assert TOKEN not in repr(server.config)


async def test_alive_is_not_ready(tiny: Recognizer) -> None:
    async with serving(tiny, max_sessions=1) as server:
        assert (await get(server, "/readyz"))[0] == 200
        async with connect(url_of(server), proxy=None) as connection:
            await connection.send(START)
            await connection.recv()
            status, body = await get(server, "/readyz")
            assert (status, json.loads(body)["status"]) == (503, "full")
            assert (await get(server, "/healthz"))[0] == 200
        server.host.draining = True
        assert json.loads((await get(server, "/readyz"))[1])["status"] == "draining"
        assert (await get(server, "/healthz"))[0] == 200


# TLS.


def write_certificate(folder: Path, **options: Any) -> tuple[Path, Path, trustme.CA]:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1", **options)
    certificate, key = folder / "cert.pem", folder / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    key.chmod(0o600)
    return certificate, key, authority


async def test_tls_in_process(tiny: Recognizer, tmp_path: Path) -> None:
    certificate, key, authority = write_certificate(tmp_path)
    context = tls.server_context(certificate, key)
    assert tls.expiry(context, certificate) > datetime.now(UTC)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    async with serving(tiny, tls=context) as server:
        said = await talk(url_of(server, "wss"), START, bytes(32000), END, ssl=client)
        assert [message["type"] for message in said] == ["ready", "ended"]
        assert (await get(server, "/healthz", context=client))[0] == 200
        old = ssl.create_default_context()
        authority.configure_trust(old)
        old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await get(server, "/healthz", context=old)


def test_certificates_that_will_not_do(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    certificate, key, _ = write_certificate(tmp_path)
    _, other_key, _ = write_certificate(tmp_path / "other")
    with pytest.raises(ConfigError, match="key values mismatch"):
        tls.server_context(certificate, other_key)
    with pytest.raises(ConfigError, match="not a PEM certificate"):
        tls.server_context(key, key)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pem"):
        tls.server_context(tmp_path / "nothing.pem", key)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        tls.server_context(certificate, key)
    certificate, key, _ = write_certificate(tmp_path, not_after=datetime(2020, 1, 1, tzinfo=UTC))
    context = tls.server_context(certificate, key)
    with pytest.raises(ConfigError, match="expired"):
        tls.expiry(context, certificate)


def test_processes_answer_for_each_other(tmp_path: Path) -> None:
    code = (
        "from loquent.engine.metrics import Metrics\n"
        "metrics = Metrics('tiny')\n"
        "metrics.stepped(3, 0.01)\n"
        "metrics.lag.set(2.0)\n"
        "print(metrics.render().decode())"
    )
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
    found = numbers(done.stdout)
    assert found["loquent_batch_size_count",] == 2
    assert found["loquent_batch_size_sum",] == 6
