"""The README's commands in the README's order, in one checkout: with the packaged data, then with one's own.

The real commands on a model of a few thousand parameters: what it learns is not the point. `make demo` is
stopped once it serves its own model; the rest of it takes a model that can learn. `make test-slow` runs this.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from flows.common.checkout import make_checkout, override_params
from flows.demo.__main__ import CHECKOUT
from stages.common.network import free_port, get
from stages.common.params.loading import load_params
from tests.tiny import save_model

ROOT = Path(__file__).resolve().parents[1]
VENV = Path(sys.prefix)
# Small enough for minutes, without the bias gates that so few rows cannot pass.
SMALL = {
    "collect.sources.0.rows_per_template": 1,
    "collect.sources.0.min_rows_per_intent": 10,
    "check_bias.groups": {"source": {"min_representation_ratio": None, "max_cramers_v": None}},
    "ask_base.engine": "transformers",
    "ask_base.max_rows": 10,
    "ask_base.max_new_tokens": 4,
    "ask_base.min_test_rows": 1,
    "finetune.dtype": "float32",
    "finetune.batch_size": 64,
    "evaluate.resamples": 100,
    "export.gguf": False,
    "services.engine.kind": "transformers",
    "services.answers.default_max_tokens": 4,
}


class Newcomer:
    """A user who types commands in one checkout."""

    def __init__(self, root: Path, home: Path) -> None:
        self.root = root
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MAKE"))
        }
        self.environment = {
            **kept,
            "HOME": str(home),
            "PREFECT_HOME": str(home / "prefect"),
            "BENTOML_HOME": str(home / "bentoml"),
            "PYTHONPATH": str(root),
            "PATH": os.pathsep.join([os.environ["PATH"], str(write_command(home / "bin"))]),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        # The environment is installed already: make is not to do it again.
        stamps = [f"--old-file={VENV}/.{name}" for name in ("core", "serve")]
        return subprocess.Popen(
            ["make", f"VENV={VENV}", *stamps, *words],
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str) -> str:
        process = self.start(*words)
        out, _ = process.communicate(timeout=900)
        assert process.returncode == 0, out
        assert "Traceback" not in out, out
        return out

    def stop(self, process: subprocess.Popen[str]) -> str:
        """Type Ctrl-C: the terminal sends it to all in the foreground."""
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=180)
        assert "Traceback" not in out, out
        return out

    def processes(self) -> list[psutil.Process]:
        return [one for one in psutil.process_iter() if self._owns(one)]

    def _owns(self, process: psutil.Process) -> bool:
        try:
            return str(self.root) in process.cwd() and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            return False


def write_command(folder):
    """Write the command as pip does, for an environment that was installed before it existed."""
    folder.mkdir(parents=True)
    command = folder / "perennial"
    command.write_text(f"#!{sys.executable}\nimport sys\nfrom flows.__main__ import main\nsys.exit(main())\n")
    command.chmod(0o755)
    return folder


def wait_until(condition, process, what):
    deadline = time.monotonic() + 900
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


@pytest.fixture
def newcomer(tmp_path):
    root = make_checkout(ROOT, tmp_path / "perennial")
    base = save_model(tmp_path / "base")
    origin = {"origin": "folder", "name": str(base), "revision": None, "sha256": None, "file": None}
    ports = {f"flows.pages.{page}": free_port() for page in ("dashboard", "prefect", "mlflow", "evidently")}
    settings = SMALL | {f"fetch_base.{key}": value for key, value in origin.items()} | ports
    override_params(root / "params.yaml", settings | {"services.port": free_port()})
    person = Newcomer(root, tmp_path / "home")
    yield person
    for process in person.processes():
        process.kill()


def is_served(root):
    answer = get(f"http://127.0.0.1:{load_params(root / 'params.yaml').services.port}/readyz", 5)
    return answer is not None and answer[0] == 200


def ask(root, question):
    url = f"http://127.0.0.1:{load_params(root / 'params.yaml').services.port}"
    body = {"messages": [{"role": "user", "content": question}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    answer.raise_for_status()
    return answer.json()["choices"][0]["message"]["content"]


@pytest.mark.slow
@pytest.mark.timeout(2700)  # whole pipelines, on a busy machine
def test_the_commands_of_the_readme_in_its_order_and_then_with_own_data(newcomer):
    root = newcomer.root
    assert "first run: " in newcomer.run("run")
    assert (root / "reports/model_card/README.md").exists()
    assert "nothing changed" in newcomer.run("run")

    up = newcomer.start("up")
    wait_until(lambda: is_served(root), up, "the service is ready")
    assert isinstance(ask(root, "turn on the lights"), str)
    newcomer.stop(up)
    assert newcomer.processes() == []

    demo = newcomer.start("demo")
    trained = root / CHECKOUT / "artifacts/export/serving.json"
    wait_until(trained.exists, demo, "the demo's model is trained")
    wait_until(lambda: is_served(root / CHECKOUT), demo, "the demo's service is ready")
    newcomer.stop(demo)
    assert newcomer.processes() == []

    write_tickets(root / "data/support.csv")
    newcomer.run("init", "DATA=data/support.csv", "LICENSE=cc-by-4.0")
    out = newcomer.run("run")
    assert "params " in out and "first run" not in out, out
    assert json.loads((root / "artifacts/curate/task.json").read_text())["kind"] == "label"

    up = newcomer.start("up")
    wait_until(lambda: is_served(root), up, "the service is ready")
    assert isinstance(ask(root, "my payslip is broken"), str)
    newcomer.stop(up)
    assert newcomer.processes() == []

    serve = newcomer.start("serve")
    wait_until(lambda: is_served(root), serve, "the service is ready")
    assert isinstance(ask(root, "turn on the lights in the kitchen"), str)
    newcomer.stop(serve)
    assert newcomer.processes() == []


def write_tickets(path):
    things = {
        "network": ("the wifi", "my vpn", "the router", "our line"),
        "payroll": ("my payslip", "a bonus", "the refund", "overtime"),
    }
    complaints = ("is broken", "went missing", "does not work for me", "needs a check", "is {x} 100 % $y")
    lines = [
        f"{thing} {complaint} ({number}),{team}"
        for team, names in things.items()
        for thing in names
        for complaint in complaints
        for number in range(6)
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("question,team\n" + "\n".join(lines) + "\n")
