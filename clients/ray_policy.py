"""How many replicas Ray is to keep: by their sessions, by their measured load, and by their lag.

A class for `ray.serve.config.AutoscalingPolicy`, run in Ray's controller. Ray itself keeps the
number within its bounds and waits its delays before it follows. Knows nothing of Ray but what a
context has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol


class Context(Protocol):
    """What is needed of ``ray.serve.config.AutoscalingContext``."""

    current_num_replicas: int
    target_num_replicas: int
    config: Any

    @property
    def total_num_requests(self) -> float:
        """Sessions of all replicas, and requests that wait for one."""

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """By name and replica, what ``record_autoscaling_stats`` gave."""


class LagPolicy:
    """The policy.

    Args:
        target_load: share of a replica's time that its sessions are to need.
        max_lag: seconds of audio that may wait in a session; where it is more, one replica more is
            asked for, whatever the load says.
    """

    def __init__(self, target_load: float, max_lag: float) -> None:
        self._load = target_load
        self._lag = max_lag

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """The replicas wanted, and nothing to remember."""
        current = context.current_num_replicas
        if not current:
            return max(context.target_num_replicas, 1), {}
        metrics = context.aggregated_metrics or {}
        loads = metrics.get("load", {}).values()
        lags = metrics.get("lag", {}).values()
        wanted = max(
            context.total_num_requests / context.config.target_ongoing_requests,
            sum(loads) / self._load,
        )
        if max(lags, default=0.0) > self._lag:
            wanted = max(wanted, current + 1)
        return max(1, math.ceil(wanted - 1e-6)), {}
