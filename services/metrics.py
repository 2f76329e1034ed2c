"""What Prometheus sees of the service, at /metrics."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram

# Seconds: from an engine's single step (10 ms) to the longest answer a request may ask for.
LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKENS_PER_S = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True, slots=True)
class Metrics:
    """The instruments; `version` is the model's content hash."""

    requests: Counter  # route, status, version
    waiting: Gauge
    running: Gauge
    queue_s: Histogram  # version
    first_token_s: Histogram  # version
    total_s: Histogram  # version
    tokens_per_s: Histogram  # version
    tokens: Counter  # direction (in, out), version
    verdicts: Counter  # check, verdict (allow, or the reason), version
    events: Counter  # outcome (stored, refused, lost)
    shadows: Counter  # same (yes, no, left out), version
    switch_s: Histogram
    served: Gauge  # version, role: 1 while the version has the role


@cache
def get_metrics() -> Metrics:
    """Return the instruments, made once a process.

    Made late: BentoML names the folder that its workers' figures are gathered in after it has
    imported the service, and instruments made before would never be shown.
    """
    from prometheus_client import Counter, Gauge, Histogram

    def counter(name: str, text: str, *labels: str) -> Counter:
        return Counter(f"perennial_{name}", text, labels)

    def gauge(name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"perennial_{name}", text, labels, multiprocess_mode="livemostrecent")

    def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"perennial_{name}", text, labels, buckets=buckets)

    return Metrics(
        requests=counter("requests", "Requests by how they ended", "route", "status", "version"),
        waiting=gauge("waiting_requests", "Requests that wait for a place in the engine"),
        running=gauge("running_requests", "Answers being written"),
        queue_s=histogram("queue_seconds", "Wait for a place in the engine", LATENCY_S, "version"),
        first_token_s=histogram("first_token_seconds", "Time to the first token", LATENCY_S, "version"),
        total_s=histogram("answer_seconds", "Time to the whole answer", LATENCY_S, "version"),
        tokens_per_s=histogram("answer_tokens_per_second", "Of one answer", TOKENS_PER_S, "version"),
        tokens=counter("tokens", "Tokens read and written", "direction", "version"),
        verdicts=counter("guard_verdicts", "What the guard said", "check", "verdict", "version"),
        events=counter("events", "Events by what became of them", "outcome"),
        shadows=counter("shadow_answers", "Unseen answers against the shown ones", "same", "version"),
        switch_s=histogram("switch_seconds", "From a changed alias to the new version", LATENCY_S),
        served=gauge("served", "Versions by the role they have now", "version", "role"),
    )
