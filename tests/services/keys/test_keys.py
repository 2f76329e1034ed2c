import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from services.errors import ApiError
from services.keys.__main__ import find_key_file, main
from services.keys.access import Access, get_network
from services.keys.key_file import KeyFile, make_key, read_keys, write_keys
from services.keys.limits import DailyQuota, RateLimit
from stages.common.errors import InputError

SECOND_NS = 1_000_000_000


class Clock:
    """A clock that is set by hand, in nanoseconds and in seconds."""

    def __init__(self, now_s=0):
        self.now_ns = now_s * SECOND_NS

    def ns(self):
        return self.now_ns

    def s(self):
        return self.now_ns / SECOND_NS

    def pass_s(self, seconds):
        self.now_ns += round(seconds * SECOND_NS)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys" / "api_keys.json"


def store(path, *names, **limits):
    made = [make_key(name, "2026-01-01T00:00:00Z", **limits) for name in names]
    write_keys(path, [key for key, _ in made])
    return [token for _, token in made]


def access(path, clock, requests_per_minute=60, tokens_per_day=None, max_clients=100):
    return Access(
        KeyFile(path, clock.ns),
        requests_per_minute=requests_per_minute,
        tokens_per_day=tokens_per_day,
        max_clients=max_clients,
        clock_ns=clock.ns,
        clock_s=clock.s,
    )


def test_the_file_holds_no_token_and_only_its_owner_reads_it(path):
    (token,) = store(path, "home")

    assert token not in path.read_text()
    assert token.removeprefix("perennial-") not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name]


def test_a_token_opens_its_key_and_no_other_token_does(path, clock):
    first, second = store(path, "first", "second")
    keys = KeyFile(path, clock.ns)

    assert keys.find(first).name == "first"
    assert keys.find(second).name == "second"
    assert keys.find(first[:-1]) is None
    assert keys.find("") is None
    assert keys.find("\ud800") is None


def test_keys_are_needed_from_the_first_one_on(path, clock):
    asked = access(path, clock)
    assert not asked.needs_keys()
    store(path, "home")
    clock.pass_s(2)
    assert asked.needs_keys()


def test_a_running_server_sees_a_revoked_key_after_a_second(path, clock):
    first, second = store(path, "first", "second")
    keys = KeyFile(path, clock.ns)
    write_keys(path, [key for key in read_keys(path) if key.name != "first"])

    clock.pass_s(0.5)
    assert keys.find(first) is not None
    clock.pass_s(0.5)
    assert keys.find(first) is None
    assert keys.find(second) is not None


def test_a_server_that_had_keys_stays_closed_when_their_file_is_lost(path, clock):
    (token,) = store(path, "home")
    keys = KeyFile(path, clock.ns)
    path.unlink()
    clock.pass_s(2)

    assert keys.required
    assert keys.find(token) is None


def test_a_broken_file_leaves_the_keys_as_they_were(path, clock, caplog):
    (token,) = store(path, "home")
    keys = KeyFile(path, clock.ns)
    path.write_text("{")
    clock.pass_s(2)

    assert keys.find(token) is not None
    assert "previous keys stay valid" in caplog.text


def test_a_server_that_starts_with_a_broken_file_is_closed(path, clock):
    path.parent.mkdir()
    path.write_text('{"keys": [{"nme": "home"}]}')

    assert KeyFile(path, clock.ns).required


def test_the_wait_that_a_full_rate_names_is_exact(clock):
    rates = RateLimit(10, clock.ns)
    assert [rates.take("a", 7) for _ in range(7)] == [0.0] * 7

    wait_s = rates.take("a", 7)
    assert wait_s == pytest.approx(60 / 7, abs=1e-8)
    clock.pass_s(wait_s)
    clock.now_ns -= 1
    assert rates.take("a", 7) == pytest.approx(1e-9)
    clock.now_ns += 1
    assert rates.take("a", 7) == 0.0
    assert rates.take("a", 7) > 0


def test_asking_while_refused_does_not_make_the_wait_longer(clock):
    rates = RateLimit(10, clock.ns)
    rates.take("a", 60, burst=1)

    assert [rates.take("a", 60, burst=1) for _ in range(3)] == [1.0] * 3


def test_clients_do_not_share_a_rate_and_a_pause_refills_only_to_the_brim(clock):
    rates = RateLimit(10, clock.ns)
    assert rates.take("a", 2) == rates.take("a", 2) == 0.0
    assert rates.take("a", 2) > 0
    assert rates.take("b", 2) == 0.0

    clock.pass_s(3600)
    assert [rates.take("a", 2) > 0 for _ in range(3)] == [False, False, True]


def test_a_flood_of_addresses_is_forgotten_beyond_the_bound(clock):
    rates = RateLimit(100, clock.ns)
    for number in range(10_000):
        rates.take(f"address:{number}", 60)

    assert len(rates) == 100


def test_a_quota_is_whole_again_at_midnight_utc(clock):
    clock.pass_s(20_000 * 86_400 + 86_400 - 90)
    quota = DailyQuota(10, clock.s)
    assert quota.reserve("a", 100, 100) == 0.0

    assert quota.reserve("a", 1, 100) == 90
    clock.pass_s(90)
    assert quota.reserve("a", 100, 100) == 0.0


def test_what_was_reserved_and_not_used_is_given_back(clock):
    quota = DailyQuota(10, clock.s)
    quota.reserve("a", 80, 100)
    assert quota.reserve("a", 30, 100) > 0

    quota.settle("a", reserved=80, used=10)
    assert quota.used("a") == 10
    assert quota.reserve("a", 30, 100) == 0.0


def test_an_answer_across_midnight_does_not_make_the_new_day_longer(clock):
    clock.pass_s(86_399)
    quota = DailyQuota(10, clock.s)
    quota.reserve("a", 80, 100)
    clock.pass_s(2)
    quota.settle("a", reserved=80, used=10)

    assert quota.used("a") == 0


def test_without_keys_a_caller_is_limited_by_address(path, clock):
    door = access(path, clock, requests_per_minute=1)
    caller = door.admit(None, "192.0.2.1")

    assert (caller.key, caller.client) == (None, "address:192.0.2.1")
    with pytest.raises(ApiError) as refused:
        door.admit(None, "192.0.2.1")
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert refused.value.retry_after_s == 60
    assert door.admit(None, "192.0.2.2").client == "address:192.0.2.2"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic aG9tZQ==", "bearer  "])
def test_with_keys_a_caller_without_one_is_refused(path, clock, header):
    store(path, "home")

    with pytest.raises(ApiError) as refused:
        access(path, clock).admit(header, "192.0.2.1")
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")


def test_wrong_keys_are_held_to_the_rate_of_their_address(path, clock):
    (token,) = store(path, "home")
    door = access(path, clock, requests_per_minute=2)
    codes = []
    for _ in range(3):
        with pytest.raises(ApiError) as refused:
            door.admit("Bearer wrong", "192.0.2.1")
        codes.append(refused.value.code)

    assert codes == ["invalid_api_key", "invalid_api_key", "rate_limit_exceeded"]
    assert door.admit(f"Bearer {token}", "192.0.2.1").key == "home"


def test_a_key_has_its_own_limits_wherever_it_is_used_from(path, clock):
    (token,) = store(path, "home", requests_per_minute=2, tokens_per_day=50)
    door = access(path, clock, requests_per_minute=1, tokens_per_day=10)
    caller = door.admit(f"Bearer {token}", "192.0.2.1")
    door.admit(f"Bearer {token}", "192.0.2.2")

    with pytest.raises(ApiError):
        door.admit(f"Bearer {token}", "192.0.2.3")
    door.reserve(caller, 50)
    with pytest.raises(ApiError) as refused:
        door.reserve(caller, 1)
    assert refused.value.code == "insufficient_quota"
    door.settle(caller, 50, 20)
    door.reserve(caller, 30)


def test_no_quota_is_no_quota(path, clock):
    door = access(path, clock, tokens_per_day=None)
    caller = door.admit(None, "192.0.2.1")

    door.reserve(caller, 10**12)
    door.settle(caller, 10**12, 1)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", "unknown"),
    ],
)
def test_an_ipv6_customer_is_one_client(address, network):
    assert get_network(address) == network


def test_the_command_adds_lists_and_revokes(path, capsys):
    file = ["--file", str(path)]
    assert main([*file, "add", "home", "--requests-per-minute", "30"]) == 0
    token = capsys.readouterr().out.strip()
    assert KeyFile(path).find(token).requests_per_minute == 30

    assert main([*file, "list"]) == 0
    listed = capsys.readouterr().out
    assert "home" in listed and "30 requests per minute" in listed
    assert token not in listed and json.loads(path.read_text())["keys"][0]["sha256"] not in listed

    assert main([*file, "add", "home"]) == 1
    assert main([*file, "revoke", "home"]) == 0
    assert KeyFile(path).find(token) is None
    assert main([*file, "revoke", "home"]) == 1
    assert "no key 'home'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "two words", "a\nb", "x" * 65, "../etc"])
def test_a_name_that_cannot_stand_in_a_log_line_is_refused(name):
    with pytest.raises(InputError, match="not a valid name"):
        make_key(name, "2026-01-01T00:00:00Z")


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(InputError, match="tokens-per-day is 0"):
        make_key("home", "2026-01-01T00:00:00Z", tokens_per_day=0)


def test_keys_added_side_by_side_are_all_kept(path):
    command = [sys.executable, "-m", "services.keys", "--file", str(path), "add"]
    running = [
        subprocess.Popen([*command, f"k{number}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for number in range(4)
    ]
    for process in running:
        assert process.wait(60) == 0
        process.communicate()

    assert sorted(key.name for key in read_keys(path)) == ["k0", "k1", "k2", "k3"]


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("services: {access: {keys_file: a/b.json}}", "a/b.json"),
        ("services: {}", ".perennial/api_keys.json"),
        (": [", ".perennial/api_keys.json"),
    ],
)
def test_the_file_is_the_one_that_the_parameters_name(tmp_path, text, file):
    params = tmp_path / "params.yaml"
    params.write_text(text)

    assert find_key_file(params) == Path(file)
