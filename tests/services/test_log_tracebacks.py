"""The log of the service holds no words of a user, whatever is raised over them."""

import json
import subprocess
import sys

import pytest

from services.log_tracebacks import format_exception
from tests.services.serving import ROOT

SECRET = "zoe@example.com"


def raised(action):
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def wrapped():
    try:
        int(SECRET)
    except ValueError as error:
        raise KeyError(SECRET) from error


@pytest.mark.parametrize(
    "action",
    [
        lambda: {}[SECRET],
        lambda: int(SECRET),
        lambda: json.loads(f'"{SECRET}'),
        lambda: f"{SECRET}\ud800".encode(),
        lambda: getattr(object(), SECRET),
        wrapped,
    ],
)
def test_a_traceback_says_where_and_not_what(action):
    text = format_exception(raised(action))
    assert SECRET not in text and "test_log_tracebacks.py" in text
    assert text.splitlines()[-1].startswith("builtins.") or "JSONDecodeError" in text


def test_what_the_machine_says_stays():
    def fail():
        raise OSError(28, "No space left on device", "events.db")

    assert "No space left on device: 'events.db'" in format_exception(raised(fail))


CODE = f"""
import logging, sys
from services.log_tracebacks import hide_messages
hide_messages(); hide_messages()
logging.basicConfig(stream=sys.stdout)
try:
    {{}}["{SECRET}"]
except KeyError as error:
    logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
    logging.getLogger("bentoml").error("failed", exc_info=error)
"""


def test_every_logger_of_the_process_hides_them():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("builtins.KeyError") == 2
    assert done.stdout.count(SECRET) == 0
