"""A small checkout with a user's own task, a champion trained on it, and corrections to learn from."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import psutil
import yaml

from flows.common.checkout import build_checkout_environment, make_checkout, override_params
from flows.registry.model_versions import list_recorded
from flows.registry.runs import register_candidate
from flows.registry.tracking import Registry
from monitoring.feedback.rows import HELD_OUT, read_labelled
from services.versions.aliases import ALIASES, read_aliases
from services.versions.store import read_pipeline_tag
from stages.common.artifacts import write_text
from stages.common.params.loading import load_params
from stages.common.records import read_rows
from tests.monitoring import store
from tests.services.serving import ROOT
from tests.tiny import save_model

TEAMS = {
    "network": ("the office wifi", "my vpn tunnel", "the guest router", "our fibre line"),
    "payroll": ("my payslip", "the travel refund", "a bonus payment", "the overtime sheet"),
}
COMPLAINTS = ("is broken", "went missing yesterday", "does not work for me", "needs a check", "looks wrong")
HASTE = ("please hurry", "everybody is waiting", "no rush at all", "whenever there is time")
# So little training teaches nothing; LEARNING does.
SETTINGS = """
task: {label_key: team, system_prompt: null, slices: []}
validate: {min_rows: 50}
check_bias: {groups: {team: {min_representation_ratio: null, max_cramers_v: null}}}
split: {min_train_rows: 20, min_test_rows: 5}
finetune: {max_length: 128, checkpoint_every_steps: 5, batch_size: 8, learning_rate: 0.0001, dtype: float32}
ask_base: {min_test_rows: 5, max_new_tokens: 8}
evaluate: {resamples: 100}
export: {gguf: false}
model_card: {name: tickets, intended_use: Route tickets., out_of_scope: All else.}
"""
LEARNING = {"finetune.learning_rate": 0.01, "finetune.epochs": 12}
START_WITHIN_S = 800  # a step of a retraining, on a busy machine


def tickets():
    """Return every question with its answer, in a fixed order."""
    return [
        (f"{thing} {complaint}, {haste}", {"team": team})
        for team, things in TEAMS.items()
        for thing, complaint, haste in product(things, COMPLAINTS, HASTE)
    ]


def whole(word):
    """Return the merges that make a word one token."""
    return tuple((word[:end], word[end]) for end in range(1, len(word)))


@dataclass(frozen=True)
class LoopHome:
    """A home of the loop, and the environment in which all that belongs to it runs."""

    root: Path
    environment: dict[str, str]

    def command(self, *arguments):
        return [sys.executable, *arguments]

    def run(self, *arguments, check=True):
        """Run Python in the home; fail with its output."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=700,
        )
        if check and done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return done

    def reporting_to(self, api):
        """Return the home with a Prefect server; else each command of a flow starts a temporary one."""
        return replace(self, environment=self.environment | api.environment)

    def change(self, overrides):
        """Give parameters other values, by dotted key."""
        override_params(self.root / "params.yaml", overrides)

    def retrain(self, why):
        return self.run("-m", "flows.retrain", "--reason", why, check=False)

    def kill_retraining(self, why, is_time):
        """Start a retraining, and kill it and its process group as soon as it is time."""
        log = self.root / ".perennial/killed.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                self.command("-m", "flows.retrain", "--reason", why),
                cwd=self.root, env=self.environment, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_WITHIN_S
        try:
            while not is_time():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"it was never time to kill it:\n{log.read_text()}")
                time.sleep(0.01)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def processes(self):
        """Return the living processes that were started for this home."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def _owns(self, process):
        try:
            return process.environ().get("PREFECT_HOME") == self.environment["PREFECT_HOME"]
        except (psutil.Error, OSError):
            return False

    @property
    def aliases(self):
        return read_aliases(self.root / ALIASES)

    def params(self):
        return load_params(self.root / "params.yaml")

    def versions(self):
        """Return MLflow's versions, by tag."""
        return {info.tag: info for info in list_recorded(Registry.of(self.root, self.params()))}


def make_home(folder: Path) -> LoopHome:
    """Make a checkout with the tickets and a tiny model, in which nothing has run yet."""
    root = _check_out(folder)
    (root / "dvc.lock").unlink(missing_ok=True)
    _write_params(root, _save_base(folder / "base"))
    lines = (
        {"prompt": ask, "completion": json.dumps(ticket), "team": ticket["team"]}
        for ask, ticket in tickets()[::2]
    )
    write_text(root / "data/tickets.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return find_home(folder)


def _check_out(folder: Path) -> Path:
    root = make_checkout(ROOT, folder / "home")
    # A cache of its own: no other checkout uses what is trained here.
    write_text(root / ".dvc/config.local", f"[cache]\n    dir = {folder / 'cache'}\n")
    return root


def _build_environment(root: Path, folder: Path) -> dict[str, str]:
    return build_checkout_environment(
        root,
        {
            "BENTOML_HOME": str(folder / "bentoml"),
            "DVC_NO_ANALYTICS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # threads of so small a model wait for each other
        },
    )


def find_home(folder: Path) -> LoopHome:
    """Return the home that `make_home` made in a folder."""
    return LoopHome(folder / "home", _build_environment(folder / "home", folder))


def copy_home(trained: LoopHome, folder: Path) -> LoopHome:
    """Make another checkout of a home in which the pipeline has run, with its outputs and its own state.

    The model is registered anew: a database of MLflow has the paths of its home.
    """
    root = _check_out(folder)
    shutil.copytree(trained.root.parent / "cache", folder / "cache", copy_function=os.link)
    for name in ("params.yaml", "dvc.lock"):
        shutil.copy2(trained.root / name, root / name)
    for name in ("artifacts", "reports", "data"):
        shutil.copytree(trained.root / name, root / name, dirs_exist_ok=True)
    home = find_home(folder)
    register_candidate(Registry.of(root, home.params()), home.params())
    return home


def make_loop_home(trained: LoopHome, folder: Path) -> LoopHome:
    """Make the model of a copied home champion, and give it corrections."""
    home = copy_home(trained, folder)
    home.run("-m", "services.versions", "add")
    tag = read_pipeline_tag(home.root)
    home.run("-m", "flows.release", "promote", tag, "--first", "--reason", "the first model")
    correct(home)
    return home


def _save_base(folder):
    """Save a model that can learn to answer: words as tokens, and weights that can tell them apart."""
    words = ('{"', "team", '":', *TEAMS, '"}')
    merges = tuple(dict.fromkeys(pair for word in words for pair in whole(word)))
    # The embedding of the padding stays zero: as the end mark it could never be written.
    return save_model(folder, merges=merges, hidden_size=64, initializer_range=0.5, pad_token_id=0)


def _write_params(root, base):
    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    for section, changes in yaml.safe_load(SETTINGS).items():
        values[section] |= changes
    values["fetch_base"] |= {
        "origin": "folder", "name": str(base), "revision": None, "sha256": None, "file": None,
    }  # fmt: skip
    own = {"kind": "file", "path": "data/tickets.jsonl", "license": "cc-by-4.0", "origin": "human"}
    columns = {"prompt_column": "prompt", "completion_column": "completion", "tag_columns": ["team"]}
    values["collect"]["sources"] = [own | columns, {"kind": "feedback", "path": "data/feedback/rows.jsonl"}]
    values["services"]["engine"]["kind"] = "transformers"
    values["services"]["answers"]["default_max_tokens"] = 8
    values["flows"]["retrain"]["gate"] |= {"min_new_rows": 5, "resamples": 100}
    write_text(root / "params.yaml", yaml.safe_dump(values, sort_keys=False))


def correct(home):
    """Put questions that were in no training row into the event store, each with its right answer."""
    name, _, version = home.aliases.champion.partition(":")
    events, now = [], time.time()
    for number, (ask, ticket) in enumerate(tickets()[1::4]):
        messages = json.dumps([{"role": "user", "content": ask}])
        made = store.exchange(number, now, model=name, version=version, messages=messages)
        events += [made, store.feedback(number, now, correction=json.dumps(ticket))]
    store.stored(f"sqlite:///{home.root}/.perennial/events.db", *events)


def held_out(home):
    """Return the questions that are kept for the gate."""
    return {row.question for row in read_labelled(home.root / HELD_OUT)}


def learned(home):
    """Return the questions of the training rows."""
    return {row.question for row in read_rows(home.root / "artifacts/split/train.parquet")}


def corrected():
    """Return the questions that users corrected."""
    return {ask for ask, _ in tickets()[1::4]}
