"""Prometheus metrics of the service, at /metrics."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram

# Seconds: from one engine step (10 ms) to the longest answer that a request can ask for.
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
    decisions: Counter  # check, decision (allow, or the reason), version
    events: Counter  # outcome (stored, refused, lost)
    shadows: Counter  # same (yes, no, skipped), version
    switch_s: Histogram
    served: Gauge  # version, role: 1 while the version has the role


@cache
def get_metrics() -> Metrics:
    """Return the instruments, created once per process.

    Created late: BentoML sets the folder for the metrics of its workers only after it has imported the
    service, and instruments created before that would never be exported.
    """
    from prometheus_client import Counter, Gauge, Histogram

    def counter(name: str, text: str, *labels: str) -> Counter:
        return Counter(f"perennial_{name}", text, labels)

    def gauge(name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"perennial_{name}", text, labels, multiprocess_mode="livemostrecent")

    def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"perennial_{name}", text, labels, buckets=buckets)

    return Metrics(
        requests=counter("requests", "Requests by status", "route", "status", "version"),
        waiting=gauge("waiting_requests", "Requests waiting for the engine"),
        running=gauge("running_requests", "Answers being generated"),
        queue_s=histogram("queue_seconds", "Time waiting for the engine", LATENCY_S, "version"),
        first_token_s=histogram("first_token_seconds", "Time to the first token", LATENCY_S, "version"),
        total_s=histogram("answer_seconds", "Time to the complete answer", LATENCY_S, "version"),
        tokens_per_s=histogram(
            "answer_tokens_per_second", "Generation speed of one answer", TOKENS_PER_S, "version"
        ),
        tokens=counter("tokens", "Prompt and generated tokens", "direction", "version"),
        decisions=counter("guard_decisions", "Decisions of the guard", "check", "decision", "version"),
        events=counter("events", "Events by outcome", "outcome"),
        shadows=counter(
            "shadow_answers", "Shadow answers by whether they equal the shown one", "same", "version"
        ),
        switch_s=histogram(
            "switch_seconds", "Time from an alias change to serving the new version", LATENCY_S
        ),
        served=gauge("served", "Versions by their current role", "version", "role"),
    )
