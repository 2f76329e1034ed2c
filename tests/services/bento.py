"""The real service in a process of its own, as `make serve` starts it, around a tiny model."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

from stages.common import network
from tests.services.serving import ROOT
from tests.services.tiny_checkout import make_checkout


@contextmanager
def serving_bento(folder, changes=None, start_s=180, path=(), **shape):
    """Run the service in a checkout with changed parameters; yield its process, address and log.

    Args:
        path: further folders to import from.
        shape: of the model.
    """
    root = make_checkout(folder, changes, **shape)
    port, log = network.free_port(), folder / "log"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PERENNIAL_")},
        "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)]),
        "BENTOML_HOME": str(folder / "bentoml"),
        "PERENNIAL_HOSTS": "own.example",
    }
    command = [sys.executable, "-m", "bentoml", "serve", "services.generation:Generation"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=root, env=environment, stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + start_s
    try:
        while (answer := network.get(f"{url}/readyz")) is None or answer[0] != 200:
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield process, url, log
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
