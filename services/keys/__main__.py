"""Who may ask, how often, and for how many tokens a day.

    python -m services.keys add NAME [--requests-per-minute N] [--tokens-per-day N] [--admin]
    python -m services.keys list
    python -m services.keys revoke NAME

A key is shown once, when it is made; the file holds its SHA-256. Running servers see a change within a
second. While the file has never held a key, anybody may ask, and is limited by address; from the first key
on, one is needed, also when the file is later lost. Rates and quotas are counted in memory, by each server
process for itself, and a restart forgets them.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from services import errors
from stages.common.artifacts import STATE
from stages.common.errors import InputError
from stages.common.locks import file_lock

KEYS_FILE = STATE / "api_keys.json"
TOKEN_PREFIX = "perennial-"  # so that secret scanners, and our own guard, know a leaked key
TOKEN_BYTES = 32
RELOAD_EVERY_NS = 1_000_000_000
MINUTE_NS = 60_000_000_000
DAY_S = 86_400

logger = logging.getLogger("keys")


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is stored: what it may do, and the hash of its token.

    None as a limit takes the server's own.
    """

    name: str
    sha256: str
    created_at: str
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None
    admin: bool = False


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request, and what limits hold; `key` is None for a caller without one."""

    client: str
    key: str | None
    admin: bool
    requests_per_minute: int | None
    tokens_per_day: int | None


def hash_token(token: str) -> str:
    """Return the SHA-256 of a token as 64 hex digits.

    A plain hash is enough here: salt and slow hashes (scrypt) protect passwords, which people choose from
    few; a token is 256 random bits, and no list of candidates exists to be tried against the file.
    """
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def make_key(
    name: str,
    created_at: str,
    *,
    requests_per_minute: int | None = None,
    tokens_per_day: int | None = None,
    admin: bool = False,
) -> tuple[Key, str]:
    """Return a new key, and its token, which exists nowhere else.

    Raises:
        InputError: the name cannot stand in a log line, or a limit is not positive.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise InputError(
            f"{name!r} is no name for a key", "take up to 64 letters, digits, dots, dashes and underscores"
        )
    for limit, value in (("requests-per-minute", requests_per_minute), ("tokens-per-day", tokens_per_day)):
        if value is not None and value < 1:
            raise InputError(f"--{limit} is {value}", "give 1 or more, or leave it out for the server's own")
    token = TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    return Key(name, hash_token(token), created_at, requests_per_minute, tokens_per_day, admin), token


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read the stored keys; a file that is not there holds none.

    Raises:
        InputError: the file is not what `write_keys` writes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    try:
        return tuple(Key(**entry) for entry in json.loads(text)["keys"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is not a file of keys: {error!r}", "restore it, or remove it and add the keys again"
        ) from None


def write_keys(path: Path, keys: Sequence[Key]) -> None:
    """Write the keys for the owner's eyes only (mode 0600), all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mkstemp's mode is 0600
    beside = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"keys": [asdict(key) for key in keys]}, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())  # a key that was shown must not be lost to a power cut
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def editing(path: Path) -> Iterator[list[Key]]:
    """Yield the stored keys for the caller to change, and write them; two editors wait for each other."""
    with file_lock(path.with_name(f"{path.name}.lock")):
        keys = list(read_keys(path))
        yield keys
        write_keys(path, keys)


class KeyFile:
    """The stored keys, read again when their file has changed; looked at once a second at most.

    A file that is broken leaves the keys as they were, and a line in the log.
    """

    def __init__(self, path: Path, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._path = path
        self._clock_ns = clock_ns
        self._by_hash: dict[str, Key] = {}
        self._stamp: tuple[int, int, int] | None = None
        self._looked_at_ns: int | None = None
        self._needed = False
        self._refresh()

    @property
    def needed(self) -> bool:
        """Whether a caller needs a key: once one was stored, for as long as the process lives."""
        self._refresh()
        return self._needed

    def find(self, token: str) -> Key | None:
        """Return the key that `token` opens."""
        self._refresh()
        digest = hash_token(token)
        # Found by hash, not by token: what time the look-up takes says nothing of any stored token.
        key = self._by_hash.get(digest)
        return key if key is not None and hmac.compare_digest(key.sha256, digest) else None

    def _refresh(self) -> None:
        now_ns = self._clock_ns()
        if self._looked_at_ns is not None and now_ns - self._looked_at_ns < RELOAD_EVERY_NS:
            return
        self._looked_at_ns = now_ns
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        try:
            keys = read_keys(self._path)
        except (InputError, OSError) as error:
            if not self._needed:
                # No earlier keys to go on with, and a file that somebody meant to close the server with.
                self._needed = True
            logger.error("the keys stay as they were: %s", error)
        else:
            self._by_hash = {key.sha256: key for key in keys}
            self._needed = self._needed or bool(keys)
        self._stamp = stamp


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes whenever the file is replaced, or None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


class RateLimit:
    """A token bucket for every client, kept as one number each (GCRA, ITU-T I.371).

    A bucket holds `burst` requests and is refilled evenly. With more than `max_clients` clients the one
    unseen for longest is forgotten, so that a flood of addresses costs a bounded amount of memory; its
    bucket is then full again, which is what waiting would have given it.
    """

    def __init__(self, max_clients: int, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._max_clients = max_clients
        self._clock_ns = clock_ns
        self._full_at_ns: OrderedDict[str, int] = OrderedDict()  # when the client's bucket is full again

    def take(self, client: str, requests_per_minute: int, burst: int | None = None) -> float:
        """Take one request from the client's bucket; return 0.0, or the seconds until there is one.

        A refused request takes nothing. `burst` is a minute's requests unless given.
        """
        now_ns = self._clock_ns()
        each_ns = -(-MINUTE_NS // requests_per_minute)  # rounded up, in whole nanoseconds: waits are exact
        room_ns = each_ns * ((requests_per_minute if burst is None else burst) - 1)
        full_at_ns = max(now_ns, self._full_at_ns.pop(client, now_ns))
        wait_ns = full_at_ns - room_ns - now_ns
        self._full_at_ns[client] = full_at_ns if wait_ns > 0 else full_at_ns + each_ns
        if len(self._full_at_ns) > self._max_clients:
            self._full_at_ns.popitem(last=False)
        return max(0, wait_ns) / 1e9

    def __len__(self) -> int:
        return len(self._full_at_ns)


class DailyQuota:
    """Tokens by client since midnight UTC.

    What a request could use is reserved before it runs and settled after, so that requests side by side
    cannot go beyond the quota together.
    """

    def __init__(self, max_clients: int, clock_s: Callable[[], float] = time.time) -> None:
        self._max_clients = max_clients
        self._clock_s = clock_s
        self._day = 0
        self._used: OrderedDict[str, int] = OrderedDict()

    def reserve(self, client: str, tokens: int, tokens_per_day: int) -> float:
        """Reserve `tokens`; return 0.0, or the seconds until midnight where the quota has not that many."""
        now_s = self._clock_s()
        self._turn_to(now_s)
        if self.used(client) + tokens > tokens_per_day:
            return DAY_S - now_s % DAY_S
        self._add(client, tokens)
        return 0.0

    def settle(self, client: str, reserved: int, used: int) -> None:
        """Give back what was reserved and not used."""
        self._turn_to(self._clock_s())
        self._add(client, used - reserved)

    def used(self, client: str) -> int:
        """Return the client's tokens of the day, reserved ones included."""
        self._turn_to(self._clock_s())
        return self._used.get(client, 0)

    def _add(self, client: str, tokens: int) -> None:
        # Below zero: reserved before midnight and settled after.
        self._used[client] = max(0, self._used.pop(client, 0) + tokens)
        if len(self._used) > self._max_clients:
            self._used.popitem(last=False)

    def _turn_to(self, now_s: float) -> None:
        day = int(now_s // DAY_S)
        if day != self._day:
            self._day = day
            self._used.clear()


class Access:
    """Who may ask, and how much: keys, rates and quotas together. Used from one thread.

    Args:
        keys_needed: whether a caller needs a key even where none was ever made.
        requests_per_minute, tokens_per_day: of a caller whose key has no limits of its own; None for none.
    """

    def __init__(
        self,
        keys: KeyFile,
        *,
        keys_needed: bool = False,
        requests_per_minute: int | None,
        tokens_per_day: int | None,
        max_clients: int,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        clock_s: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._keys_needed = keys_needed
        self._requests_per_minute = requests_per_minute
        self._tokens_per_day = tokens_per_day
        self._rates = RateLimit(max_clients, clock_ns)
        self._quotas = DailyQuota(max_clients, clock_s)

    def admit(self, authorization: str | None, address: str) -> Caller:
        """Return who is asking, one request taken from their rate.

        Args:
            authorization: the header's value.
            address: the peer's IP address.

        Raises:
            ApiError: invalid_api_key, or rate_limit_exceeded.
        """
        key = self._key_of(authorization)
        if key is None:
            # Wrong keys are held to the address's rate: guessing is hopeless, but should not be cheap.
            self._take(f"address:{network_of(address)}", self._requests_per_minute)
            if self._keys_needed or self._keys.needed:
                raise errors.invalid_api_key()
            client = f"address:{network_of(address)}"
            return Caller(client, None, False, self._requests_per_minute, self._tokens_per_day)
        rate = key.requests_per_minute or self._requests_per_minute
        self._take(f"key:{key.name}", rate)
        quota = key.tokens_per_day or self._tokens_per_day
        return Caller(f"key:{key.name}", key.name, key.admin, rate, quota)

    def reserve(self, caller: Caller, tokens: int) -> None:
        """Reserve the most tokens (prompt and answer) that a request can use; `settle` must follow.

        Raises:
            ApiError: insufficient_quota; nothing was reserved.
        """
        if caller.tokens_per_day is None:
            return
        wait_s = self._quotas.reserve(caller.client, tokens, caller.tokens_per_day)
        if wait_s > 0:
            raise errors.insufficient_quota(wait_s)

    def settle(self, caller: Caller, reserved: int, used: int) -> None:
        """Give back what was reserved and not used."""
        if caller.tokens_per_day is not None:
            self._quotas.settle(caller.client, reserved, used)

    def _key_of(self, authorization: str | None) -> Key | None:
        scheme, _, token = (authorization or "").partition(" ")
        return self._keys.find(token.strip()) if scheme.lower() == "bearer" else None

    def _take(self, client: str, requests_per_minute: int | None) -> None:
        if requests_per_minute is None:
            return
        wait_s = self._rates.take(client, requests_per_minute)
        if wait_s > 0:
            raise errors.rate_limit_exceeded(wait_s)


def network_of(address: str) -> str:
    """Return what counts as one client: an IPv4 address, or the /64 that an IPv6 customer is given."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"  # a Unix socket, or a proxy's name: all of them together
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Add, list or revoke keys; return the exit status."""
    options = _parser().parse_args(arguments)
    path = options.file or keys_file_of(Path("params.yaml"))
    try:
        if options.command == "add":
            lines = _add(path, options)
        elif options.command == "revoke":
            lines = _revoke(path, options.name)
        else:
            lines = [_line(key) for key in read_keys(path)] or [f"no keys in {path}"]
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def keys_file_of(params: Path) -> Path:
    """Return PERENNIAL_KEYS_FILE, else `services.access.keys_file` of a parameters file, else the default.

    Read without the checks of stages.common.params: a wrong line about training should not keep anybody
    from revoking a key.
    """
    import yaml

    if named := os.environ.get("PERENNIAL_KEYS_FILE"):
        return Path(named)
    try:
        node: Any = yaml.safe_load(params.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return KEYS_FILE
    for name in ("services", "access", "keys_file"):
        node = node.get(name) if isinstance(node, Mapping) else None
    return Path(node) if isinstance(node, str) else KEYS_FILE


def _add(path: Path, options: argparse.Namespace) -> list[str]:
    created_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    key, token = make_key(
        options.name,
        created_at,
        requests_per_minute=options.requests_per_minute,
        tokens_per_day=options.tokens_per_day,
        admin=options.admin,
    )
    with editing(path) as keys:
        if any(other.name == key.name for other in keys):
            raise InputError(
                f"{path} has a key {key.name!r} already", f"take another name, or revoke {key.name!r} first"
            )
        keys.append(key)
    sys.stderr.write("this key is not shown again:\n")
    return [token]


def _revoke(path: Path, name: str) -> list[str]:
    with editing(path) as keys:
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise InputError(f"{path} has no key {name!r}", f"its keys: {known}")
        keys[:] = left
    return [f"{name} is revoked; running servers refuse it within a second"]


def _line(key: Key) -> str:
    limits = [
        f"{key.requests_per_minute} requests a minute" if key.requests_per_minute else "",
        f"{key.tokens_per_day} tokens a day" if key.tokens_per_day else "",
        "admin" if key.admin else "",
    ]
    return "  ".join([key.name, key.created_at, *filter(None, limits)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perennial keys",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--file", type=Path, help="of the keys (services.access.keys_file of params.yaml)")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="make a key and show it, once")
    add.add_argument("name")
    add.add_argument("--requests-per-minute", type=int, help="instead of the server's own")
    add.add_argument("--tokens-per-day", type=int, help="instead of the server's own")
    add.add_argument("--admin", action="store_true", help="may switch versions")
    commands.add_parser("list", help="show names and limits")
    commands.add_parser("revoke", help="make a key worthless").add_argument("name")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
