import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from filelock import FileLock

from flows.common import prefect_api, processes
from flows.common.page_secret import make_auth_string
from stages.common import network
from tests.flows.loop_home import find_home, make_home
from tests.flows.toy import Api, Toy, make_toy

API_SECRET = "the secret of the tests' server"


@pytest.fixture(scope="session")
def clean_environment(tmp_path_factory):
    """The environment of a user who has never used Prefect."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "PERENNIAL_"))
    }
    return {
        **kept,
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "PREFECT_API_AUTH_STRING": make_auth_string(API_SECRET),
        "DVC_NO_ANALYTICS": "1",
    }


@pytest.fixture(scope="package")
def api(clean_environment, tmp_path_factory):
    """A real Prefect server on a free port, ended with the tests of the flows."""
    port, log = network.free_port(), tmp_path_factory.mktemp("server") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", clean_environment["PREFECT_HOME"])
        process = prefect_api.start_temporary(port, log, API_SECRET)
    url = f"http://127.0.0.1:{port}/api"
    try:
        prefect_api.wait_until_up(url, process)
        yield Api(url, make_auth_string(API_SECRET))
    finally:
        processes.stop(process)


@pytest.fixture(scope="session")
def finished_toy(tmp_path_factory, clean_environment):
    """A small checkout in which `dvc repro` has run everything; copied by `finished`.

    The worker that needs it first makes it, for all of them.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    root = shared / "finished-toy"
    with FileLock(shared / "finished-toy.lock"):
        if not root.exists():
            toy = make_toy(tmp_path_factory.mktemp("making"), clean_environment)
            assert toy.dvc("repro").returncode == 0
            toy.forget()
            toy.root.rename(root)
    return Toy(root, clean_environment)


@pytest.fixture(scope="session")
def trained_home(tmp_path_factory):
    """A home of the loop in which the pipeline has run once; `copy_home` copies it.

    The worker that needs it first makes it, for all of them.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder, made = shared / "trained-home", shared / "trained-home.made"
    with FileLock(shared / "trained-home.lock"):
        if made.exists():
            return find_home(folder)
        shutil.rmtree(folder, ignore_errors=True)
        home = make_home(folder)
        home.run("-m", "flows.training")
        made.touch()
        return home


@pytest.fixture
def offline(tmp_path, finished_toy):
    """A small checkout in which everything has run, for what needs no Prefect."""
    root = shutil.copytree(finished_toy.root, tmp_path / "checkout", symlinks=True)
    return Toy(root, finished_toy.environment)


@pytest.fixture
def finished(offline, api):
    """The same, its runs going to the server of the tests."""
    return Toy(offline.root, {**offline.environment, "PREFECT_API_URL": api.url})


@pytest.fixture
def retrain(finished):
    """The same, with a parameter of train changed."""
    finished.change("params.yaml", "learning_rate: 0.003", "learning_rate: 0.002")
    return finished


@pytest.fixture
def toy(tmp_path, clean_environment, api):
    """A small checkout whose runs go to the server of the tests."""
    return make_toy(tmp_path, {**clean_environment, "PREFECT_API_URL": api.url})


@pytest.fixture
def web():
    """An address that keeps the text of what is posted to it."""
    got = []

    class Keep(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Keep) as receiver:
        thread = threading.Thread(target=receiver.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{receiver.server_port}/", got
        receiver.shutdown()
        thread.join()
