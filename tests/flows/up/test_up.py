import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from flows.common import processes
from flows.up import __main__ as up
from flows.up.supervisor import Program, Supervisor, check_ports, read_last_line
from stages.common import network
from stages.common.errors import InputError
from stages.common.params.loading import load_params

ROOT = Path(__file__).parents[3]
SLEEP = "import time; time.sleep(60)"
SECRET = "0123456789abcdef"
# Writes a line when it starts and one when it is asked to end; {name} and the file are filled in.
WRITING = """
import signal, sys, time
def say(word):
    with open("events", "a") as file:
        file.write("{name} " + word + "\\n")
def end(*_):
    say("ends")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
say("starts")
time.sleep(60)
"""


def python(name, code, **options):
    return Program(name, (sys.executable, "-S", "-c", code), **options)


def wait_until(condition, timeout_s=300.0):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@contextmanager
def supervised(root, *programs, first_pause_s=0.05):
    """Run a supervisor in a thread; yield its state of each program."""
    status = root / "up.json"
    supervisor = Supervisor(programs, root, root / "logs", status, first_pause_s)
    thread = threading.Thread(target=supervisor.run)

    def state(name):
        try:
            return json.loads(status.read_text())["programs"][name]
        except FileNotFoundError:
            return {"state": "not written"}

    thread.start()
    try:
        yield state
    finally:
        supervisor.stop()
        thread.join(45)
        assert not thread.is_alive()
    assert not status.exists()


def test_a_program_that_dies_is_started_anew_after_growing_pauses(tmp_path, caplog):
    code = "import sys; open('begun', 'a').write('x'); print('the store is away'); sys.exit(3)"
    with supervised(tmp_path, python("service", code)) as state:
        wait_until(lambda: state("service").get("restarts", 0) >= 4)
        down = wait_until(lambda: state("service")["state"] == "down" and state("service"))
    pauses = [float(text.split(" ")[-2]) for text in caplog.messages if "tried again in" in text]
    assert pauses[:4] == [0.05, 0.1, 0.2, 0.4]
    assert len((tmp_path / "begun").read_text()) >= 4
    assert "ended with exit code 3: the store is away; tried again in" in down["reason"]
    assert (tmp_path / "logs" / "service.log").read_text().count("the store is away") >= 4


def test_a_program_that_is_killed_comes_back(tmp_path):
    with supervised(tmp_path, python("mlflow", SLEEP)) as state:
        first = wait_until(lambda: state("mlflow").get("pid"))
        os.kill(first, signal.SIGKILL)
        second = wait_until(lambda: state("mlflow").get("pid") not in (None, first) and state("mlflow"))
    assert second["state"] == "up" and second["restarts"] == 1


def test_a_program_that_lacks_something_waits_for_it_and_says_so(tmp_path):
    model = tmp_path / "model"

    def missing():
        return None if model.exists() else "there is no model yet: make run"

    with supervised(tmp_path, python("service", SLEEP, missing=missing)) as state:
        waiting = wait_until(lambda: state("service")["state"] == "waiting" and state("service"))
        model.touch()
        wait_until(lambda: state("service")["state"] == "up")
    assert waiting["reason"] == "there is no model yet: make run" and waiting["pid"] is None


def test_programs_start_after_and_end_before_those_they_need(tmp_path):
    programs = [
        python("prefect", WRITING.replace("{name}", "prefect")),
        python("executor", WRITING.replace("{name}", "executor"), after=("prefect",)),
    ]
    events = tmp_path / "events"
    with supervised(tmp_path, *programs):
        wait_until(lambda: events.exists() and events.read_text().count("starts") == 2)
    assert events.read_text().splitlines()[-2:] == ["executor ends", "prefect ends"]


def test_a_program_that_does_not_end_is_killed_with_what_it_started(tmp_path):
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']); "
        "open('child', 'w').write(str(child.pid)); time.sleep(60)"
    )
    child = tmp_path / "child"
    with supervised(tmp_path, python("stubborn", stubborn, patience_s=0.2)) as state:
        wait_until(lambda: child.exists() and child.read_text())
        pid = state("stubborn")["pid"]
    assert not psutil.pid_exists(pid)
    wait_until(lambda: not _is_alive(int(child.read_text())))


def _is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_program_is_up_when_it_answers_and_not_before(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = (
        "import http.server as h, time, os\n"
        "while not os.path.exists('go'): time.sleep(0.02)\n"
        f"h.HTTPServer(('127.0.0.1', {port}), h.SimpleHTTPRequestHandler).serve_forever()"
    )
    url = f"http://127.0.0.1:{port}/"
    with supervised(tmp_path, python("pages", code, page=url, probe=url)) as state:
        wait_until(lambda: state("pages")["state"] == "starting")
        assert not network.is_up(url)
        (tmp_path / "go").touch()
        wait_until(lambda: state("pages")["state"] == "up")
        assert state("pages")["page"] == url


SUPERVISE = """
import sys
from pathlib import Path
from flows.up import __main__ as up
from flows.up.supervisor import Program
code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', 'import time; " \\
    "time.sleep(60)'], start_new_session=True); open('begun', 'w').close(); time.sleep(60)"
program = Program("service", (sys.executable, "-S", "-c", code))
up.supervise(Path(), [program], "http://127.0.0.1:1/api", "key")
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=lambda one: one.name
)
def test_however_the_supervisor_ends_nothing_is_left(tmp_path, number):
    (tmp_path / ".perennial").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: (tmp_path / "begun").exists())
    [program] = psutil.Process(process.pid).children()[1:]
    run_id = program.environ()[processes.RUN_ID_VARIABLE]
    assert len(processes.find_orphans(run_id)) == 2
    process.send_signal(number)
    assert process.wait(45) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    wait_until(lambda: processes.find_orphans(run_id) == [], 15)


def test_taken_ports_are_named_with_their_keys_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError) as caught:
            check_ports({"services.port": ("127.0.0.1", port), "flows.pages.mlflow": ("127.0.0.1", port)})
    assert f"port {port} (services.port) is taken by pid {os.getpid()}" in caught.value.what
    assert f"flows.pages.mlflow and services.port are both {port}" in caught.value.what


@pytest.fixture
def params():
    return load_params(ROOT / "params.yaml")


def with_tracking(params, url):
    tracking = params.flows.tracking.model_copy(update={"tracking_url": url})
    return params.model_copy(update={"flows": params.flows.model_copy(update={"tracking": tracking})})


def test_mlflow_elsewhere_is_not_started_here(params, tmp_path):
    ours = {program.name for program in up.make_programs(tmp_path, params, SECRET)}
    assert ours == {"dashboard", "prefect", "executor", "service", "mlflow", "evidently"}
    elsewhere = with_tracking(params, "https://mlflow.example.org")
    assert "mlflow" not in {program.name for program in up.make_programs(tmp_path, elsewhere, SECRET)}
    assert "flows.pages.mlflow" in up.list_ports(params)
    assert "flows.pages.mlflow" not in up.list_ports(elsewhere)


def test_neither_a_database_password_nor_the_pages_secret_is_an_argument_of_a_process(params, tmp_path):
    programs = up.make_programs(tmp_path, with_tracking(params, "postgresql://me:secret@db/mlflow"), SECRET)
    assert not any("secret" in word or SECRET in word for program in programs for word in program.command)


def test_the_service_waits_for_a_model(params, tmp_path):
    (service,) = (one for one in up.make_programs(tmp_path, params, SECRET) if one.name == "service")
    assert service.missing() == "there is no model yet: make run"
    (tmp_path / ".perennial").mkdir()
    (tmp_path / ".perennial" / "aliases.json").write_text('{"champion": "home:0123"}')
    assert service.missing() is None


def test_the_read_last_line_of_a_log_are_its_last_line_of_text(tmp_path):
    log = tmp_path / "log"
    assert read_last_line(log) == ""
    log.write_text("one\ntwo\n\n")
    assert read_last_line(log) == "two"
    log.write_text("one\n--- 2026-11-21 10:00:00 started\n")
    assert read_last_line(log) == ""


@pytest.mark.slow
def test_make_up_brings_up_every_page_and_ends_them_all(tmp_path):
    """The real programs, without a model: Prefect, what executes runs, MLflow, Evidently, the dashboard."""
    text = (ROOT / "params.yaml").read_text()
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    keys = ("dashboard: 8000", "prefect: 4200", "mlflow: 5000", "evidently: 8001", "port: 3000")
    for key, port in zip(keys, ports, strict=True):
        assert text.count(f" {key} ") == 1
        text = text.replace(f" {key} ", f" {key.split(':')[0]}: {port} ")
    (tmp_path / "params.yaml").write_text(text)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.up"],
        cwd=tmp_path,
        env={**clean, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    dashboard = f"http://127.0.0.1:{ports[0]}"

    def states():
        try:
            programs = httpx.get(f"{dashboard}/api/status", timeout=60).json()["programs"]
        except (httpx.HTTPError, KeyError):
            return {}
        return {program["name"]: program["state"] for program in programs}

    up_now = dict.fromkeys(("dashboard", "prefect", "executor", "mlflow", "evidently"), "up")
    try:
        wait_until(lambda: states() == {**up_now, "service": "waiting"}, 120)
        status = httpx.get(f"{dashboard}/api/status", timeout=60).json()
        pids = [
            one["pid"]
            for one in json.loads((tmp_path / ".perennial" / "up.json").read_text())["programs"].values()
            if one["pid"]
        ]
        children = [child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)]
        announced = json.loads((tmp_path / ".perennial" / "server.json").read_text())
        auth = tuple(announced["auth_string"].split(":"))
        for program in status["programs"]:
            if program["state"] == "up" and program["page"]:
                page = httpx.get(program["page"], auth=auth, timeout=60, follow_redirects=True)
                assert page.status_code == 200
        assert status["flows"]["up"] and status["model"]["champion"] is None
    finally:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "service is waiting: there is no model yet: make run" in out
    assert not any(_is_alive(pid) for pid in [*pids, *children])


# Another process sends the signal: a thread of this one could only do so while the loop sleeps.
STOPPED_OFTEN = """
import os, random, signal, sys, time
from pathlib import Path
from flows.up import supervisor

supervisor.POLL_S = 0.00001
folder, own = Path(sys.argv[1]), os.getpid()
for _ in range(300):
    one = supervisor.Supervisor((), folder, folder, folder / "up.json")
    with supervisor.call_on_signals(one.stop):
        if not (child := os.fork()):
            until = time.perf_counter() + 0.002 + random.random() * 0.002
            while time.perf_counter() < until:
                pass
            os.kill(own, signal.SIGTERM)
            os._exit(0)
        one.run()
    os.waitpid(child, 0)
"""


def test_a_signal_ends_it_whatever_it_is_just_doing(tmp_path):
    subprocess.run([sys.executable, "-c", STOPPED_OFTEN, str(tmp_path)], check=True, timeout=300)
