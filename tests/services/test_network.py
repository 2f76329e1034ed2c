"""Where a process listens decides whether it asks for keys."""

import socket
import subprocess
import sys

import pytest

from tests.services.serving import ROOT

LISTEN = """
from services.network import listens_beyond_loopback
import socket

with socket.create_server(("{address}", 0)):
    print(listens_beyond_loopback())
"""


@pytest.mark.parametrize(("address", "beyond"), [("127.0.0.1", "False"), ("0.0.0.0", "True")])
def test_a_socket_on_every_address_is_beyond_loopback(address, beyond):
    done = subprocess.run(
        [sys.executable, "-c", LISTEN.format(address=address)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == beyond, done.stderr


def test_a_socket_handed_down_by_a_parent_is_seen(tmp_path):
    """BentoML's parent process opens the socket, and the worker serves it."""
    code = "from services.network import listens_beyond_loopback; print(listens_beyond_loopback())"
    with socket.create_server(("0.0.0.0", 0)) as listening:
        listening.set_inheritable(True)
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            pass_fds=[listening.fileno()],
        )
    assert done.stdout.strip() == "True", done.stderr


def test_a_process_that_listens_nowhere_is_not_beyond():
    code = "from services.network import listens_beyond_loopback; print(listens_beyond_loopback())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
