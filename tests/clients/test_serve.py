"""`loquent serve` as it is run: options from everywhere, --check, logs, workers, stopping."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import soundfile
import trustme

from loquent.clients import logs
from loquent.clients.cli import main
from loquent.clients.client import UnreachableError, connect
from loquent.clients.config import resolve
from loquent.clients.serve import parser
from loquent.engine.errors import ConfigError
from loquent.engine.events import Ended, Final
from loquent.engine.protocol import Start

KEY = "correct-horse-battery"
TEXT = ["bana bana kiwi", "solo"]

# Options.


def options(path: Path, toml: str, *flags: str, **environ: str) -> Any:
    path.write_text(toml)
    return resolve(parser(), [*flags, "--config", str(path)], environ)


def test_flags_beat_variables_and_variables_beat_the_file(tmp_path: Path) -> None:
    toml = (
        'host = "0.0.0.0"\nport = 1\nmax-sessions = 1\nmax_speed = 2.5\nverbose = true\n'
        'allow-origin = ["https://a.example", "https://b.example"]\n'
    )
    found = options(
        tmp_path / "loquent.toml",
        toml,
        *("--port", "3"),
        LOQUENT_PORT="2",
        LOQUENT_MAX_SESSIONS="2",
        LOQUENT_KEYS_FILE="keys",
        LOQUENT_TEST_CLIP="not an option of ours",
    )
    assert (found.host, found.port, found.max_sessions, found.max_speed) == ("0.0.0.0", 3, 2, 2.5)
    assert found.keys_file == Path("keys")
    assert found.verbose is True
    assert found.allow_origin == ["https://a.example", "https://b.example"]
    assert found.idle_timeout == 60.0
    found = options(
        tmp_path / "loquent.toml",
        toml,
        LOQUENT_ALLOW_ORIGIN="https://c.example",
        LOQUENT_VERBOSE="0",
    )
    assert found.allow_origin == ["https://c.example"]
    assert resolve(parser(), [], {}) == parser().parse_args([])


@pytest.mark.parametrize(
    ("toml", "environ", "said"),
    [
        ("max-session = 1", {}, r"loquent.toml: .*max-session.*did you mean max-sessions\?"),
        ("port = 'x'", {}, "loquent.toml, port: .*expected a number from 0 to 65535"),
        ("port = 70000", {}, "loquent.toml, port: .*70000"),
        ("port = {a = 1}", {}, "loquent.toml, port: got a dict"),
        ("port", {}, "loquent.toml: not TOML"),
        ("check = true", {}, "check"),
        ("device = 'tpu'", {}, "loquent.toml, device: .*'tpu'"),
        ("", {"LOQUENT_PORT": "-1"}, "LOQUENT_PORT: "),
        ("", {"LOQUENT_VERBOSE": "perhaps"}, "LOQUENT_VERBOSE: got 'perhaps'"),
    ],
)
def test_mistakes_name_their_place(
    tmp_path: Path, toml: str, environ: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        options(tmp_path / "loquent.toml", toml, **environ)


# --check.


def test_check_says_what_would_work(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(logging.root, "handlers", logging.root.handlers[:])
    issued = trustme.CA().issue_cert("localhost")
    (tmp_path / "cert.pem").write_bytes(issued.cert_chain_pems[0].bytes())
    (tmp_path / "key.pem").write_bytes(issued.private_key_pem.bytes())
    (tmp_path / "keys").write_text(f"alice {KEY}\n")
    for name in ("key.pem", "keys"):
        (tmp_path / name).chmod(0o600)
    arguments = [
        *("serve", "--check", "--bundle", bundle, "--port", "0"),
        *("--keys-file", str(tmp_path / "keys"), "--tls-cert", str(tmp_path / "cert.pem")),
        *("--tls-key", str(tmp_path / "key.pem"), "--record", str(tmp_path / "new" / "folder")),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.splitlines()] == [
        ["ok", name] for name in ("model", "keys", "tls", "port", "record", "workers")
    ]
    assert "1 for alice" in said
    assert f"valid until {datetime.now(UTC):%Y}"[:-4] in said
    assert KEY not in said
    assert not (tmp_path / "new").exists()


def test_check_says_what_would_not(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(logging.root, "handlers", logging.root.handlers[:])
    (tmp_path / "keys").write_text("alice short\n")
    (tmp_path / "keys").chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = [
            *("serve", "--check", "--bundle", bundle, "--chunk-ms", "50"),
            *("--port", str(taken.getsockname()[1]), "--keys-file", str(tmp_path / "keys")),
            *("--tls-cert", "cert.pem", "--record", str(tmp_path / "keys")),
        ]
        assert main(arguments) == 1
    said = capsys.readouterr().out
    failed = [line.split()[1] for line in said.splitlines() if line.startswith("FAIL")]
    assert failed == ["model", "keys", "tls", "port", "record"]
    assert "in use" in said
    assert "short" not in said
    arguments = ["serve", "--check", "--bundle", bundle, "--host", "0.0.0.0", "--port", "0"]
    assert main(arguments) == 0
    assert "note  anyone who reaches 0.0.0.0" in capsys.readouterr().out


def test_a_device_that_is_not_there(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime knows CUDA")
    assert main(["serve", "--bundle", bundle, "--device", "cuda"]) == 1
    said = capsys.readouterr().err
    assert "got device cuda, but this ONNX Runtime has only" in said
    assert "loquent[gpu]" in said
    assert "Traceback" not in said


def test_an_int8_bundle_on_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert main(["serve", "--bundle", "en", "--device", "cuda"]) == 1
    assert "use device cpu, or export the bundle without" in capsys.readouterr().err


# Logs.


def test_json_logs_are_one_object_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", logging.root.handlers[:])
    level = logging.root.level
    try:
        logs.set_up(format="json", level="info")
        logger = logging.getLogger("loquent.test")
        logger.info("said %s\nand more", "this", extra={"session": "abc"})
        try:
            raise ValueError("bad")
        except ValueError:
            logger.exception("failed")
        logs.set_up(format="text", level="info")
        logger.info("plain", extra={"session": "abc"})
        logger.info("bare")
    finally:
        logging.root.setLevel(level)
    first, second, plain, bare = capsys.readouterr().err.splitlines()
    fields = json.loads(first)
    assert (fields["message"], fields["session"]) == ("said this\\x0aand more", "abc")
    assert datetime.fromisoformat(fields["time"]).tzinfo is not None
    assert (fields["level"], fields["logger"]) == ("info", "loquent.test")
    assert "ValueError: bad" in json.loads(second)["error"]
    assert plain.endswith("INFO loquent.test [abc]: plain")
    assert bare.endswith("INFO loquent.test [-]: bare")


# Whole processes.

OPEN = 'loquent_sessions_open{protocol="native"}'

START = Start(sample_rate=16000, chunk_ms=160)


async def finals_of(session: Any) -> list[str]:
    texts = []
    async for event in session:
        if isinstance(event, Final):
            texts.append(event.text)
        if isinstance(event, Ended):
            texts.append(event.reason)
    return texts


def test_sigterm_gives_every_session_its_finals(serve: Any, speech: Path) -> None:
    program, url = serve("--log-format", "json", "--log-level", "info")
    pcm, _ = soundfile.read(speech, dtype="int16")

    async def run() -> list[list[str]]:
        async with connect(url, START) as one, connect(url, START) as other:
            for session in (one, other):
                await session.send(pcm)
            events = [asyncio.create_task(finals_of(session)) for session in (one, other)]
            while min(one.progress.received, other.progress.received) < len(pcm) / 16000 - 0.1:
                await asyncio.sleep(0.01)
            program.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*events)

    assert asyncio.run(run()) == [[*TEXT, "stopping"]] * 2
    assert program.wait() == 0
    lines = [json.loads(line) for line in program.err.splitlines() if line.startswith("{")]
    assert len({line["session"] for line in lines if "session" in line}) == 2


def test_keys_over_tls(start: Any, bundle: str, speech: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(0o600)
    (tmp_path / "loquent.toml").write_text(
        f'bundle = "{bundle}"\nport = 0\ntls-cert = "{tmp_path}/cert.pem"\n'
        f'tls-key = "{tmp_path}/key.pem"\n'
    )
    program = start(
        *("serve", "--config", str(tmp_path / "loquent.toml")),
        env={"LOQUENT_API_KEYS": f"alice:{KEY}", "LOQUENT_LOG_LEVEL": "info"},
    )
    program.wait_for("Ctrl-C")
    url = next(line for line in program.err.splitlines() if "wss://" in line).split()[-1]
    trust = {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}
    refused = start("stream", str(speech), "--url", url, env=trust)
    assert refused.wait() == 1
    assert "401" in refused.err
    heard = start("stream", str(speech), "--url", url, env={**trust, "LOQUENT_API_KEY": KEY})
    assert heard.wait() == 0
    assert "bana bana kiwi" in heard.out
    program.process.send_signal(signal.SIGTERM)
    assert program.wait() == 0
    assert "key of alice" in program.err
    assert KEY not in program.err


@pytest.mark.parametrize("workers", ["1", "2"])
def test_keys_are_read_again(serve: Any, tmp_path: Path, workers: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"alice {KEY}\n")
    path.chmod(0o600)
    program, url = serve("--keys-file", str(path), "--workers", workers, "--log-level", "warning")
    new = "another-horse-battery"

    async def refused(key: str) -> bool:
        try:
            async with connect(url, START, key=key):
                return False
        except UnreachableError as exc:
            return "401" in str(exc)

    assert asyncio.run(refused(new))
    path.write_text("broken\n")
    program.process.send_signal(signal.SIGHUP)
    program.wait_for("stay as they were")
    assert not asyncio.run(refused(KEY))
    path.write_text(f"alice {new}\n")
    program.process.send_signal(signal.SIGHUP)
    until(lambda: program.err.count("are read again") == int(workers))
    assert asyncio.run(refused(KEY))
    assert not asyncio.run(refused(new))


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="needs SO_REUSEPORT")
def test_workers(serve: Any, speech: Path) -> None:
    """One of two is killed: the other's sessions go on, a new one takes its place."""
    program, url = serve("--workers", "2")
    base = url.replace("ws:", "http:").removesuffix("/v1/stream")
    workers = children_of(program.process.pid)
    assert len(workers) == 2
    pcm, _ = soundfile.read(speech, dtype="int16")

    async def run() -> None:
        ended = broken = 0
        async with contextlib.AsyncExitStack() as stack:
            sessions = [  # the kernel spreads them over the two by chance
                await stack.enter_async_context(connect(url, START)) for _ in range(12)
            ]
            for session in sessions:
                await session.send(pcm[:16000])
            assert f"{OPEN} 12.0" in await asyncio.to_thread(metrics_of, base)
            os.kill(workers[0], signal.SIGKILL)
            for session in sessions:
                try:
                    await session.send(pcm[16000:])
                    await session.end()
                    assert await finals_of(session) == [*TEXT, "end"]
                    ended += 1
                except UnreachableError:
                    broken += 1
        assert ended
        assert broken
        assert ended + broken == 12

    asyncio.run(run())
    until(lambda: len(children_of(program.process.pid)) == 2)
    program.wait_for(f"(process {workers[0]}) ended with status -9")
    until(lambda: f"{OPEN} 0.0" in metrics_of(base))
    workers = children_of(program.process.pid)
    program.process.send_signal(signal.SIGTERM)
    assert program.wait() == 0
    assert not any(running(pid) for pid in workers)


def metrics_of(base: str) -> str:
    try:
        with urlopen(f"{base}/metrics") as answer:
            return str(answer.read().decode())
    except (HTTPError, OSError):
        return ""


def test_workers_end_with_their_supervisor(serve: Any) -> None:
    program, _ = serve("--workers", "2")
    workers = children_of(program.process.pid)
    program.process.kill()
    until(lambda: not any(running(pid) for pid in workers))


def test_workers_that_cannot_start(start: Any, tmp_path: Path) -> None:
    program = start("serve", "--workers", "2", "--port", "0", "--bundle", str(tmp_path))
    assert program.wait() == 1
    assert "Traceback" not in program.err
