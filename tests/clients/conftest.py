"""The service that `tests/services/api/test_clients.py` started; without one nothing is collected."""

import json
import os
from pathlib import Path

import pytest

EXPECTED = os.environ.get("PERENNIAL_CLIENTS_EXPECTED")
collect_ignore_glob = [] if EXPECTED else ["*"]


@pytest.fixture(scope="session")
def expected():
    """What the service answers without a client, and the model's own log-probabilities."""
    return json.loads(Path(EXPECTED).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def url(expected):
    return expected["url"]


@pytest.fixture(scope="session")
def plain(expected):
    """The answer to the question, as it is without a client: its text and its usage."""
    return expected["text"], expected["usage"]
