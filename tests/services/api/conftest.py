"""A running service around a tiny model, for the modules that need no other."""

import pytest

from tests.services.serving import serving, tiny_files


@pytest.fixture(scope="module")
def changes():
    """Changes to the settings of params.yaml; a module overrides it."""
    return {}


@pytest.fixture(scope="module")
def server(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, tiny_files(folder / "model"), **changes) as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client
