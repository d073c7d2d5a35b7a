"""Keys, limits and the gate as plain values; then a real server that asks for keys."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from loquent.engine.auth import Keys
from loquent.engine.errors import ConfigError
from loquent.engine.gate import Gate, Visitor
from loquent.engine.limits import BURST_AUDIO, BURST_BYTES, BURST_MESSAGES, Limits, Meter
from loquent.engine.protocol import END, PATH, Start, WireError
from loquent.engine.recognizer import Recognizer
from loquent.engine.server import Server, ServerConfig
from loquent.engine.wire.session import Handshake, Refused

KEY = "correct-horse-battery"
OTHER = "staple-staple-staple"
KEYS = Keys.parse(f"alice {KEY}\nbob {OTHER}\n", "test")


def ask(target: str = PATH, **headers: str) -> Handshake:
    return Handshake.parse(target, {name.replace("_", "-"): v for name, v in headers.items()})


# Keys.


def test_keys_are_found_by_name() -> None:
    assert KEYS.names == ("alice", "bob")
    assert KEYS.name_of([OTHER]) == "bob"
    assert KEYS.name_of(["wrong", KEY]) == "alice"
    assert KEYS.name_of([]) is None
    assert KEYS.name_of([KEY + "x", KEY[:-1], ""]) is None


def test_only_the_first_few_credentials_are_looked_at() -> None:
    assert KEYS.name_of(["wrong"] * 4 + [KEY]) is None


def test_a_file_may_hold_hashes_and_old_keys_beside_new_ones(tmp_path: Path) -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    path = tmp_path / "keys"
    path.write_text(f"# who may come\n\nalice sha256:{digest}\nalice {OTHER}\n")
    path.chmod(0o600)
    keys = Keys.load(path)
    assert len(keys) == 2
    assert keys.names == ("alice",)
    assert keys.name_of([KEY]) == keys.name_of([OTHER]) == "alice"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("alice", "line 1: got 1 words"),
        (f"\nalice {KEY} x", "line 2: got 3 words"),
        ("alice short", "16"),
        ("al/ice " + KEY, "the name"),
        ("alice sha256:12", "64 hexadecimal"),
    ],
)
def test_a_bad_line_is_named_and_its_key_is_not_shown(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Keys.parse(text, "keys.txt")
    assert KEY not in str(caught.value)
    assert "keys.txt" in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660])
def test_a_file_that_others_can_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys"
    path.write_text(f"alice {KEY}\n")
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keys.load(path)
    path.chmod(0o640)
    assert len(Keys.load(path)) == 1
    path.write_text("# nobody\n")
    with pytest.raises(ConfigError, match="no key"):
        Keys.load(path)


def test_keys_from_the_environment() -> None:
    keys = Keys.from_environment(f"alice:{KEY}, bob:{OTHER}")
    assert keys.names == ("alice", "bob")
    with pytest.raises(ConfigError, match="LOQUENT_API_KEYS") as caught:
        Keys.from_environment(KEY)
    assert KEY not in str(caught.value)


# The gate.


@pytest.mark.parametrize(
    "handshake",
    [
        ask(authorization=f"Bearer {KEY}"),
        ask(authorization=f"token {KEY}"),
        ask(f"{PATH}?token={KEY}"),
        ask(f"{PATH}?api_key={KEY}&x=1"),
        ask(sec_websocket_protocol=f"token, {KEY}"),
        ask(sec_websocket_protocol=f"loquent.v1, bearer, {KEY}"),
    ],
)
def test_every_way_to_give_a_key(handshake: Handshake) -> None:
    gate = Gate(keys=KEYS, limits=Limits())
    assert gate.admit("192.0.2.1", handshake) == Visitor(address="192.0.2.1", key="alice")


@pytest.mark.parametrize("path", [PATH, "/v1/listen"])
@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer nonsense-nonsense"}])
def test_without_a_good_key(path: str, headers: Mapping[str, str]) -> None:
    with pytest.raises(Refused) as caught:
        Gate(keys=KEYS, limits=Limits()).admit("192.0.2.1", ask(path, **headers))
    assert caught.value.status == HTTPStatus.UNAUTHORIZED
    assert "API key" in str(caught.value)
    assert "nonsense" not in str(caught.value)
    assert caught.value.headers["WWW-Authenticate"].startswith("Bearer")
    assert ("dg-error" in caught.value.headers) == (path == "/v1/listen")


def test_sessions_per_key_and_per_address() -> None:
    gate = Gate(keys=KEYS, limits=Limits(sessions_per_key=2, sessions_per_address=1))

    def enter(address: str, key: str) -> Any:
        return gate.seat(gate.admit(address, ask(authorization=f"Bearer {key}")))

    with enter("192.0.2.1", KEY):
        with pytest.raises(Refused, match="address") as caught:
            enter("192.0.2.1", OTHER)
        assert caught.value.status == HTTPStatus.TOO_MANY_REQUESTS
        assert "Retry-After" in caught.value.headers
        with enter("2001:db8:0:1::1", KEY):
            with pytest.raises(Refused, match="alice"):
                enter("192.0.2.9", KEY)
            with pytest.raises(Refused, match="address"):  # of the same /64
                enter("2001:db8:0:1::2", OTHER)
            with enter("2001:db8:0:2::1", OTHER):
                pass
    with enter("192.0.2.1", OTHER):  # left seats are free again
        pass
    assert not gate._by_key._taken
    assert not gate._by_address._taken


def test_seats_taken_between_request_and_session() -> None:
    gate = Gate(keys=Keys(), limits=Limits(sessions_per_address=1))
    first, second = (gate.admit("192.0.2.1", ask()) for _ in range(2))
    assert gate.full(second) is None
    with gate.seat(first), pytest.raises(Refused, match="address") as caught:
        gate.check(second)
    assert caught.value.status == HTTPStatus.TOO_MANY_REQUESTS
    gate.check(second)


def test_this_machine_has_no_limit_and_a_proxy_is_believed_only_if_trusted() -> None:
    limits = Limits(sessions_per_address=1)
    forwarded = ask(x_forwarded_for="10.0.0.1, 192.0.2.7")
    assert Gate(keys=Keys(), limits=limits).address_of("127.0.0.1", forwarded) == "127.0.0.1"
    gate = Gate(keys=Keys(), limits=limits, trusted_proxies=["127.0.0.1"])
    assert gate.address_of("127.0.0.1", forwarded) == "192.0.2.7"
    assert gate.address_of("192.0.2.1", forwarded) == "192.0.2.1"
    with gate.seat(gate.admit("127.0.0.1", ask())), gate.seat(gate.admit("127.0.0.1", ask())):
        pass
    with gate.seat(gate.admit("127.0.0.1", forwarded)), pytest.raises(Refused):
        gate.admit("127.0.0.1", forwarded)
    assert Visitor(address="::ffff:192.0.2.1", key=None).household == "192.0.2.1/32"
    assert Visitor(address="::1", key=None).household is None


def test_a_strangers_name_for_this_machine_makes_no_page_ours() -> None:
    """DNS rebinding: evil.example resolves to 127.0.0.1, so its page is "same origin"."""
    evil = ask(origin="http://evil.example:8765", host="evil.example:8765")
    gate = Gate(keys=Keys(), limits=Limits(), local=True)
    with pytest.raises(Refused) as caught:
        gate.admit("127.0.0.1", evil)
    assert caught.value.status == HTTPStatus.FORBIDDEN
    gate.admit("127.0.0.1", ask(origin="http://localhost:8765", host="localhost:8765"))
    # On an address for everybody the name is not known, nor is it behind a proxy.
    Gate(keys=Keys(), limits=Limits()).admit("127.0.0.1", evil)
    proxied = Gate(keys=Keys(), limits=Limits(), local=True, trusted_proxies=["127.0.0.1"])
    proxied.admit("127.0.0.1", evil)


# The meter.


def test_audio_that_comes_too_fast_waits() -> None:
    meter = Meter(Limits(max_speed=10.0), 0.0)
    assert meter.audio(BURST_AUDIO, 0.0) == 0.0
    assert meter.audio(5.0, 0.0) == pytest.approx(0.5)
    assert meter.audio(5.0, 1.0) == 0.0
    assert Meter(Limits(max_speed=0), 0.0).audio(1e9, 0.0) == 0.0


@settings(max_examples=20)
@given(seconds=st.floats(0.005, 0.2), speed=st.floats(0.1, 1000.0))
def test_audio_in_usual_packets_is_never_a_flood(seconds: float, speed: float) -> None:
    meter = Meter(Limits(), 0.0)
    for index in range(5000):
        now = index * seconds / speed
        meter.message(round(seconds * 48000 * 8), now)  # 64-bit samples would still do
        meter.audio(seconds, now)


def test_floods_are_refused() -> None:
    meter = Meter(Limits(), 0.0)
    for _ in range(int(BURST_MESSAGES)):
        meter.message(2, 0.0)
    with pytest.raises(WireError, match="messages") as caught:
        meter.message(2, 0.0)
    assert caught.value.code == "flooded"
    meter = Meter(Limits(), 0.0)
    meter.message(int(BURST_BYTES), 0.0)
    with pytest.raises(WireError, match="bytes"):
        meter.message(1 << 20, 0.0)
    meter = Meter(Limits(messages_per_second=0), 0.0)
    for _ in range(100_000):
        meter.message(1 << 20, 0.0)


# A real server.


@asynccontextmanager
async def serving(recognizer: Recognizer, **config: Any) -> AsyncIterator[tuple[Server, str]]:
    async with Server(recognizer, ServerConfig(port=0, **config)) as server:
        yield server, f"ws://127.0.0.1:{server.port}{PATH}"


async def talk(url: str, *messages: str | bytes, **options: Any) -> tuple[list[Any], int | None]:
    """Everything that the server says to these messages, and its close code."""
    said = []
    async with connect(url, compression=None, proxy=None, **options) as connection:
        with contextlib.suppress(ConnectionClosed):
            for message in messages:
                await connection.send(message)
            async with asyncio.timeout(20):
                while True:
                    said.append(json.loads(await connection.recv()))
    return said, connection.close_code


START = Start(sample_rate=16000).encode()


async def test_a_server_with_keys(tiny: Recognizer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("websockets.client").setLevel(logging.CRITICAL)  # the test's own client
    async with serving(tiny, keys=KEYS) as (_, url):
        for query, options in [
            ("", {"additional_headers": {"Authorization": f"Token {KEY}"}}),
            (f"?token={KEY}", {}),
            ("", {"subprotocols": [Subprotocol(name) for name in ("loquent.v1", "token", KEY)]}),
        ]:
            said, code = await talk(url + query, START, END, **options)
            assert [message["type"] for message in said] == ["ready", "ended"]
            assert code == 1000
        for query in ("", f"?token={OTHER}x"):
            with pytest.raises(InvalidStatus) as caught:
                await talk(url + query)
            response = caught.value.response
            assert response.status_code == 401
            assert b"API key" in response.body
    assert "key of alice" in caplog.text
    assert KEY not in caplog.text
    assert OTHER not in caplog.text


async def test_a_page_is_told_that_its_key_has_no_seat(tiny: Recognizer) -> None:
    """Programs see the status of a refusal, pages do not: they are let in, and take no place."""
    mine = {"subprotocols": [Subprotocol(name) for name in ("loquent.v1", "token", KEY)]}
    config = {"limits": Limits(sessions_per_key=1), "max_sessions": 2, "max_waiting": 0}
    async with (
        serving(tiny, keys=KEYS, **config) as (server, url),
        connect(url, proxy=None, **mine) as first,
    ):
        await first.send(START)
        await first.recv()
        page = f"http://127.0.0.1:{server.port}"
        [error], code = await talk(url, origin=page, **mine)
        assert (error["type"], error["code"], code) == ("error", "busy", 1013)
        assert "alice" in error["message"]
        with pytest.raises(InvalidStatus) as caught:
            await talk(url, **mine)
        assert caught.value.response.status_code == 429
        # One that does not even answer our close frame keeps nobody out.
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            f"GET {PATH}?token={KEY} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
            f"Origin: {page}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        await reader.readuntil(b"busy")
        said, _ = await talk(f"{url}?token={OTHER}", START, END)
        assert [message["type"] for message in said] == ["ready", "ended"]
        writer.close()


async def test_nothing_inflates(tiny: Recognizer) -> None:
    async with serving(tiny) as (server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            "Sec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"101" in head
        assert b"extensions" not in head.lower()
        writer.close()


async def test_a_flood_ends_the_session(tiny: Recognizer) -> None:
    async with serving(tiny) as (_, url):
        said, code = await talk(url, START, *[b"\0\0"] * int(2 * BURST_MESSAGES))
        assert (said[-1]["code"], code) == ("flooded", 1008)


async def test_fast_audio_is_slowed_down_and_all_of_it_heard(tiny: Recognizer) -> None:
    packets = [bytes(32000)] * (int(BURST_AUDIO) + 10)
    async with serving(tiny, limits=Limits(max_speed=20)) as (_, url):
        began = asyncio.get_running_loop().time()
        said, _ = await talk(url, START, *packets, END)
        assert asyncio.get_running_loop().time() - began > 0.4  # 10 s at 20 times their speed
        assert said[-1]["duration"] == len(packets)


async def test_a_session_that_lasts_too_long_gets_its_finals(tiny: Recognizer) -> None:
    async with serving(tiny, limits=Limits(session_seconds=0.3)) as (_, url):
        said, code = await talk(url, START, bytes(32000))
        assert (said[-1]["type"], said[-1]["reason"], code) == ("ended", "session_limit", 1000)
        assert said[-1]["duration"] == 1.0


async def test_a_client_that_never_begins(tiny: Recognizer) -> None:
    async with serving(tiny, limits=Limits(start_timeout=0.2)) as (server, url):
        [error], code = await talk(url)
        assert (error["code"], code) == ("idle", 1008)
        # The same limit holds for the request itself.
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: loc")
        async with asyncio.timeout(20):
            await reader.read()
        writer.close()


async def test_sessions_behind_a_proxy_count_by_client(tiny: Recognizer) -> None:
    limits = Limits(sessions_per_address=1)
    headers = {"X-Forwarded-For": "192.0.2.1"}
    async with (
        serving(tiny, limits=limits, trusted_proxies=["127.0.0.1"]) as (_, url),
        connect(url, proxy=None, additional_headers=headers) as connection,
    ):
        await connection.send(START)
        await connection.recv()
        with pytest.raises(InvalidStatus) as caught:
            await talk(url, additional_headers=headers)
        assert caught.value.response.status_code == 429
        await talk(url, START, END, additional_headers={"X-Forwarded-For": "192.0.2.2"})


@pytest.mark.parametrize(
    ("lines", "answer"),
    [
        (b"GET /v1/listen?\xff=1 HTTP/1.1\r\nUpgrade: websocket", b""),
        (b"GET /v1/listen?%ff=1 HTTP/1.1\r\nUpgrade: websocket", b"HTTP/1.1 401"),
        (b"GET /v1/stream HTTP/1.1\r\nUpgrade: websocket\r\nOrigin: http://\xff", b"HTTP/1.1 403"),
        (b"GET /v1/stream HTTP/1.1\r\nUpgrade: websocket\r\nApi-Key: \xff", b"HTTP/1.1 401"),
        (b"GET /metrics HTTP/1.1\r\nAuthorization: Bearer \xff", b"HTTP/1.1 401"),
    ],
)
async def test_raw_bytes_in_a_request(tiny: Recognizer, lines: bytes, answer: bytes) -> None:
    async with serving(tiny, keys=KEYS, metrics_token=KEY) as (server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(lines + b"\r\nHost: localhost\r\n\r\n")
        assert (await reader.readline())[:12] == answer
        writer.close()
    with pytest.raises(Refused, match="ASCII"):
        Handshake.parse("/v1/listen?\udcff=1", {})


async def test_clients_that_come_and_go_at_once_hold_no_places(tiny: Recognizer) -> None:
    head = (
        f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n"
    ).encode()
    async with serving(tiny, max_sessions=4, max_waiting=0) as (server, url):
        for _ in range(12):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head)
            await writer.drain()
            writer.transport.abort()
        await asyncio.sleep(0.3)
        said, _ = await talk(url, START, END)
        assert [message["type"] for message in said] == ["ready", "ended"]


async def test_an_upload_that_is_cut_off_is_no_error_of_ours(
    tiny: Recognizer, caplog: pytest.LogCaptureFixture
) -> None:
    half = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\n\r\n"
    async with serving(tiny) as (server, _):
        for _ in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(half)
            await writer.drain()
            writer.transport.abort()
        await asyncio.sleep(0.3)
        gc.collect()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
