"""`perennial serve` has its own help and two options, and passes all others on to BentoML."""

import subprocess
import sys
from pathlib import Path

import pytest

from flows.serve import make_command

ROOT = Path(__file__).parents[2]
BENTOML = [sys.executable, "-m", "bentoml", "serve", "services.generation:Generation"]


def serve(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "flows.serve", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_help_is_about_this_service_and_names_bentoml_for_the_rest():
    done = serve("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: perennial serve ")
    for text in ("champion", "/v1", "params.yaml", "--host", "--port", "bentoml serve"):
        assert text in done.stdout
    assert "fraud_detector" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        ([], []),
        (["-p", "8080", "--host", "0.0.0.0"], ["--host", "0.0.0.0", "--port", "8080"]),
        (["--port=8080"], ["--port", "8080"]),
        (["--debug", "--arg", "key=value"], ["--debug", "--arg", "key=value"]),
        (["--env", "conda", "--port", "1"], ["--port", "1", "--env", "conda"]),
    ],
)
def test_the_options_reach_bentoml(arguments, passed):
    assert make_command(arguments) == [*BENTOML, *passed]


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "²"])
def test_a_wrong_port_is_named_before_anything_starts(port):
    done = serve(f"--port={port}")
    assert done.returncode == 2
    assert f"{port!r} is not a port: use a number from 1 to 65535" in done.stderr


def test_bentoml_refuses_an_option_that_no_one_has():
    done = serve("--no-such-option")
    assert done.returncode == 2
    assert "No such option" in done.stderr and "--no-such-option" in done.stderr
