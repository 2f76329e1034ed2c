"""Requests of another user of this machine: a child process with another user id."""

import json
import os
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

OTHER_USER = 54_321
SEND = """
import encodings.idna, http.client, json, os, sys
os.setgroups([])
os.setgid(int(sys.argv[4]))
os.setuid(int(sys.argv[4]))
host, port, requests = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
answers = []
for method, path, body, headers in requests:
    connection = http.client.HTTPConnection(host, port, timeout=120)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    answers.append([answer.status, answer.read().decode("utf-8", "replace")])
print(json.dumps(answers))
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root starts processes of another user")


def send_as(user, url, *requests):
    """Send requests (method, path, body, headers) as a user; return status and text of each answer."""
    parts = urlsplit(url)
    arguments = [parts.hostname, str(parts.port), json.dumps(requests), str(user)]
    done = subprocess.run(
        # It changes its user itself: the other one may have no right to read the interpreter.
        [sys.executable, "-I", "-c", SEND, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(answer) for answer in json.loads(done.stdout)]
