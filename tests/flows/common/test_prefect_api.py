import os
import subprocess
import sys

import httpx
import pytest

from flows.common import prefect_api
from stages.common import network
from stages.common.errors import InputError

PROFILES = """
active = "work"
[profiles.work]
PREFECT_API_URL = "http://prefect.example:4200/api"
[profiles.home]
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    return tmp_path


def test_the_users_own_api_is_found_in_the_environment_and_in_the_profile(home, monkeypatch):
    assert prefect_api.read_configured_url() is None
    (home / "profiles.toml").write_text(PROFILES)
    assert prefect_api.read_configured_url() == "http://prefect.example:4200/api"
    monkeypatch.setenv("PREFECT_PROFILE", "home")
    assert prefect_api.read_configured_url() is None
    monkeypatch.setenv("PREFECT_API_URL", "http://other.example/api")
    assert prefect_api.read_configured_url() == "http://other.example/api"


def test_a_server_that_make_up_announced_is_used_with_its_secret(home, api):
    prefect_api.announce(home, api.url, api.auth_string)
    assert (home / ".perennial/server.json").stat().st_mode & 0o777 == 0o600

    with prefect_api.connect(home) as found:
        assert found.url == api.url and not found.is_temporary
        assert os.environ["PREFECT_API_AUTH_STRING"] == api.auth_string
    assert "PREFECT_API_AUTH_STRING" not in os.environ


def test_the_secret_is_sent_to_the_announced_server_and_to_no_other(home, api, monkeypatch):
    prefect_api.announce(home, api.url, api.auth_string)
    assert prefect_api.read_auth_string(home, f"{api.url}/") == api.auth_string
    assert prefect_api.read_auth_string(home, "https://prefect.example/api") is None
    monkeypatch.setenv("PREFECT_API_URL", api.url)
    with prefect_api.connect(home):
        assert os.environ["PREFECT_API_AUTH_STRING"] == api.auth_string
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "mine:own")
    assert prefect_api.read_auth_string(home, "https://prefect.example/api") == "mine:own"


def test_the_server_of_another_checkout_is_left_alone(home, api, monkeypatch):
    assert not prefect_api.lets_in(home, api.url)
    monkeypatch.setattr(prefect_api, "DEFAULT_URL", api.url)
    monkeypatch.setattr(
        prefect_api, "start_temporary", lambda port, log, secret: subprocess.Popen([sys.executable, "-c", ""])
    )
    with prefect_api.connect(home) as found:
        assert found.is_temporary
    prefect_api.announce(home, api.url, api.auth_string)
    assert prefect_api.lets_in(home, api.url)


def check_closed(url, auth_string):
    """Check that the server answers who has its secret, and no page elsewhere."""
    flows, evil = f"{url}/flows/filter", {"Origin": "https://evil.example"}
    auth = tuple(auth_string.split(":"))
    assert httpx.post(flows, json={}).status_code == 401
    assert httpx.post(flows, json={}, auth=("perennial", "guessed")).status_code == 401
    assert httpx.post(flows, json={}, auth=auth, headers=evil).status_code == 403
    assert httpx.post(flows, json={}, auth=auth).status_code == 200


def test_a_server_for_one_run_is_closed_to_all_but_the_run(api):
    check_closed(api.url, api.auth_string)


@pytest.mark.slow
def test_where_none_answers_a_run_starts_a_server_of_its_own_which_is_closed(home, monkeypatch):
    monkeypatch.setattr(prefect_api, "DEFAULT_URL", f"http://127.0.0.1:{network.free_port()}/api")
    with prefect_api.connect(home) as found:
        found.wait()
        assert found.is_temporary
        check_closed(found.url, os.environ["PREFECT_API_AUTH_STRING"])


def test_a_server_that_was_announced_but_is_down_is_not_used(home, monkeypatch):
    monkeypatch.setattr(prefect_api, "DEFAULT_URL", f"http://127.0.0.1:{network.free_port()}/api")
    monkeypatch.setattr(
        prefect_api, "start_temporary", lambda port, log, secret: subprocess.Popen([sys.executable, "-c", ""])
    )
    prefect_api.announce(home, f"http://127.0.0.1:{network.free_port()}/api")

    with prefect_api.connect(home) as found:
        assert found.is_temporary


def test_a_server_that_ends_at_once_is_told(home):
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])

    with pytest.raises(InputError, match=r"ended with exit code 3\n  fix: see .perennial/server.log"):
        prefect_api.wait_until_up(f"http://127.0.0.1:{network.free_port()}/api", process)


def test_only_a_prefect_api_counts_as_up(api):
    assert prefect_api.is_up(api.url)
    assert not prefect_api.is_up(api.url.removesuffix("/api"))
    assert not prefect_api.is_up(f"http://127.0.0.1:{network.free_port()}/api")
