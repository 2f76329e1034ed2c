"""The bake period of a new champion, in whole runs of `flows.watch`: it stays, or is rolled back."""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.gate.verdict import Criterion, GateVerdict, hash_files, write_verdict
from flows.registry.model_versions import list_recorded, make_registered_name
from flows.registry.tracking import Registry, open_tracking
from services.versions.aliases import ALIASES, read_aliases
from services.versions.releases import read_releases
from stages.common.artifacts import read_json, write_json, write_text
from stages.common.params.loading import load_params
from tests.monitoring import store
from tests.services.serving import ROOT

NAME = load_params(ROOT / "params.yaml").model_card.name
OLD, NEW = (f"{NAME}:{letter * 12}" for letter in "ab")
REQUESTS = 40  # of the bake period

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Production:
    """A checkout in which two versions were promoted, one after the other."""

    root: Path
    environment: dict[str, str]

    def run(self, *arguments):
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    @property
    def params(self):
        return load_params(self.root / "params.yaml")

    @property
    def champions(self):
        """Return the champion of the alias file, and MLflow's."""
        served = read_aliases(self.root / ALIASES).champion
        registry = Registry.of(self.root, self.params)
        return served, next(info.tag for info in list_recorded(registry) if "champion" in info.aliases)

    def ask(self, first, at, tag, **changes):
        """Record `REQUESTS` requests that a version answered, one every ten milliseconds."""
        store.stored(
            f"sqlite:///{self.root}/.perennial/events.db",
            *(
                store.exchange(first + n, at + 0.01 * n, model=NAME, version=tag.partition(":")[2], **changes)
                for n in range(REQUESTS)
            ),
        )


@pytest.fixture(scope="module")
def promoted(tmp_path_factory, clean_environment, api):
    """Both versions are in both stores, the gate let both through, and the former champion was asked."""
    root = tmp_path_factory.mktemp("promoted")
    text = (ROOT / "params.yaml").read_text()
    for old, new in (
        ("settle_s: 30 ", "settle_s: 0 "),
        ("bake_requests: 500 ", f"bake_requests: {REQUESTS} "),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    write_text(root / "params.yaml", text)
    store_folder = str(tmp_path_factory.mktemp("bentoml"))
    production = Production(
        root, {**clean_environment, "PREFECT_API_URL": api.url, "BENTOML_HOME": store_folder}
    )
    write_json(root / "artifacts/fetch_base/config.json", {})
    write_json(root / "artifacts/finetune/adapter_config.json", {})
    client = open_tracking(root, production.params.flows.tracking.tracking_url)
    client.create_registered_model(make_registered_name(NAME))
    for tag, champion in ((OLD, None), (NEW, OLD)):
        version = tag.partition(":")[2]
        write_json(root / "artifacts/export/serving.json", {"name": NAME, "version": version})
        production.run("services.versions", "add")
        run = client.create_run(client.create_experiment(version))
        tags = {"tag": tag, "serving_version": version}
        client.create_model_version(make_registered_name(NAME), str(root), run.info.run_id, tags=tags)
        evidence = root / f".perennial/gate/{version}/answers.json"
        write_json(evidence, {})
        passed = Criterion("old_test", "not forgotten", 0.0, -0.1, 0.1, -0.5, True, "nothing is forgotten")
        files = hash_files(root, [evidence])
        write_verdict(root, GateVerdict(tag, champion, 1.0, True, "champion", (passed,), files, {}))
        if champion is not None:
            production.ask(0, time.time() - 60.0, champion)
        production.run("flows.release", "promote", tag, "--reason", "the gate passed it")
    assert production.champions == (NEW, NEW)
    return production


@pytest.fixture
def production(promoted, tmp_path):
    root = shutil.copytree(promoted.root, tmp_path / "checkout")
    found = Production(root, promoted.environment)
    time.sleep(max(0.0, promoted_at(found) + 0.01 * REQUESTS - time.time()))  # no request of the future
    return found


def promoted_at(production):
    return read_releases(production.root)[-1].at


def test_a_new_champion_that_fails_is_rolled_back_everywhere_with_the_reason(production):
    production.ask(1000, promoted_at(production), NEW, status=503, valid_output=None)

    done = production.run("flows.watch", "--no-retrain")

    assert f"{NEW} was rolled back: after" in done.stdout
    assert production.champions == (OLD, OLD)
    moves = read_releases(production.root)
    assert [record.action for record in moves] == ["promote", "promote", "rollback"]
    back = moves[-1]
    assert (back.tag, back.champion, back.by) == (NEW, OLD, "bake")
    assert "failed: 100.0% of its requests, 0.0% of the baseline's" in back.reason
    report = read_json(production.root / "reports/canary" / f"{'b' * 12}.json")
    assert report["bake"]["state"] == "bad" and report["bake"]["summary"] == back.reason

    production.run("flows.watch", "--no-retrain")
    assert read_releases(production.root) == moves, "once is enough"


def test_a_new_champion_as_good_as_the_former_one_stays(production):
    before = read_releases(production.root)
    production.ask(1000, promoted_at(production), NEW)

    done = production.run("flows.watch", "--no-retrain")

    assert "rolled back" not in done.stdout
    assert production.champions == (NEW, NEW)
    assert read_releases(production.root) == before
    report = read_json(production.root / "reports/canary" / f"{'b' * 12}.json")
    assert report["bake"]["state"] == "good"
