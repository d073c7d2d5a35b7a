"""What the server counts, for Prometheus.

Where ``PROMETHEUS_MULTIPROC_DIR`` is set, as ``loquent serve --workers`` does, every process keeps
its numbers in files there and each of them answers for all.
"""

from __future__ import annotations

import bisect
import os
from collections import deque
from http import HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.multiprocess import MultiProcessCollector

from loquent.engine.events import Final, Partial

__all__ = ["CONTENT_TYPE", "Metrics", "SessionMetrics"]

_LATENCY = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
_STEP = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)
# Moments of arrival that a session remembers: at 50 packets a second, more than a minute.
_ARRIVALS = 4096


class Metrics:
    """The numbers of one server."""

    def __init__(self, bundle: str) -> None:
        self._registry = registry = CollectorRegistry()
        label = ["protocol"]
        self.sessions = Gauge(
            "loquent_sessions_open",
            "Sessions that are open",
            label,
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.sessions_total = Counter(
            "loquent_sessions_total", "Sessions that were opened", label, registry=registry
        )
        self.refused = Counter(
            "loquent_refused_total",
            "Requests for a session that got none, by HTTP status",
            ["status"],
            registry=registry,
        )
        self.errors = Counter(
            "loquent_errors_total", "Sessions that failed, by code", ["code"], registry=registry
        )
        self.audio = Counter(
            "loquent_audio_seconds_total", "Seconds of audio received", label, registry=registry
        )
        self.lag = Gauge(
            "loquent_lag_seconds",
            "Audio received but not yet recognised, of the session that has most",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.replaced = Counter(
            "loquent_dropped_partials_total",
            "Partials that a newer one replaced before they were sent",
            registry=registry,
        )
        self.batch = Histogram(
            "loquent_batch_size", "Streams in one step", buckets=_BATCH, registry=registry
        )
        self.step = Histogram(
            "loquent_step_seconds", "Time of one step", buckets=_STEP, registry=registry
        )
        self.first_partial = Histogram(
            "loquent_first_partial_seconds",
            "From the audio in which a segment begins to its first partial or final",
            buckets=_LATENCY,
            registry=registry,
        )
        self.final = Histogram(
            "loquent_final_seconds",
            "From the audio in which a segment's last word ends to its final, by reason",
            ["reason"],
            buckets=_LATENCY,
            registry=registry,
        )
        info = Gauge(
            "loquent_info",
            "1, with the bundle's name",
            ["bundle"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        info.labels(bundle).set(1)

    def refuse(self, status: HTTPStatus) -> None:
        """A request got no session."""
        self.refused.labels(str(status.value)).inc()

    def stepped(self, streams: int, seconds: float) -> None:
        """The recogniser advanced so many streams in so many seconds."""
        self.batch.observe(streams)
        self.step.observe(seconds)

    def dropped(self, partials: int) -> None:
        """Partials were replaced before they were sent."""
        self.replaced.inc(partials)

    def render(self) -> bytes:
        """Everything in Prometheus' text format, of all processes where there are several."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


class SessionMetrics:
    """One session's share: who came, when audio arrived, when its words went out.

    `now` is any clock in seconds that does not jump.
    """

    def __init__(self, metrics: Metrics, protocol: str) -> None:
        self._metrics = metrics
        self._protocol = protocol
        self._received = 0.0
        self._segment = -1
        self._arrivals = deque[tuple[float, float]](maxlen=_ARRIVALS)  # seconds of audio, now
        self._audio = metrics.audio.labels(protocol)

    def open(self) -> None:
        """The session begins."""
        self._metrics.sessions.labels(self._protocol).inc()
        self._metrics.sessions_total.labels(self._protocol).inc()

    def close(self) -> None:
        """The session is over."""
        self._metrics.sessions.labels(self._protocol).dec()

    def failed(self, code: str) -> None:
        """It ended with an error."""
        self._metrics.errors.labels(code).inc()

    def heard(self, seconds: float, now: float) -> None:
        """Audio arrived."""
        self._received += seconds
        self._arrivals.append((self._received, now))
        self._audio.inc(seconds)

    def said(self, event: object, now: float) -> None:
        """An event is about to be sent."""
        if not isinstance(event, Partial | Final):
            return
        if event.segment != self._segment:
            self._segment = event.segment
            self._observe(self._metrics.first_partial, event.start, now)
        if isinstance(event, Final):
            self._observe(self._metrics.final.labels(event.reason), event.end, now)

    def _observe(self, histogram: Histogram, position: float, now: float) -> None:
        at = bisect.bisect_left(self._arrivals, (position, 0.0))
        if at < len(self._arrivals):
            histogram.observe(max(0.0, now - self._arrivals[at][1]))
