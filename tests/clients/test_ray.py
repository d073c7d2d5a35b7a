"""Two replicas on a local Ray: sessions are cut and go on, in whichever replica they come to."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = """
import asyncio, sys
import numpy as np, ray, soundfile
from ray import serve
from loquent.clients.client import connect
from loquent.engine.events import Final
from loquent.engine.protocol import Start
from loquent.engine.recognizer import Recognizer

ray.init(num_cpus=3, include_dashboard=False, logging_level="error")
from loquent.clients.ray_app import app
serve.run(app)
pcm, rate = soundfile.read(sys.argv[2], dtype="int16")
want = [final.text for final in Recognizer.load(sys.argv[1]).transcribe(pcm)]

async def talk():
    url = "ws://127.0.0.1:8000/v1/stream"
    async with connect(url, Start(sample_rate=rate, resume=True), patience=60) as session:
        async def speak():
            for number, at in enumerate(range(0, len(pcm), 3200)):
                await session.send(pcm[at : at + 3200])
                await asyncio.sleep(0.05)
                if number in (2, 7):
                    session._connection.transport.abort()
            await session.end()
        speaker = asyncio.create_task(speak())
        got = [event.text async for event in session if isinstance(event, Final)]
        await speaker
        assert got == want, (got, want)
        return session.connections

async def main():
    print("connections", await asyncio.gather(*(talk() for _ in range(4))))

asyncio.run(asyncio.wait_for(main(), 100))
[deployment] = serve.status().applications["default"].deployments.values()
print("replicas", deployment.replica_states)
serve.shutdown()
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_sessions_go_on_across_replicas(bundle: str, speech: Path, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "LOQUENT_BUNDLE": str(bundle),
        "LOQUENT_SNAPSHOTS": str(tmp_path / "sessions"),
        "LOQUENT_MIN_REPLICAS": "2",
        "LOQUENT_MAX_REPLICAS": "2",
        "LOQUENT_STREAMS": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(bundle), str(speech)],
        env=env,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "connections [3, 3, 3, 3]" in done.stdout
    assert "'RUNNING': 2" in done.stdout
