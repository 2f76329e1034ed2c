"""The process of the service, as `bentoml serve` starts it."""

import os
import subprocess
import sys

import pytest

from stages.common import network
from tests.services.serving import ROOT
from tests.services.tiny_checkout import make_checkout


@pytest.mark.slow
def test_a_service_that_cannot_start_says_why_and_ends(tmp_path):
    """Also where setproctitle is installed, as vLLM does, and BentoML's parent has another name."""
    root = make_checkout(tmp_path, {"gpus: 0 #": "gpus: 1 #"})
    command = [sys.executable, "-m", "bentoml", "serve", "services.generation:Generation"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "BENTOML_HOME": str(tmp_path / "bentoml"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    ended = subprocess.run(
        [*command, "--port", str(network.free_port())],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "services.engine.gpus is 1, and torch sees no GPUs" in ended.stdout + ended.stderr
