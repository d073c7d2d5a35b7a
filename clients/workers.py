"""``loquent serve --workers N``: several server processes on one port, and who looks after them.

The kernel spreads new connections over the processes that listen with ``SO_REUSEPORT``; a session
stays with its process. The supervisor serves nobody: it starts the workers, starts again those that
die, passes SIGTERM on, and waits until all have drained. A worker whose supervisor is gone drains
and ends by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from loquent.clients import logs
from loquent.clients.cli import fail
from loquent.clients.config import resolve
from loquent.clients.serve import (
    announce,
    open_recognizer,
    parser,
    reload_on_hangup,
    say,
    server_config,
    stop_event,
)
from loquent.engine.errors import ConfigError, LoquentError
from loquent.engine.host import ServerConfig
from loquent.engine.recognizer import Recognizer
from loquent.engine.server import Server

logger = logging.getLogger(__name__)

_READY = b"ready\n"
# A worker that dies sooner than this after its start is started again later and later.
_STEADY = 60.0
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0
# Beyond the drain timeout, before a worker that does not end is killed.
_PATIENCE = 10.0


def supervise(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run `options.workers` workers with the flags `argv`; returns the exit status.

    Raises ConfigError, OSError.
    """
    if not sys.platform.startswith("linux"):
        raise ConfigError(
            "--workers needs Linux, where the kernel spreads connections over processes that share "
            "a port (SO_REUSEPORT); start one server for each port instead"
        )
    config = server_config(options)
    try:
        reserved = _reserve(config.host, config.port)
    except OSError as exc:
        reason = exc.strerror or exc
        return fail(f"cannot listen on {config.host} port {config.port}: {reason}; try --port")
    folder = Path(tempfile.mkdtemp(prefix="loquent-workers-"))
    try:
        port = reserved.getsockname()[1]
        supervisor = Supervisor(options.workers, argv, config, port=port, folder=folder)
        return asyncio.run(supervisor.run())
    finally:
        reserved.close()
        shutil.rmtree(folder, ignore_errors=True)


class Supervisor:
    """Keeps the workers running."""

    def __init__(
        self, count: int, argv: Sequence[str], config: ServerConfig, *, port: int, folder: Path
    ) -> None:
        self._count = count
        self._argv = argv
        self._config = config
        self._port = port
        # What the workers have in common: their metrics, and the sessions that one may take from
        # another, as the kernel sends a client that comes back to any of them.
        self._metrics = folder / "metrics"
        self._metrics.mkdir()
        self._environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(self._metrics)}
        if config.snapshots is None:
            self._environment["LOQUENT_SNAPSHOTS"] = str(folder / "sessions")
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._stop: asyncio.Event

    async def run(self) -> int:
        """Until SIGTERM or Ctrl-C, or until a worker cannot even start; the exit status."""
        self._stop = stop_event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)
        loop = asyncio.get_running_loop()
        started: list[asyncio.Future[bool]] = [loop.create_future() for _ in range(self._count)]
        slots = [
            asyncio.create_task(self._keep(slot, future)) for slot, future in enumerate(started)
        ]
        all_started = asyncio.gather(*started)
        stopped = asyncio.create_task(self._stop.wait())
        first: list[asyncio.Future[Any]] = [all_started, stopped, *slots]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        status = 0
        if any(slot.done() for slot in slots):
            status = 1  # a worker that could not start has said why
        elif all_started.done():
            announce(self._config, self._port)
            say(f"{self._count} workers, Ctrl-C stops them.")
            await stopped
            say("stopping")
        self._stop.set()
        await self._end(slots)
        all_started.cancel()
        await asyncio.gather(all_started, stopped, return_exceptions=True)
        return status

    async def _keep(self, slot: int, started: asyncio.Future[bool]) -> None:
        loop = asyncio.get_running_loop()
        delay = _FIRST_DELAY
        while not self._stop.is_set():
            began = loop.time()
            process = await self._spawn()
            self._processes[slot] = process
            assert process.stdout is not None, "it is a pipe"
            ready = await process.stdout.readline() == _READY
            if ready and not started.done():
                started.set_result(True)
            status = await process.wait()
            del self._processes[slot]
            mark_process_dead(process.pid, str(self._metrics))  # type: ignore[no-untyped-call]
            if self._stop.is_set():
                return
            if not started.done():
                started.set_result(False)
                return
            if loop.time() - began > _STEADY:
                delay = _FIRST_DELAY
            logger.error(
                "worker %d (process %d) ended with status %d; another starts in %g s",
                slot,
                process.pid,
                status,
                delay,
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stop.wait()
            delay = min(2 * delay, _LONGEST_DELAY)

    async def _spawn(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loquent.clients.workers", str(self._port), *self._argv),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            # Ctrl-C at the terminal is for the supervisor, which passes it on.
            start_new_session=True,
        )

    def _reload(self) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGHUP)

    async def _end(self, slots: Sequence[asyncio.Task[None]]) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        _, late = await asyncio.wait(slots, timeout=self._config.drain_timeout + _PATIENCE)
        if late:
            for process in self._processes.values():
                logger.error("process %d does not end; killed", process.pid)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await asyncio.wait(late)


def _reserve(host: str, port: int) -> socket.socket:
    """A socket that holds the port for the workers without listening. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    # With SO_REUSEPORT a stranger's server on the port would go unnoticed.
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind(address)
        trial.listen()
        address = trial.getsockname()
    reserved = socket.socket(family, kind, protocol)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(address)
    except OSError:
        reserved.close()
        raise
    return reserved


# The rest runs in a worker.


def work(port: int, argv: Sequence[str]) -> int:
    """One worker on the supervisor's port; returns the exit status."""
    try:
        options = resolve(parser(), argv, os.environ)
        logs.set_up(
            format=options.log_format, level="info" if options.verbose else options.log_level
        )
        config = dataclasses.replace(server_config(options), port=port, reuse_port=True)
        recognizer = open_recognizer(options)
        asyncio.run(_work(recognizer, config, options))
    except (LoquentError, OSError) as exc:
        return fail(str(exc))
    return 0


async def _work(recognizer: Recognizer, config: ServerConfig, options: argparse.Namespace) -> None:
    stop = stop_event()
    # The other end of this pipe closes with the supervisor, however that ends.
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), stop.set)
    async with Server(recognizer, config) as server:
        reload_on_hangup(server, options)
        sys.stdout.buffer.write(_READY)
        sys.stdout.buffer.flush()
        await stop.wait()
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())


if __name__ == "__main__":
    sys.exit(work(int(sys.argv[1]), sys.argv[2:]))
