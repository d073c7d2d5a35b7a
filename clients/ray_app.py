"""Loquent on a Ray cluster: ``serve run loquent.clients.ray_app:app`` (extra ``[cluster]``).

Every replica is one process with one core, one recogniser and the sessions that came to it. A
WebSocket stays with its replica until it ends. Ray scales by what a replica has in hand, and a
session is one ongoing request, so the target is set to the sessions that one core holds: lag is
kept away by not going there, and a replica that is behind all the same refuses more by its own
measurement (503 with Retry-After; Ray tries no other replica, the client does).

A rolling update starts new replicas and stops old ones, which get ``DRAIN`` seconds for their
sessions. With ``LOQUENT_SNAPSHOTS``, a private folder on a disk that all nodes share, sessions that
can be resumed are handed over instead, also when only their connection is lost, and go on in
whatever replica the client comes to; without it they can be resumed by luck only. A replica that
dies takes its sessions with it; its clients get an error and start anew.

Settings come from the environment: LOQUENT_BUNDLE, LOQUENT_SNAPSHOTS, LOQUENT_STREAMS (sessions a
replica is meant to have, 24), LOQUENT_MIN_REPLICAS (1), LOQUENT_MAX_REPLICAS (8).
"""

from __future__ import annotations

import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ray import serve

from loquent.engine.asgi import App
from loquent.engine.host import ServerConfig
from loquent.engine.recognizer import Recognizer

# Seconds that a replica which is stopped has for its sessions.
DRAIN = 120.0


def config() -> ServerConfig:
    """A replica's, from the environment."""
    snapshots = os.environ.get("LOQUENT_SNAPSHOTS")
    return ServerConfig(
        # The proxy of Ray is who connects; where it may be reached from is Ray's business.
        host="0.0.0.0",
        max_sessions=4 * streams(),
        page=files("loquent.clients") / "web",
        snapshots=Path(snapshots) if snapshots else None,
        share_parked=bool(snapshots),
        drain_timeout=DRAIN,
    )


def streams() -> int:
    """Sessions that a replica is meant to have."""
    return int(os.environ.get("LOQUENT_STREAMS", "24"))


@cache
def application() -> App:
    """This process's application, loaded when it is first asked for."""
    return App(Recognizer.load(os.environ.get("LOQUENT_BUNDLE", "en")), config())


def ingress() -> App:
    """For Ray, which calls it in the replica."""
    return application()


@serve.deployment(
    max_ongoing_requests=4 * streams(),
    ray_actor_options={"num_cpus": 1},
    graceful_shutdown_timeout_s=DRAIN + 10.0,
    autoscaling_config={
        "min_replicas": int(os.environ.get("LOQUENT_MIN_REPLICAS", "1")),
        "max_replicas": int(os.environ.get("LOQUENT_MAX_REPLICAS", "8")),
        "target_ongoing_requests": streams(),
        "upscale_delay_s": 5.0,
        "downscale_delay_s": 300.0,
    },
)
@serve.ingress(ingress)
class Loquent:
    """One replica."""

    def __init__(self) -> None:
        application()  # loads the bundle before the replica counts as ready

    async def check_health(self) -> None:
        """Ray asks from time to time; a replica whose batcher died is replaced."""
        if not application().host.batcher.running:
            raise RuntimeError("the batcher of this replica has stopped")

    async def __del__(self) -> None:
        """Ray calls this when a replica is stopped: hand over, or let sessions finish."""
        await application().stop()


app: Any = Loquent.bind()  # type: ignore[attr-defined]
