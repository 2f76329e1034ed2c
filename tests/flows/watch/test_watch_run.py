"""`perennial watch` as one whole run, where what it depends on is not there."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.versions.aliases import ALIASES, Aliases, write_aliases
from stages.common.network import free_port
from tests.exchanges import VERSION
from tests.flows.toy import ROOT
from tests.monitoring import store
from tests.services.serving import ask, serving, tiny_files

CHAMPION = f"toy:{VERSION}"
TRACKING = "sqlite:///.perennial/mlflow.db"
EVENTS = "sqlite:///.perennial/events.db"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Production:
    """A checkout with a champion and its traffic, and no more of it than `watch` reads."""

    root: Path
    environment: dict[str, str]

    def change(self, old, new):
        path = self.root / "params.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    def start_watch(self):
        return subprocess.Popen(
            [sys.executable, "-m", "flows.watch"],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def watch(self):
        with self.start_watch() as process:
            try:
                out, err = process.communicate(timeout=300)
            finally:
                process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def files(self):
        """Return what `watch` must leave alone, or may only write as a whole: aliases, releases, reports."""
        paths = [self.root / ALIASES, *(self.root / "reports").rglob("*")]
        return {path.relative_to(self.root): path.read_bytes() for path in paths if path.is_file()}


@pytest.fixture(scope="module")
def watched(tmp_path_factory, clean_environment, api):
    """A checkout that `watch` has looked at once: usual traffic, and a verdict on the window after it."""
    root = tmp_path_factory.mktemp("watched")
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    production = Production(root, {**clean_environment, "PREFECT_API_URL": api.url})
    production.change("rows: 4000 ", "rows: 60 ")
    production.change("rows: 500 ", "rows: 20 ")
    write_aliases(root / ALIASES, Aliases(CHAMPION, history=("toy:ffffffffffff",)))
    store.stored(f"sqlite:///{root}/.perennial/events.db", *(store.exchange(n) for n in range(80)))
    done = production.watch()
    assert done.returncode == 0, done.stderr
    assert "1 new windows" in done.stdout
    store.add(f"sqlite:///{root}/.perennial/events.db", *(store.exchange(n) for n in range(80, 2000)))
    return production


@pytest.fixture
def production(watched, tmp_path):
    """The same, to be broken."""
    root = shutil.copytree(watched.root, tmp_path / "checkout")
    return Production(root, watched.environment)


def registry_away(production):
    url = f"http://127.0.0.1:{free_port()}"
    production.change(TRACKING, url)
    return url, "make up"


def database_away(production):
    address = f"127.0.0.1:{free_port()}/events"
    production.change(EVENTS, f"postgresql+psycopg://me:secret@{address}")
    return address, "check that the database is running"


def folder_away(production):
    production.change(EVENTS, "sqlite:///nowhere/events.db")
    return "nowhere/events.db", "start the service"


def no_database(production):
    (production.root / ".perennial/events.db").write_text("no database at all, but longer than a header " * 9)
    return "events.db", "check that the database is running"


def damaged_database(production):
    """Break pages behind the first ones: the store can be opened, and fails while it is read."""
    path = production.root / ".perennial/events.db"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 3 // 4096 * 4096)
        file.write(b"\xff" * (size // 3))
    return "events.db", "check that the database is running"


@pytest.mark.parametrize("breaking", [database_away, folder_away, no_database, damaged_database])
def test_what_is_away_or_broken_is_named_with_its_fix_and_nothing_is_half_done(production, breaking):
    named, fix = breaking(production)
    before = production.files()

    done = production.watch()

    assert done.returncode == 1
    *log, error, last = done.stderr.splitlines()
    assert error.startswith("error: ") and named in error
    assert last.startswith("  fix: ") and fix in last
    assert "Error" not in "".join(log), log
    assert "secret" not in done.stderr
    assert production.files() == before


HOOK = """
import sys
from prefect.blocks.notifications import CustomWebhookNotificationBlock
fields = {"subject": "{{subject}}", "body": "{{body}}"}
CustomWebhookNotificationBlock(name="ops", url=sys.argv[1], method="POST", json_data=fields).save("watch-run")
"""


def test_who_is_to_be_told_is_told_that_production_could_not_be_watched(production, web):
    url, posted = web
    subprocess.run([sys.executable, "-c", HOOK, url], env=production.environment, check=True)
    production.change("webhook: null", "webhook: custom-webhook/watch-run")
    named, fix = damaged_database(production)

    assert production.watch().returncode == 1

    notice = json.loads(*posted)
    assert notice["subject"] == "Perennial: production could not be checked"
    assert named in notice["body"] and fix in notice["body"]


def test_the_service_answers_while_the_registry_cannot_be_reached(production, tmp_path):
    """It serves from the same folder, with the same alias file and event store, as `watch` looks at."""
    registry_away(production)
    with (
        serving(production.root / ".perennial", tiny_files(tmp_path / "model")) as service,
        service.client() as client,
        production.start_watch() as process,
    ):
        try:
            statuses = []
            while process.poll() is None:
                statuses.append(ask(client, max_tokens=4).status_code)
            _, err = process.communicate()
        finally:
            process.kill()
        statuses.append(ask(client, max_tokens=4).status_code)
    assert process.returncode == 0, err
    assert len(statuses) > 1 and set(statuses) == {200}
