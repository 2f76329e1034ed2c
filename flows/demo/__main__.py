"""A day in the life of a model, compressed into minutes: `make demo`.

In a home of its own (`.perennial/demo`; the checkout's files are left alone) a model is trained and served.
People ask what it knows; then they ask otherwise: in phrasings it never saw, about a new wing of the house,
in German. The drift is noticed, their corrections are learned, the candidate is held to the gate, shown to
some, and takes over; a poisoned one is refused. Nothing is played: it is the service, the flows and the pages
of `make up`.

    perennial demo                 # the whole day
    perennial demo --show          # the pages of the last day again, until Ctrl-C
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flows.common import processes
from flows.common.cli import run_command
from flows.demo.checkout import home_environment, make_home, poison, run_python
from flows.demo.traffic import Kind, ReplayResult, World, read_world, replay, traffic
from flows.gate import judge
from flows.retrain import progress, steps
from monitoring.verdicts import DriftVerdict, read_verdicts
from services.versions import __main__ as versions
from stages.common import network
from stages.common.artifacts import STATE, write_json, write_text
from stages.common.errors import InputError
from stages.common.params.loading import Params, load_params

HOME = STATE / "demo"
STORY = Path("reports") / "demo"
NEW: Mapping[Kind, float] = {"phrasing": 0.35, "wing": 0.35, "german": 0.3}
OLD: Mapping[Kind, float] = {"known": 1.0}

# What is smaller than in production, so that a day takes minutes; everything else is as shipped.
SETTINGS: dict[str, Any] = {
    "collect.sources.0.reserved_share": 0.15,
    "collect.sources.0.rows_per_template": 5,
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
READY_WITHIN_S = 240.0
POLL_S = 0.5
TRICKLE_S = 30.0  # between two visits while the machine trains: it has the same two cores
OLD_REQUESTS, FIRST_REQUESTS, NEW_REQUESTS, JUDGED_REQUESTS = 800, 400, 1_000, 400

log = logging.getLogger("flows.demo")


@dataclass(frozen=True, slots=True)
class Scene:
    """A part of the day.

    Attributes:
        at_s, took_s: since the day began.
        asked, failed: requests.
        said: what happened.
    """

    name: str
    at_s: float
    took_s: float
    asked: int
    failed: int
    said: str


@dataclass(slots=True)
class Day:
    """What happened so far."""

    home: Path
    url: str
    world: World
    began: float = field(default_factory=time.monotonic)
    scenes: list[Scene] = field(default_factory=list)
    seed: int = 0

    @contextmanager
    def scene(self, name: str) -> Iterator[list[ReplayResult | str]]:
        """Note what the block adds: replays, and the words that say what happened."""
        at = time.monotonic() - self.began
        log.info("%s …", name)
        noted: list[ReplayResult | str] = []
        yield noted
        replays = [one for one in noted if isinstance(one, ReplayResult)]
        said = "; ".join(one for one in noted if isinstance(one, str))
        scene = Scene(
            name,
            at,
            time.monotonic() - self.began - at,
            sum(one.asked for one in replays),
            sum(one.failed for one in replays),
            said,
        )
        self.scenes.append(scene)
        log.info("%s: %s (%.0f s)", name, scene.said or f"{scene.asked} requests", scene.took_s)

    def ask(self, mix: Mapping[Kind, float], count: int, concurrency: int = 8) -> ReplayResult:
        """Have people ask `count` requests that nobody has asked in these words before."""
        self.seed += 1
        requests = traffic(self.world, mix, count, self.seed)
        return replay(self.url, requests, seed=self.seed, concurrency=concurrency)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of right answers, of the former champion and of the new one."""

    old_before: float
    new_before: float
    old_after: float
    new_after: float

    @property
    def recovered(self) -> float:
        """Return how much of what the new traffic had lost came back, as a share."""
        lost = self.old_before - self.new_before
        return (self.new_after - self.new_before) / lost if lost > 0 else 1.0


def live(root: Path) -> int:
    """Live through the day; return the exit code. Whatever was started ends with this process."""
    run_id = uuid.uuid4().hex
    with processes.watchdog(run_id), processes.set_variable(processes.RUN_ID_VARIABLE, run_id):
        _live(root)
    return 0


def _live(root: Path) -> None:
    home = make_home(root, root / HOME, SETTINGS | _ports())
    params = load_params(home / "params.yaml")
    url = f"http://{params.services.host}:{params.services.port}"
    day = Day(home, url, read_world(home))
    _forget_yesterday(home)
    with day.scene("the model learns its task") as noted:
        run_python(home, "-m", "flows.training", log=_log(home, "training"))
        noted.append(_learned(home))
    day.world = read_world(home)
    with everything_up(home, url):
        accuracy, drift_said = _live_on(day, params)
    poisoned = _poisoned_is_refused(day)
    _tell(root, day, accuracy, drift_said, poisoned)


def _live_on(day: Day, params: Params) -> tuple[Accuracy, str]:
    home = day.home
    with day.scene("people ask what it knows") as noted:
        before = day.ask(OLD, OLD_REQUESTS)
        noted.append(before)
        _watch(home, "--no-retrain")
        noted.append(f"{_percent(before.accuracy())} right, {_verdicts(read_verdicts(home))}")
    quiet = len(read_verdicts(home))
    with day.scene("people ask otherwise") as noted:
        first = day.ask(NEW, FIRST_REQUESTS)
        noted.append(first)
        _watch(home, "--no-retrain")
        drift_said = _first_drift(read_verdicts(home)[quiet:], params.monitoring.window.rows)
        noted.append(f"{_percent(first.accuracy())} right; {drift_said}")
    with day.scene("they go on, and correct it") as noted:
        more = day.ask(NEW, NEW_REQUESTS)
        noted += [more, f"{more.corrections} corrections, {more.thumbs_up} thumbs up"]
    former = versions.read_aliases(home / versions.ALIASES).champion
    with day.scene("it retrains by itself") as noted:
        noted += _retrain(day)
        ended = progress.history(home)[-1]
        noted.append(f"{ended.outcome}: {ended.said}")
    champion = versions.read_aliases(home / versions.ALIASES).champion
    with day.scene("people ask again") as noted:
        old, new = day.ask(OLD, JUDGED_REQUESTS), day.ask(NEW, JUDGED_REQUESTS)
        noted += [
            old,
            new,
            f"{_percent(old.accuracy())} right on the old, {_percent(new.accuracy())} on the new",
        ]
    log.info("%s answered in the morning, %s does now", former, champion)
    accuracy = Accuracy(
        *(one if one is not None else 0.0 for one in (before.accuracy(), _both(first, more))),
        *(one if one is not None else 0.0 for one in (old.accuracy(), new.accuracy())),
    )
    return accuracy, drift_said


def _retrain(day: Day) -> list[ReplayResult | str]:
    """Have the watch flow call for the retraining, while people go on asking; return what they got."""
    replays: list[ReplayResult | str] = []
    with _log(day.home, "retrain").open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.watch"],
            cwd=day.home,
            env=home_environment(day.home),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            said = None
            while process.poll() is None:
                run = progress.unfinished(day.home)
                if run is not None and run.step != said:
                    said = run.step
                    log.info("retraining: %s", said)
                on_trial = run is not None and run.on_trial_since is not None
                replays.append(day.ask(NEW, 100) if on_trial else day.ask(NEW, 3, concurrency=1))
                if not on_trial:
                    _wait(process, TRICKLE_S)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
    if process.returncode:
        raise InputError(
            f"perennial watch ended with exit code {process.returncode}",
            f"see {_log(day.home, 'retrain')}",
        )
    return replays


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        time.sleep(POLL_S)


def _poisoned_is_refused(day: Day) -> judge.GateVerdict:
    """Train a candidate on shuffled answers, hold it to the gate, and see it refused.

    Raises:
        InputError: the gate let it through.
    """
    with day.scene("somebody trains on shuffled answers") as noted:
        workspace = poison(day.home, rows=250)
        tag = str(steps.pipeline_tag(workspace))
        verdict = judge.run_gate(workspace, load_params(workspace / "params.yaml"), tag, production=day.home)
        failed = [one.name for one in verdict.criteria if not one.passed]
        noted.append(f"{'let through' if verdict.passed else 'refused'} ({', '.join(failed)})")
    if verdict.passed:
        raise InputError(f"the gate let the poisoned {verdict.tag} through", "see reports/gate")
    return verdict


@contextmanager
def everything_up(home: Path, url: str) -> Iterator[None]:
    """Run `make up` in the home for the block, and wait until the service answers.

    Raises:
        InputError: it does not in time.
    """
    with _log(home, "up").open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.up"],
            cwd=home,
            env=home_environment(home),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_until_ready(url, process, home)
            yield
        finally:
            processes.stop(process, patience_s=60.0)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], home: Path) -> None:
    import httpx

    deadline = time.monotonic() + READY_WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz", timeout=5.0).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(POLL_S)
    raise InputError(f"the service at {url} did not get ready", f"see {home / STATE / 'logs'}")


def _forget_yesterday(home: Path) -> None:
    """Begin anew: the model learns its task again only if what it learns from has changed."""
    for name in ("reports/watch", "reports/gate", "reports/canary", "data/feedback"):
        shutil.rmtree(home / name, ignore_errors=True)
    for path in (home / STATE).glob("*"):
        if path.name not in ("home.json", "logs"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (home / "artifacts" / "initial_adapter").glob("*"):
        if path.name != "README.md":
            path.unlink()


def _ports() -> dict[str, int]:
    taken: set[int] = set()
    while len(taken) < 5:
        taken.add(network.free_port())
    pages = ("dashboard", "prefect", "mlflow", "evidently")
    ports = sorted(taken)
    return {"services.port": ports[0]} | {
        f"flows.pages.{page}": port for page, port in zip(pages, ports[1:], strict=True)
    }


def _watch(home: Path, *arguments: str) -> None:
    time.sleep(load_params(home / "params.yaml").monitoring.window.settle_s + 0.5)
    run_python(home, "-m", "flows.watch", *arguments, log=_log(home, "watch"))


def _log(home: Path, name: str) -> Path:
    path = home / STATE / "logs" / f"demo-{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _learned(home: Path) -> str:
    from flows.common import summary

    results = summary.read_results(home) or []
    return "; ".join(f"{one.metric} {one.base} → {one.tuned}" for one in results[:1])


def _verdicts(verdicts: Sequence[DriftVerdict]) -> str:
    return f"{sum(one.drifted for one in verdicts)} of {len(verdicts)} windows drifted"


def _first_drift(verdicts: Sequence[DriftVerdict], rows: int) -> str:
    for number, verdict in enumerate(verdicts, 1):
        if verdict.drifted:
            requests = number * rows
            return f"drift in window {number}, {requests} requests after the change: {verdict.summary}"
    return "no drift was called"


def _both(*results: ReplayResult) -> float | None:
    whole = replace(results[0], scores=tuple(score for result in results for score in result.scores))
    return whole.accuracy()


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share * 100:.1f} %"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that reads well on a terminal too."""
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in (head, *lines)
    ]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _tell(root: Path, day: Day, accuracy: Accuracy, drift_said: str, poisoned: judge.GateVerdict) -> None:
    ended = progress.history(day.home)[-1]
    scenes = [
        [f"{scene.at_s / 60:.1f}", scene.name, str(scene.asked or ""), scene.said.split(": ")[0]]
        for scene in day.scenes
    ]
    asked, failed = (sum(getattr(scene, name) for scene in day.scenes) for name in ("asked", "failed"))
    figures = [
        ["old traffic", _percent(accuracy.old_before), _percent(accuracy.old_after)],
        ["new traffic", _percent(accuracy.new_before), _percent(accuracy.new_after)],
    ]
    told = "\n".join(
        [
            _table(["minute", "what happened", "requests", "what came of it"], scenes),
            "",
            _table(["right answers", "before", "after"], figures),
            "",
            f"- of what the new traffic had lost, {accuracy.recovered * 100:.0f} % came back",
            f"- {drift_said}",
            f"- {ended.outcome}: {ended.said}",
            f"- the poisoned candidate {poisoned.tag} was refused",
            f"- {asked} requests, {failed} failed; {(time.monotonic() - day.began) / 60:.1f} minutes",
            "",
        ]
    )
    write_text(day.home / STORY / "story.md", told)
    write_json(
        day.home / STORY / "story.json",
        {
            "accuracy": asdict(accuracy) | {"recovered": accuracy.recovered},
            "scenes": [asdict(scene) for scene in day.scenes],
            "retraining": asdict(ended),
            "requests": asked,
            "failed": failed,
            "minutes": (time.monotonic() - day.began) / 60,
            "poisoned": json.loads(json.dumps(asdict(poisoned))),
        },
    )
    sys.stdout.write(
        f"\n{told}\nthe story  {(day.home / STORY).relative_to(root)}\nthe pages  perennial demo --show\n"
    )


def show(root: Path) -> int:
    """Bring the pages of the last day up again, until Ctrl-C.

    Raises:
        InputError: there was no such day yet.
    """
    home = root / HOME
    if not (home / STORY / "story.json").exists():
        raise InputError("the demo has not run yet", "make demo")
    os.chdir(home)
    os.execve(sys.executable, [sys.executable, "-m", "flows.up"], home_environment(home))


def main(arguments: Sequence[str] | None = None) -> int:
    """Live through the day, or show the last one; return the exit code."""
    parser = argparse.ArgumentParser(prog="perennial demo", description=__doc__)
    parser.add_argument("--show", action="store_true", help="the pages of the last day, until Ctrl-C")
    options = parser.parse_args(arguments)
    return run_command(lambda: show(Path.cwd()) if options.show else live(Path.cwd()))


if __name__ == "__main__":
    sys.exit(main())
