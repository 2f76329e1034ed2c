"""HTTP probes and addresses on this machine."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

LOOPBACK = "127.0.0.1"
PROBE_TIMEOUT_S = 3.0


def is_up(url: str, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """Return whether a GET of `url` is answered with a status below 500, as 401 from behind a login."""
    answer = get(url, timeout_s)
    return answer is not None and answer[0] < 500


def get(
    url: str, timeout_s: float = PROBE_TIMEOUT_S, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes] | None:
    """Return status and body of a GET; None if there is no answer in time."""
    try:
        with _opener(url).open(Request(url, headers=dict(headers or {})), timeout=timeout_s) as response:
            return response.status, response.read()
    except HTTPError as error:
        return error.code, error.read()
    except (OSError, http.client.HTTPException, ValueError):
        return None


def _opener(url: str) -> OpenerDirector:
    """Return an opener with the environment's proxies, but none for this machine's own addresses."""
    is_local = urlsplit(url).hostname in (LOOPBACK, "localhost", "::1")
    return build_opener(ProxyHandler({})) if is_local else build_opener()


def free_port() -> int:
    """Return a TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def find_reachable_host(host: str) -> str:
    """Return the address at which this machine reaches a server that listens on `host`."""
    return LOOPBACK if host in ("0.0.0.0", "::", "") else host
