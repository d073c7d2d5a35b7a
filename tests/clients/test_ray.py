"""Two replicas on a local Ray: sessions are cut, replicas are added and replaced, and all go on."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loquent.clients.ray_policy import LagPolicy


@dataclass
class Context:
    total_num_requests: float = 0.0
    current_num_replicas: int = 2
    target_num_replicas: int = 2
    aggregated_metrics: dict[str, dict[Any, float]] | None = field(default_factory=dict)
    config: Any = field(default_factory=lambda: SimpleNamespace(target_ongoing_requests=10))


@pytest.mark.parametrize(
    ("context", "wanted"),
    [
        (Context(), 1),
        (Context(total_num_requests=20), 2),
        (Context(total_num_requests=21), 3),
        (Context(total_num_requests=4, aggregated_metrics=None), 1),
        # What sessions cost is measured: with larger ones fewer go into a replica.
        (Context(total_num_requests=8, aggregated_metrics={"load": {1: 0.8, 2: 0.7}}), 3),
        (Context(total_num_requests=8, aggregated_metrics={"load": {1: 0.3, 2: 0.3}}), 1),
        # Whatever the reason is, people wait for their words.
        (Context(aggregated_metrics={"load": {1: 0.1}, "lag": {1: 0.2, 2: 5.0}}), 3),
        (Context(aggregated_metrics={"load": {1: 0.1}, "lag": {1: 0.2, 2: 1.0}}), 1),
        (Context(current_num_replicas=0, target_num_replicas=0), 1),
    ],
)
def test_how_many_replicas_are_wanted(context: Context, wanted: int) -> None:
    assert LagPolicy(target_load=0.6, max_lag=2.0)(context) == (wanted, {})


OPTIONS = """
from loquent.clients.ray_app import Loquent, application
config = application().host.config
print(Loquent.max_ongoing_requests, config.max_sessions, config.drain_timeout, config.host)
print(config.limits.sessions_per_key, *config.keys.names)
"""


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_a_replica_heeds_its_environment(bundle: str) -> None:
    def start(**env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", OPTIONS],
            env={**os.environ, "LOQUENT_BUNDLE": bundle, **env},
            capture_output=True,
            text=True,
            check=False,
        )

    assert start(LOQUENT_STREAMS="10").stdout.splitlines() == ["40 40 120.0 0.0.0.0", "0"]
    keys = {"LOQUENT_API_KEYS": "alice:correct-horse-battery", "LOQUENT_SESSIONS_PER_KEY": "2"}
    limits = {"LOQUENT_MAX_SESSIONS": "7", "LOQUENT_DRAIN_TIMEOUT": "20"}
    assert start(**keys, **limits).stdout.splitlines() == ["7 7 20.0 0.0.0.0", "2 alice"]
    refused = start(LOQUENT_MAX_SESSIONS="many")
    assert refused.returncode == 1
    assert "LOQUENT_MAX_SESSIONS: argument --max-sessions: got 'many'" in refused.stderr


SCRIPT = """
import asyncio, sys, time
import numpy as np, ray, soundfile
from ray import serve
from loquent.clients.client import connect
from loquent.engine.events import Final
from loquent.engine.protocol import Start
from loquent.engine.recognizer import Recognizer

ray.init(num_cpus=3, include_dashboard=False, logging_level="error")
from loquent.clients.ray_app import app
began = time.monotonic()
serve.run(app)
say = lambda *words: print(f"{time.monotonic() - began:.1f}", *words, flush=True)
pcm, rate = soundfile.read(sys.argv[2], dtype="int16")
clip = np.concatenate([pcm, np.zeros(2 * rate, np.int16)])
recognizer = Recognizer.load(sys.argv[1])

def replicas():
    [deployment] = serve.status().applications["default"].deployments.values()
    return {str(state): count for state, count in deployment.replica_states.items() if count}

class Talk:
    def __init__(self, resume):
        self.resume, self.enough, self.times, self.got = resume, asyncio.Event(), 0, []

    async def run(self, cuts=()):
        # The recording again and again at the speed of speech, until it is enough.
        url = "ws://127.0.0.1:8000/v1/stream"
        start = Start(sample_rate=rate, resume=self.resume)
        async with connect(url, start, patience=60) as session:
            self.session = session
            async def speak():
                number = 0
                while not self.enough.is_set():
                    for at in range(0, len(pcm), 3200):
                        await session.send(pcm[at : at + 3200])
                        await asyncio.sleep(0.2)
                        if (number := number + 1) in cuts:
                            session._connection.transport.abort()
                    await session.send(clip[len(pcm) :])
                    self.times += 1
                await session.end()
            speaker = asyncio.create_task(speak())
            self.got = [event.text async for event in session if isinstance(event, Final)]
            await speaker
        want = [final.text for final in recognizer.transcribe(np.tile(clip, self.times))]
        assert self.got == want, (self.got, want)
        return session.connections

async def main():
    say("replicas", replicas())
    talks = [Talk(True) for _ in range(4)] + [Talk(None)]
    running = [asyncio.create_task(talk.run(cuts=(3, 8) if talk.resume else ())) for talk in talks]
    while replicas() != {"RUNNING": 2}:
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in running), [task.result() for task in running]
    say("scaled to", replicas())
    await asyncio.sleep(2)
    before = [talk.session.connections for talk in talks]
    update = asyncio.create_task(asyncio.to_thread(serve.run, app))
    await asyncio.sleep(5)
    talks[-1].enough.set()  # what cannot be resumed goes on where it is until it ends
    await update
    while replicas() != {"RUNNING": 2}:
        await asyncio.sleep(0.5)
    say("updated", replicas())
    await asyncio.sleep(2)
    for talk in talks:
        talk.enough.set()
    after = await asyncio.gather(*running)
    say("connections", before, after, "times", [talk.times for talk in talks])
    assert before[:4] == [3] * 4 and before[4] == after[4] == 1
    assert all(more > 3 for more in after[:4])

asyncio.run(asyncio.wait_for(main(), 120))
serve.shutdown()
"""


# Recordings come in bursts, so that audio waits, while the load asks for nothing.
LAGGING = """
import asyncio, sys, time
import numpy as np, ray, soundfile
from ray import serve
from loquent.clients.client import connect
from loquent.engine.events import Final
from loquent.engine.protocol import Start

ray.init(num_cpus=3, include_dashboard=False, logging_level="error")
from loquent.clients.ray_app import app
serve.run(app)
pcm, rate = soundfile.read(sys.argv[2], dtype="int16")

def running():
    [deployment] = serve.status().applications["default"].deployments.values()
    return sum(n for state, n in deployment.replica_states.items() if str(state) == "RUNNING")

async def main():
    assert running() == 1
    await asyncio.sleep(15)
    assert running() == 1, "nobody speaks, and nothing waits"
    began = time.monotonic()
    url = "ws://127.0.0.1:8000/v1/stream"
    async with connect(url, Start(sample_rate=rate), patience=60) as session:
        got = []
        async def listen():
            got.extend([event.text async for event in session if isinstance(event, Final)])
        async def speak():
            while not enough.is_set():
                for _ in range(5):
                    await session.send(pcm)
                await asyncio.sleep(0.5)  # no more than is heard in time
            await session.end()
        enough = asyncio.Event()
        tasks = [asyncio.create_task(listen()), asyncio.create_task(speak())]
        while (count := await asyncio.to_thread(running)) < 2:
            print(round(time.monotonic() - began, 1), "s:", count, flush=True)
            assert time.monotonic() - began < 90, "nothing was added"
            await asyncio.sleep(0.5)
        enough.set()
        await asyncio.gather(*tasks)
    print("scaled after", round(time.monotonic() - began, 1), "s, finals", len(got))
    assert got

asyncio.run(asyncio.wait_for(main(), 130))
serve.shutdown()
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_sessions_go_on_while_replicas_come_and_go(
    bundle: str, speech: Path, tmp_path: Path
) -> None:
    # Sessions alone do not ask for a second replica, but the load that they measure does.
    settings = {"LOQUENT_SNAPSHOTS": str(tmp_path / "sessions"), "LOQUENT_TARGET_LOAD": "0.0001"}
    assert "connections" in _serve(SCRIPT, settings, bundle, speech)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_a_replica_is_added_where_audio_waits(bundle: str, speech: Path) -> None:
    settings = {"LOQUENT_TARGET_LOAD": "1000", "LOQUENT_MAX_LAG": "0.05"}
    assert "scaled after" in _serve(LAGGING, settings, bundle, speech)


def _serve(script: str, settings: dict[str, str], bundle: str, speech: Path) -> str:
    """What the script prints, with one replica of up to two, each meant for a hundred sessions."""
    env = {
        **os.environ,
        "LOQUENT_BUNDLE": bundle,
        "LOQUENT_MIN_REPLICAS": "1",
        "LOQUENT_MAX_REPLICAS": "2",
        "LOQUENT_STREAMS": "100",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        **settings,
    }
    done = subprocess.run(
        [sys.executable, "-c", script, bundle, str(speech)],
        env=env,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
