"""The status of a checkout, from its files, the event store and Prefect's API, as one dict for page and JSON.

Every piece may be missing; then it is None or empty, and the page shows what to do. Nothing here raises for
a broken file or a server that is down: what could not be read is listed under "problems".
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flows.common.prefect_api import read_announced_url, read_auth_string
from flows.common.up_state import read_up_state
from flows.gate.verdict import GateVerdict, list_verdict_files, read_verdict_file
from flows.release.canary import read_trials
from flows.retrain import progress
from monitoring.feedback.rows import REPORT as FEEDBACK_REPORT
from monitoring.verdicts import DriftVerdict, get_window_folder, read_verdict
from monitoring.verdicts import list_verdict_files as list_window_files
from services.versions.aliases import ALIASES, Aliases, read_aliases
from services.versions.releases import Release, read_releases
from services.versions.store import read_pipeline_tag
from stages.common import network
from stages.common.artifacts import read_json
from stages.common.errors import InputError
from stages.common.model.exported import SERVING, find_exported
from stages.common.params.loading import Params

MAX_WINDOWS = 60  # drawn
MAX_GATES = 10
MAX_RELEASES = 12
MAX_BINS = 60
MAX_SPAN_S = 7 * 86_400.0  # of the traffic that is drawn
STEPS_S = (10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 10_800, 21_600)
FRESH_BINS = 3  # counted again each time: their answers and feedback are still coming
COUNT_WITHIN_S = 2.0  # the rest is counted at the next refresh
HTTP_TIMEOUT_S = 1.5
PREFECT_READ_TIMEOUT_S = 10.0  # it accepts at once where it is up, and answers late on a busy machine
PROGRAMS = ("service", "prefect", "executor", "mlflow", "evidently", "dashboard")  # as the page shows them
FLOWS = ("watch", "retrain", "release", "training")


@dataclass(slots=True)
class StatusCache:
    """Traffic bins already counted and verdicts already read, kept from one refresh to the next."""

    step_s: float = 0.0
    bins: dict[float, dict[str, Any]] = field(default_factory=dict)
    verdicts: dict[str, tuple[float, DriftVerdict]] = field(default_factory=dict)


def read_status(root: Path, params: Params, cache: StatusCache, now: float | None = None) -> dict[str, Any]:
    """Return the status of the checkout at `root`: plain values, times in unix s.

    Args:
        cache: kept by the caller from one refresh to the next.
    """
    now = time.time() if now is None else now
    problems: list[str] = []
    verdicts = _verdicts(root, cache, problems)
    status: dict[str, Any] = {
        "now": now,
        "model": _model(root, verdicts, problems),
        "verdict": _whole(root, verdicts[-1]) if verdicts else None,
        "verdicts": [_short(verdict) for verdict in verdicts[-MAX_WINDOWS:]],
        "flows": _flows(root, params.flows.pages.prefect),
        "retraining": _retraining(root, problems),
        "gates": _gates(root, problems),
        "releases": _releases(root, problems),
        "feedback": _json(root / FEEDBACK_REPORT, problems),
        "traffic": _traffic(root, params.services.events.url, cache, problems),
        "programs": _programs(root, params, problems),
    }
    return status | {"problems": problems}


def _model(root: Path, verdicts: Sequence[DriftVerdict], problems: list[str]) -> dict[str, Any]:
    """Return the aliases; before the first release, the model that the service serves."""
    aliases, exported = Aliases(), None
    with _reporting(problems):
        aliases = read_aliases(root / ALIASES)
    with _reporting(problems):
        exported = read_pipeline_tag(root)
    champion, since = aliases.champion or exported, aliases.champion_since
    if champion and since is None:
        starts = [
            verdict.reference.start if verdict.reference else verdict.window.start
            for verdict in verdicts
            if verdict.tag == champion
        ]
        since = min(
            starts, default=(find_exported(root) / SERVING).stat().st_mtime if exported == champion else None
        )
    return {
        "champion": champion,
        "released": aliases.champion is not None,
        "since": since,
        "challenger": asdict(aliases.challenger) if aliases.challenger else None,
        "former": aliases.history[-1] if aliases.history else None,
        "pinned": aliases.pinned,
        "exported": exported,
    }


def _releases(root: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Return the last releases, newest first."""
    found: list[Release] = []
    with _reporting(problems):
        found = read_releases(root)
    return [asdict(release) for release in found[: -MAX_RELEASES - 1 : -1]]


def _verdicts(root: Path, cache: StatusCache, problems: list[str]) -> list[DriftVerdict]:
    """Return the newest verdicts, oldest first; a file that did not change is not read again."""
    found: dict[str, tuple[float, DriftVerdict]] = {}
    for path in list_window_files(root)[-MAX_WINDOWS:]:
        window = path.parent.name
        with _reporting(problems):
            changed = path.stat().st_mtime
            known = cache.verdicts.get(window)
            found[window] = known if known and known[0] == changed else (changed, read_verdict(root, window))
    cache.verdicts = found
    return sorted((verdict for _, verdict in found.values()), key=lambda one: (one.window.end, one.id))


def _whole(root: Path, verdict: DriftVerdict) -> dict[str, Any]:
    report = get_window_folder(root, verdict.id) / "report.html"
    return asdict(verdict) | {"summary": verdict.summary, "has_report": report.exists()}


def _short(verdict: DriftVerdict) -> dict[str, Any]:
    return {
        "id": verdict.id,
        "tag": verdict.tag,
        "start": verdict.window.start,
        "end": verdict.window.end,
        "rows": verdict.window.rows,
        "judged": verdict.judged,
        "drifted": verdict.drifted,
        "fires": verdict.trigger.fires,
        "summary": verdict.summary,
        "drift_types": [one.drift_type for one in verdict.drift_types if one.drifted],
    }


def _gates(root: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Return the gate's verdicts, newest first, each with its canary and bake period."""
    verdicts: list[GateVerdict] = []
    for path in list_verdict_files(root):
        with _reporting(problems):
            verdicts.append(read_verdict_file(path))
    verdicts.sort(key=lambda verdict: verdict.made_at, reverse=True)
    return [asdict(one) | {"trials": _trials(root, one.tag, problems)} for one in verdicts[:MAX_GATES]]


def _trials(root: Path, tag: str, problems: list[str]) -> list[dict[str, Any]]:
    with _reporting(problems):
        return [asdict(verdict) for verdict in read_trials(root, tag)]
    return []


def _retraining(root: Path, problems: list[str]) -> dict[str, Any]:
    """Return the retraining that is running, if any, and the result of the last one."""
    state, history = None, []
    with _reporting(problems):
        state = progress.read_state(root)
    with _reporting(problems):
        history = progress.read_history(root)
    return {
        "at_work": asdict(state) if state else None,
        "last": asdict(history[-1]) if history else None,
    }


def _programs(root: Path, params: Params, problems: list[str]) -> list[dict[str, Any]]:
    """Return the state of each program of `make up`, or whether its address answers."""
    state = None
    with _reporting(problems):
        state = read_up_state(root)
    programs = [{"name": name, **asdict(one)} for name, one in state.programs.items()] if state else []
    pages = params.flows.pages
    tracking = params.flows.tracking.tracking_url
    known = {
        "service": f"http://{network.find_reachable_host(params.services.host)}:{params.services.port}/",
        "prefect": f"http://127.0.0.1:{pages.prefect}/",
        "mlflow": tracking if tracking.startswith("http") else f"http://127.0.0.1:{pages.mlflow}/",
        "evidently": f"http://127.0.0.1:{pages.evidently}/",
    }
    there = {program["name"] for program in programs}
    for name, page in known.items():
        if name not in there:
            up = network.is_up(page, HTTP_TIMEOUT_S)
            reason = "" if up else "does not answer" if there else "make up starts it"
            programs.append({"name": name, "state": "up" if up else "down", "page": page, "reason": reason})
    order = {name: place for place, name in enumerate(PROGRAMS)}
    return sorted(programs, key=lambda program: order.get(program["name"], len(order)))


def _flows(root: Path, port: int) -> dict[str, Any]:
    """Return the last run of each flow, from Prefect's API; `up` is False where none answers."""
    import httpx

    api = os.environ.get("PREFECT_API_URL") or read_announced_url(root)
    api = (api or f"http://127.0.0.1:{port}/api").rstrip("/")
    user, _, password = (read_auth_string(root, api) or "").partition(":")
    found: dict[str, Any] = {}
    try:
        timeout = httpx.Timeout(PREFECT_READ_TIMEOUT_S, connect=HTTP_TIMEOUT_S)
        with httpx.Client(timeout=timeout, auth=(user, password) if password else None) as client:
            flows = client.post(f"{api}/flows/filter", json={"limit": 200}).raise_for_status().json()
            # Ours, and only those that ran: the server may be shared with other projects.
            for flow in (one for one in flows if one["name"] in FLOWS):
                wanted = {
                    "flows": {"id": {"any_": [flow["id"]]}},
                    "flow_runs": {"state": {"type": {"not_any_": ["SCHEDULED"]}}},
                    "sort": "START_TIME_DESC",
                    "limit": 1,
                }
                runs = client.post(f"{api}/flow_runs/filter", json=wanted).raise_for_status().json()
                if runs:
                    found[flow["name"]] = _run(runs[0], api.removesuffix("/api"))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
        return {"up": False, "api": api, "runs": {}}
    return {"up": True, "api": api, "runs": found}


def _run(run: dict[str, Any], page: str) -> dict[str, Any]:
    state = run.get("state") or {}
    return {
        "name": run.get("name"),
        "state": state.get("type"),
        "message": state.get("message"),
        "started": _instant(run.get("start_time")),
        "seconds": run.get("total_run_time"),
        "page": f"{page}/runs/flow-run/{run.get('id')}",
    }


def _instant(text: str | None) -> float | None:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp() if text else None


def _traffic(root: Path, events_url: str, cache: StatusCache, problems: list[str]) -> dict[str, Any] | None:
    """Return counts of the last days of traffic in bins of one length; None without any."""
    from services.events import count_traffic, read_time_span

    url = _store(root, events_url)
    if url is None:
        return None
    try:
        span = read_time_span(url)
        if span is None:
            return None
        edges, step_s = cut_bins(*span)
        if cache.step_s != step_s:
            cache.step_s, cache.bins = step_s, {}
        fresh = set(edges[-1 - FRESH_BINS : -1])
        wanted = [start for start in reversed(edges[:-1]) if start in fresh or start not in cache.bins]
        deadline = time.monotonic() + COUNT_WITHIN_S
        for one in count_traffic(url, ((start, start + step_s) for start in wanted)):
            cache.bins[one.start] = asdict(one)
            if time.monotonic() > deadline:
                break
    except InputError as error:
        problems.append(f"the event store: {error.what}")
        return None
    cache.bins = {start: value for start, value in cache.bins.items() if start >= edges[0]}
    return {
        "step_s": step_s,
        "bins": [cache.bins[start] for start in edges[:-1] if start in cache.bins],
        "complete": all(start in cache.bins for start in edges[:-1]),
    }


def _store(root: Path, url: str) -> str | None:
    """Return the store's address seen from `root`; None for a file that is not there yet."""
    file = re.fullmatch(r"(sqlite(?:\+\w+)?:///)(?!/)(.+)", url)
    if file is None:
        return url
    path = root / file[2]
    return f"{file[1]}{path}" if path.exists() else None


def cut_bins(first: float, last: float) -> tuple[list[float], float]:
    """Return the edges of at most `MAX_BINS` bins that hold [first, last], and their length in s.

    Edges are multiples of the length, so that a bin stays the same at every refresh. Traffic older than
    `MAX_SPAN_S` before the last is excluded.
    """
    first = max(first, last - MAX_SPAN_S)
    fitting = (step for step in STEPS_S if (last - first) / step <= MAX_BINS - 2)
    step = float(next(fitting, STEPS_S[-1]))
    start = math.floor(first / step) * step
    count = math.floor((last - start) / step) + 1
    return [start + step * place for place in range(count + 1)], step


def _json(path: Path, problems: list[str]) -> Any:
    """Return what a JSON file holds; None if it is not there, or is broken (which is reported)."""
    if not path.exists():
        return None
    with _reporting(problems):
        return read_json(path)
    return None


@contextmanager
def _reporting(problems: list[str]) -> Iterator[None]:
    """Add a file's error to the problems instead of raising it."""
    try:
        yield
    except InputError as error:
        problems.append(error.what)
    except OSError as error:
        problems.append(str(error))
