"""Loquent on a Ray cluster: ``serve run loquent.clients.ray_app:app`` (extra ``[cluster]``).

Every replica is one process with one core, one recogniser and the sessions that came to it. A
WebSocket stays with its replica until it ends. `loquent.clients.ray_policy` says how many replicas
there are to be: by sessions, by the load that each measures, and by lag. A replica that is behind
all the same refuses more by its own measurement (503 with Retry-After; Ray tries no other replica,
the client does).

A rolling update starts new replicas and stops old ones, as scaling down does. Ray lets one that it
stops finish its requests, for up to LOQUENT_DRAIN_TIMEOUT seconds (120), and then kills it. With
LOQUENT_SNAPSHOTS, a private folder on a disk that all nodes share, sessions that can be resumed do
not wait for that: they are handed over, also when only their connection is lost, and go on in
whatever replica the client comes to; without it they can be resumed by luck only. A replica that
dies takes its sessions with it; its clients get an error and start anew.

Settings come from the environment of the replicas, which on other machines is what Ray was started
with there, or ``env_vars`` of a ``runtime_env``: what ``loquent serve`` reads (keys and limits are
each replica's; LOQUENT_MAX_SESSIONS is four times LOQUENT_STREAMS), and LOQUENT_STREAMS (sessions a
replica is meant to have, 24), LOQUENT_TARGET_LOAD (share of its time that they are to need, 0.6),
LOQUENT_MAX_LAG (seconds of audio that may wait in a session before a replica more is asked for, 2),
LOQUENT_MIN_REPLICAS (1), LOQUENT_MAX_REPLICAS (8).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from functools import cache
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingPolicy

from loquent.clients.ray_policy import LagPolicy
from loquent.clients.serve import create_app, environment
from loquent.engine.asgi import App

# Seconds that a replica which is stopped has for its sessions, unless LOQUENT_DRAIN_TIMEOUT says.
DRAIN = 120.0
# Seconds between two questions whether a replica is well.
HEALTH = 1.0


def streams() -> int:
    """Sessions that a replica is meant to have."""
    return int(os.environ.get("LOQUENT_STREAMS", "24"))


def options() -> argparse.Namespace:
    """A replica's, from the environment. Raises ConfigError, OSError."""
    return environment(max_sessions=4 * streams(), drain_timeout=DRAIN)


@cache
def application() -> App:
    """This process's application, loaded when it is first asked for."""
    return create_app(options())


def ingress() -> App:
    """For Ray, which calls it in the replica."""
    return application()


@serve.deployment(
    max_ongoing_requests=options().max_sessions,
    ray_actor_options={"num_cpus": 1},
    health_check_period_s=HEALTH,
    graceful_shutdown_timeout_s=options().drain_timeout + 10.0,
    autoscaling_config={
        "min_replicas": int(os.environ.get("LOQUENT_MIN_REPLICAS", "1")),
        "max_replicas": int(os.environ.get("LOQUENT_MAX_REPLICAS", "8")),
        "target_ongoing_requests": streams(),
        "upscale_delay_s": 5.0,
        "downscale_delay_s": 300.0,
        "policy": AutoscalingPolicy(  # type: ignore[no-untyped-call, unused-ignore]
            policy_function=LagPolicy,
            policy_kwargs={
                "target_load": float(os.environ.get("LOQUENT_TARGET_LOAD", "0.6")),
                "max_lag": float(os.environ.get("LOQUENT_MAX_LAG", "2")),
            },
        ),
    },
)
@serve.ingress(ingress)
class Loquent:
    """One replica."""

    def __init__(self) -> None:
        application()  # loads the bundle before the replica counts as ready
        self._asked = time.monotonic()  # when Ray last wanted to know whether it is well
        self._watching: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """Ray asks from time to time; a replica whose batcher died is replaced."""
        self._asked = time.monotonic()
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        if not application().host.batcher.running:
            raise RuntimeError("the batcher of this replica has stopped")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `LagPolicy`."""
        host = application().host
        return {"load": host.batcher.load(), "lag": host.lag}

    async def _watch(self) -> None:
        """Move out once this replica is stopped, of which Ray tells it nothing.

        But it asks no replica how it is that it has given up. The worst that a mistake can do is
        that clients come back to where they were.
        """
        while True:
            await asyncio.sleep(HEALTH)
            if time.monotonic() - self._asked > 3 * HEALTH and await asyncio.to_thread(_stops_one):
                application().host.move_out()

    async def __del__(self) -> None:
        """Ray calls this when a stopped replica has no requests left, or no time."""
        await application().stop()


def _stops_one() -> bool:
    """Whether Ray is stopping replicas of this deployment."""
    context = serve.get_replica_context()
    application = serve.status().applications[context.app_name]
    states = application.deployments[context.deployment].replica_states
    return any(state == "STOPPING" and count for state, count in states.items())


app: Any = Loquent.bind()  # type: ignore[attr-defined]
