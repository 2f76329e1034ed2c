"""Run the whole loop on generated traffic, in minutes: drift, retraining, gate, canary, promotion.

A model is trained and served in a separate checkout (`.perennial/demo`; the project's files are not
changed). Users ask what it was trained on; then the traffic changes: new phrasings, a new wing of the house,
German. A tenth of the requests offers tools, all day. Drift is detected, the users' corrections become
training rows, and the candidate passes the gate and a canary before it is promoted; a poisoned one is
rejected. Service, flows and pages are those of `make up`; only the users are simulated.

    perennial demo           # the whole demo
    perennial demo --show    # the pages of the last demo again, until Ctrl-C
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flows.common import processes
from flows.common.checkout import build_checkout_environment, make_checkout, run_python
from flows.common.cli import run_command
from flows.demo.poison import train_poisoned
from flows.demo.replay import ReplayResult, replay
from flows.demo.report import REPORT, Accuracy, DemoResult, Step, format_share, write_report
from flows.demo.tool_replay import ToolCounts
from flows.demo.tool_traffic import count_tool_requests, write_conversations
from flows.demo.traffic import Kind, TrafficModel, is_english_default, read_traffic_model, write_traffic
from flows.gate.judge import run_gate
from flows.gate.verdict import GateVerdict
from flows.retrain import progress
from monitoring.verdicts import DriftVerdict, read_verdicts
from services.versions.aliases import ALIASES, read_aliases
from services.versions.store import read_pipeline_tag
from stages.common import network
from stages.common.artifacts import STATE
from stages.common.errors import InputError
from stages.common.model.adapter import FOLDER as ADAPTER
from stages.common.model.adapter import clear_initial_adapter
from stages.common.params.loading import load_params
from stages.common.params.stages import Source

CHECKOUT = STATE / "demo"
NEW: Mapping[Kind, float] = {"phrasing": 0.35, "wing": 0.35, "german": 0.3}
OLD: Mapping[Kind, float] = {"known": 1.0}

# What is smaller than in production, so that the demo takes minutes; everything else is as shipped.
SOURCE = {"reserved_share": 0.15, "rows_per_template": 5}
SETTINGS: dict[str, Any] = {
    "task.tools_template": "default",  # for the requests with tools
    "finetune.replay_share": 0.25,
    "ask_base.max_rows": 300,
    "flows.training.cron": None,
    "flows.watch.cron": None,
    "monitoring.reference.rows": 600,
    "monitoring.window.rows": 200,
    "monitoring.window.settle_s": 1,
    "monitoring.trigger.min_labelled_rows": 400,
    "monitoring.trigger.cooldown_hours": 0,
    "monitoring.feedback.max_rows_per_user": 200,
    "flows.retrain.canary.share": 0.4,
    "flows.retrain.canary.min_requests": 100,
    "flows.retrain.canary.max_minutes": 5,
}
PAGES = ("dashboard", "prefect", "mlflow", "evidently")
READY_WITHIN_S = 240.0
STOP_PATIENCE_S = 60.0
POLL_S = 0.5
TRICKLE_S = 30.0  # between two visits while the machine trains: it has the same two cores
OLD_REQUESTS, FIRST_REQUESTS, NEW_REQUESTS, JUDGED_REQUESTS = 800, 400, 1_000, 400

logger = logging.getLogger("flows.demo")


@dataclass(slots=True)
class DemoRun:
    """The demo under way: where it runs, and the steps so far."""

    checkout: Path
    url: str
    model: TrafficModel
    began: float = field(default_factory=time.monotonic)
    steps: list[Step] = field(default_factory=list)
    tools: ToolCounts = field(default_factory=ToolCounts)
    seed: int = 0

    @contextmanager
    def step(self, name: str) -> Iterator[list[ReplayResult | str]]:
        """Record a step from what the block appends: replays, and text for the step's result."""
        at = time.monotonic() - self.began
        logger.info("%s …", name)
        recorded: list[ReplayResult | str] = []
        yield recorded
        replays = [one for one in recorded if isinstance(one, ReplayResult)]
        step = Step(
            name,
            at,
            time.monotonic() - self.began - at,
            sum(one.asked for one in replays),
            sum(one.failed for one in replays),
            "; ".join(one for one in recorded if isinstance(one, str)),
        )
        self.steps.append(step)
        logger.info("%s: %s (%.0f s)", name, step.result or f"{step.asked} requests", step.took_s)

    def ask(self, mix: Mapping[Kind, float], count: int, concurrency: int = 8) -> ReplayResult:
        """Send `count` requests that were not sent before, a fixed share of them with tools."""
        self.seed += 1
        with_tools = count_tool_requests(count, self.seed)
        result = replay(
            self.url,
            write_traffic(self.model, mix, count - with_tools, self.seed),
            conversations=write_conversations(with_tools, self.seed),
            seed=self.seed,
            concurrency=concurrency,
        )
        self.tools.add(result.tools)
        return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo, or show the pages of the last one; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="perennial demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--show", action="store_true", help="show the pages of the last demo, until Ctrl-C")
    options = parser.parse_args(arguments)
    return run_command(lambda: show(Path.cwd()) if options.show else run(Path.cwd()))


def run(root: Path) -> int:
    """Run the demo; return the exit code. Whatever it starts ends with this process."""
    run_id = uuid.uuid4().hex
    with processes.run_watchdog(run_id), processes.set_variable(processes.RUN_ID_VARIABLE, run_id):
        _run(root)
    return 0


def show(root: Path) -> int:
    """Start the pages of the last demo, until Ctrl-C.

    Raises:
        InputError: the demo has not run yet.
    """
    checkout = root / CHECKOUT
    if not (checkout / REPORT / "report.json").exists():
        raise InputError("the demo has not run yet", "make demo")
    os.chdir(checkout)
    os.execve(sys.executable, [sys.executable, "-m", "flows.up"], build_checkout_environment(checkout))


def make_overrides(configured: Sequence[Source]) -> dict[str, Any]:
    """Return the demo's values of params.yaml: its own sizes, free ports, and the packaged source alone."""
    sources = [
        source.model_dump(mode="json", by_alias=True) | (SOURCE if is_english_default(source) else {})
        for source in configured
        if is_english_default(source) or source.kind == "feedback"
    ]
    ports: set[int] = set()
    while len(ports) <= len(PAGES):
        ports.add(network.free_port())
    keys = ("services.port", *(f"flows.pages.{page}" for page in PAGES))
    return SETTINGS | {"collect.sources": sources} | dict(zip(keys, sorted(ports), strict=True))


def _run(root: Path) -> None:
    read_traffic_model(root)  # the packaged source is there: before anything is made
    overrides = make_overrides(load_params(root / "params.yaml").collect.sources)
    checkout = make_checkout(root, root / CHECKOUT, overrides)
    params = load_params(checkout / "params.yaml")
    demo = DemoRun(
        checkout, f"http://{params.services.host}:{params.services.port}", read_traffic_model(checkout)
    )
    _reset(checkout)
    with demo.step("the model is trained") as recorded:
        run_python(checkout, "-m", "flows.training", log=_log(checkout, "training"))
        recorded.append(_training_result(checkout))
    demo.model = read_traffic_model(checkout)
    with _everything_up(checkout, demo.url):
        accuracy, drift = _run_loop(demo, params.monitoring.window.rows)
    poisoned = _reject_poisoned(demo)
    minutes = (time.monotonic() - demo.began) / 60
    retraining = read_last_retraining(checkout)
    text = write_report(
        checkout, DemoResult(demo.steps, accuracy, drift, retraining, poisoned, minutes, demo.tools)
    )
    report = (checkout / REPORT).relative_to(root)
    sys.stdout.write(f"\n{text}\nreport  {report}\npages   perennial demo --show\n")


def _run_loop(demo: DemoRun, window_rows: int) -> tuple[Accuracy, str]:
    """Run the loop from the first requests to the promotion; return the accuracy and when drift was found."""
    checkout = demo.checkout
    with demo.step("users ask what it was trained on") as recorded:
        before = demo.ask(OLD, OLD_REQUESTS)
        recorded.append(before)
        _watch(checkout, "--no-retrain")
        recorded.append(f"{format_share(before.accuracy())} right, {_count_drift(read_verdicts(checkout))}")
    quiet = len(read_verdicts(checkout))
    with demo.step("the traffic changes: new phrasings, a new wing, German") as recorded:
        first = demo.ask(NEW, FIRST_REQUESTS)
        recorded.append(first)
        _watch(checkout, "--no-retrain")
        drift = _find_drift(read_verdicts(checkout)[quiet:], window_rows)
        recorded.append(f"{format_share(first.accuracy())} right; {drift}")
    with demo.step("users correct wrong answers") as recorded:
        more = demo.ask(NEW, NEW_REQUESTS)
        recorded += [more, f"{more.corrections} corrections, {more.thumbs_up} thumbs up"]
    former = _champion(checkout)
    with demo.step("it retrains, passes the gate and a canary") as recorded:
        recorded += _retrain(demo)
        retraining = read_last_retraining(checkout)
        recorded.append(f"{retraining.outcome}: {retraining.summary}")
    with demo.step("users ask again") as recorded:
        old, new = demo.ask(OLD, JUDGED_REQUESTS), demo.ask(NEW, JUDGED_REQUESTS)
        recorded += [old, new]
        recorded.append(
            f"{format_share(old.accuracy())} right on the old, {format_share(new.accuracy())} on the new"
        )
    logger.info("champion before: %s, after: %s", former, _champion(checkout))
    shares = (before.accuracy(), _merge(first, more).accuracy(), old.accuracy(), new.accuracy())
    return Accuracy(*(share or 0.0 for share in shares)), drift


def _retrain(demo: DemoRun) -> list[ReplayResult | str]:
    """Have the watch flow trigger the retraining while requests continue; return their replays."""
    replays: list[ReplayResult | str] = []
    log = _log(demo.checkout, "retrain")
    process = _start(demo.checkout, "flows.watch", log)
    try:
        reported = None
        while process.poll() is None:
            state = progress.read_state(demo.checkout)
            if state is not None and state.step != reported:
                reported = state.step
                logger.info("retraining: %s", reported)
            in_canary = state is not None and state.canary_since is not None
            replays.append(demo.ask(NEW, 100) if in_canary else demo.ask(NEW, 3, concurrency=1))
            if not in_canary:
                _wait(process, TRICKLE_S)
    finally:
        processes.stop(process)
    if process.returncode:
        raise InputError(f"perennial watch ended with exit code {process.returncode}", f"see {log}")
    return replays


def read_last_retraining(checkout: Path) -> progress.RetrainResult:
    """Return the result of the demo's retraining.

    Raises:
        InputError: none was triggered.
    """
    results = progress.read_history(checkout)
    if not results:
        log = _log(checkout, "retrain")
        raise InputError("the changed traffic triggered no retraining", f"see {log}, and run make demo again")
    return results[-1]


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        time.sleep(POLL_S)


def _reject_poisoned(demo: DemoRun) -> GateVerdict:
    """Train a candidate on shuffled answers, and have the gate reject it.

    Raises:
        InputError: the gate passed it.
    """
    with demo.step("a candidate is trained on shuffled answers") as recorded:
        checkout = train_poisoned(demo.checkout, rows=250)
        tag = str(read_pipeline_tag(checkout))
        params = load_params(checkout / "params.yaml")
        verdict = run_gate(checkout, params, tag, production=demo.checkout)
        failed = [one.name for one in verdict.criteria if not one.passed]
        recorded.append(f"{'passed' if verdict.passed else 'rejected'} by the gate ({', '.join(failed)})")
    if verdict.passed:
        raise InputError(f"the gate passed the poisoned candidate {verdict.tag}", "see reports/gate")
    return verdict


@contextmanager
def _everything_up(checkout: Path, url: str) -> Iterator[None]:
    """Run `make up` in the checkout for the block, once the service answers.

    Raises:
        InputError: it does not in time.
    """
    process = _start(checkout, "flows.up", _log(checkout, "up"))
    try:
        ready = f"{url}/readyz"
        if reason := processes.wait_until_up(lambda: network.is_up(ready), process, READY_WITHIN_S):
            raise InputError(f"the service at {url} {reason}", f"see {checkout / STATE / 'logs'}")
        yield
    finally:
        processes.stop(process, patience_s=STOP_PATIENCE_S)


def _start(checkout: Path, module: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module]
    return processes.start(command, log, folder=checkout, environment=build_checkout_environment(checkout))


def _reset(checkout: Path) -> None:
    """Remove the state of the last demo; what its pipeline made stays, and is used where it still holds."""
    for name in ("reports/watch", "reports/gate", "reports/canary", "data/feedback"):
        shutil.rmtree(checkout / name, ignore_errors=True)
    for path in (checkout / STATE).glob("*"):
        if path.name != "logs":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    clear_initial_adapter(checkout / ADAPTER)


def _watch(checkout: Path, *arguments: str) -> None:
    time.sleep(load_params(checkout / "params.yaml").monitoring.window.settle_s + POLL_S)
    run_python(checkout, "-m", "flows.watch", *arguments, log=_log(checkout, "watch"))


def _log(checkout: Path, name: str) -> Path:
    return checkout / STATE / "logs" / f"demo-{name}.log"


def _champion(checkout: Path) -> str | None:
    return read_aliases(checkout / ALIASES).champion or read_pipeline_tag(checkout)


def _training_result(checkout: Path) -> str:
    from flows.common import summary

    results = summary.read_results(checkout) or []
    return "; ".join(f"{one.metric} {one.base} → {one.tuned}" for one in results[:1])


def _count_drift(verdicts: Sequence[DriftVerdict]) -> str:
    return f"{sum(one.drifted for one in verdicts)} of {len(verdicts)} windows drifted"


def _find_drift(verdicts: Sequence[DriftVerdict], rows: int) -> str:
    for number, verdict in enumerate(verdicts, 1):
        if verdict.drifted:
            requests = number * rows
            return f"drift in window {number}, {requests} requests after the change: {verdict.summary}"
    return "no drift was detected"


def _merge(*results: ReplayResult) -> ReplayResult:
    return replace(results[0], scores=tuple(score for result in results for score in result.scores))


if __name__ == "__main__":
    sys.exit(main())
