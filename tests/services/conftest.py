"""Real parts that several tests of the services use."""

import tempfile
from pathlib import Path

import pytest

from tests.services.postgresql import Server, binaries


@pytest.fixture(scope="module")
def postgresql():
    if binaries() is None:
        pytest.skip("PostgreSQL's server is not installed (apt-get install postgresql)")
    # pytest's own folders are closed to other users, and the server is one when root tests.
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()
