"""A small checkout with a user's own task, a champion trained on it, and corrections to learn from."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import yaml

from flows.demo_home import home_environment, make_home
from flows.registry import versions_table
from monitoring.feedback import HELD_OUT, read_labelled
from services.versions import ALIASES, read_aliases
from stages.common.artifacts import write_text
from stages.common.params import load_params
from stages.common.records import read_rows
from tests.monitoring import store
from tests.services.serving import ROOT
from tests.tiny import save_model

TEAMS = {
    "network": ("the office wifi", "my vpn tunnel", "the guest router", "our fibre line"),
    "payroll": ("my payslip", "the travel refund", "a bonus payment", "the overtime sheet"),
    "facilities": ("the lift", "our coffee machine", "the meeting room lamp", "a garage door"),
    "accounts": ("my password", "the shared mailbox", "a badge for visitors", "the signing key"),
}
TROUBLES = ("is broken", "went missing yesterday", "does not work for me", "needs a check", "looks wrong")
HASTE = {
    "high": ("please hurry", "everybody is waiting"),
    "low": ("no rush at all", "whenever there is time"),
}
SETTINGS = """
collect: {system_prompt: Route the ticket.}
validate: {min_rows: 50, label_key: team}
check_bias: {label_key: team, groups: {team: {min_representation_ratio: null, max_cramers_v: null}}}
split: {stratify_by: team, min_train_rows: 20, min_test_rows: 5}
finetune: {max_length: 256, checkpoint_every_steps: 5}
evaluate: {label_key: team, min_test_rows: 5, max_new_tokens: 8, slices: [team], resamples: 100}
export: {gguf: false}
model_card: {name: tickets, intended_use: Route tickets., out_of_scope: All else.}
"""


def tickets():
    """Return every question with its answer, in a fixed order."""
    return [
        (f"{thing} {trouble}, {words}", {"team": team, "priority": priority})
        for team, things in TEAMS.items()
        for thing, trouble, (priority, said) in product(things, TROUBLES, HASTE.items())
        for words in said
    ]


@dataclass(frozen=True)
class LoopHome:
    """A home of the loop, and the environment in which all that belongs to it runs."""

    root: Path
    environment: dict[str, str]

    def command(self, *arguments):
        return [sys.executable, *arguments]

    def run(self, *arguments, check=True):
        """Run Python in the home; fail with all that it said."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check and done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return done

    def retrain(self, why):
        return self.run("-m", "flows.retrain", "--why", why, check=False)

    @property
    def aliases(self):
        return read_aliases(self.root / ALIASES)

    def params(self):
        return load_params(self.root / "params.yaml")

    def versions(self):
        """Return what MLflow says of each version, by tag."""
        return {info.tag: info for info in versions_table(self.root, self.params())}


def make_loop_home(folder: Path) -> LoopHome:
    """Train a tiny model on the tickets, make it champion, and give it corrections."""
    root = make_home(ROOT, folder / "home")
    # A cache of its own: what is trained here is nobody else's.
    write_text(root / ".dvc/config.local", f"[cache]\n    dir = {folder / 'cache'}\n")
    (root / "dvc.lock").unlink(missing_ok=True)
    _write_params(root, save_model(folder / "base"))
    lines = (
        {"prompt": ask, "completion": json.dumps(said), "team": said["team"]} for ask, said in tickets()[::2]
    )
    write_text(root / "data/tickets.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    environment = home_environment(
        root, {"BENTOML_HOME": str(folder / "bentoml"), "DVC_NO_ANALYTICS": "1", "HF_HUB_OFFLINE": "1"}
    )
    home = LoopHome(root, environment)
    home.run("-m", "flows.training")
    adopt = (
        "from pathlib import Path; from flows import release; from services import versions\n"
        "from stages.common.params import load_params\n"
        "versions.newest_as_champion(True)\n"
        "release.adopt(Path.cwd(), load_params())"
    )
    home.run("-c", adopt)
    correct(home)
    return home


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
    for number, (ask, said) in enumerate(tickets()[1::4]):
        messages = json.dumps([{"role": "user", "content": ask}])
        made = store.exchange(number, now, model=name, version=version, messages=messages)
        events += [made, store.feedback(number, now, correction=json.dumps(said))]
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
