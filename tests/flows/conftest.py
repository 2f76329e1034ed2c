import os

import pytest

from flows import server
from tests.flows.toy import Api, make_toy


@pytest.fixture(scope="session")
def clean_environment(tmp_path_factory):
    """The environment of a user who has never used Prefect."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "PERENNIAL_"))
    }
    return {**kept, "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")), "DVC_NO_ANALYTICS": "1"}


@pytest.fixture(scope="session")
def api(clean_environment, tmp_path_factory):
    """A real Prefect server on a free port, ended with the tests."""
    port, log = server.free_port(), tmp_path_factory.mktemp("server") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", clean_environment["PREFECT_HOME"])
        process = server.start_temporary(port, log)
    url = f"http://127.0.0.1:{port}/api"
    try:
        server.wait_until_up(url, process)
        yield Api(url)
    finally:
        server.stop(process)


@pytest.fixture
def toy(tmp_path, clean_environment, api):
    """A small checkout whose runs go to the server of the tests."""
    return make_toy(tmp_path, {**clean_environment, "PREFECT_API_URL": api.url})


@pytest.fixture
def offline_toy(tmp_path, clean_environment):
    """A small checkout for what needs no Prefect at all."""
    return make_toy(tmp_path, clean_environment)
