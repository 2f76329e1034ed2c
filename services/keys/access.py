"""Access control: authenticate a request, and apply its rate and its quota."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass

from services import errors
from services.keys.key_file import Key, KeyFile
from services.keys.limits import DailyQuota, RateLimit


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request and its limits.

    Attributes:
        client: what rates and quotas are counted by: `key:NAME` or `address:NETWORK`.
        key: name of the API key; None without one.
    """

    client: str
    key: str | None
    requests_per_minute: int | None
    tokens_per_day: int | None


class Access:
    """Apply keys, rates and quotas to requests. Not thread-safe.

    Args:
        keys_required: require a key even if none was ever made.
        requests_per_minute, tokens_per_day: limits for callers whose key has none of its own; None:
            unlimited.
    """

    def __init__(
        self,
        keys: KeyFile,
        *,
        keys_required: bool = False,
        requests_per_minute: int | None,
        tokens_per_day: int | None,
        max_clients: int,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        clock_s: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._keys_required = keys_required
        self._requests_per_minute = requests_per_minute
        self._tokens_per_day = tokens_per_day
        self._rates = RateLimit(max_clients, clock_ns)
        self._quotas = DailyQuota(max_clients, clock_s)

    def needs_keys(self) -> bool:
        """Return whether a request without a key is rejected now."""
        return self._keys_required or self._keys.required

    def admit(self, authorization: str | None, address: str) -> Caller:
        """Authenticate a request and count it against the caller's rate.

        Args:
            authorization: value of the header.
            address: IP address of the peer.

        Raises:
            ApiError: invalid_api_key, or rate_limit_exceeded.
        """
        key = self._find_key(authorization)
        if key is None:
            client = f"address:{get_network(address)}"
            # Wrong keys also count against the address's rate, so that guessing is not free.
            self._take(client, self._requests_per_minute)
            if self.needs_keys():
                raise errors.invalid_api_key()
            return Caller(client, None, self._requests_per_minute, self._tokens_per_day)
        rate = key.requests_per_minute or self._requests_per_minute
        self._take(f"key:{key.name}", rate)
        quota = key.tokens_per_day or self._tokens_per_day
        return Caller(f"key:{key.name}", key.name, rate, quota)

    def check_key(self, authorization: str | None, address: str) -> None:
        """Reject a request without the key that it needs, as `admit` does; any other counts for nothing yet.

        Raises:
            ApiError: invalid_api_key, or rate_limit_exceeded.
        """
        if self.needs_keys() and self._find_key(authorization) is None:
            self.admit(authorization, address)

    def count_further(self, caller: Caller, requests: int) -> None:
        """Count the further prompts of one request against the caller's rate.

        Raises:
            ApiError: rate_limit_exceeded.
        """
        for _ in range(requests):
            self._take(caller.client, caller.requests_per_minute)

    def reserve(self, caller: Caller, tokens: int) -> None:
        """Reserve the most tokens (prompt and answer) that a request can use; call `settle` afterwards.

        Raises:
            ApiError: insufficient_quota; nothing is reserved then.
        """
        if caller.tokens_per_day is None:
            return
        wait_s = self._quotas.reserve(caller.client, tokens, caller.tokens_per_day)
        if wait_s > 0:
            left = max(0, caller.tokens_per_day - self._quotas.used(caller.client))
            raise errors.insufficient_quota(tokens, left, caller.tokens_per_day, wait_s)

    def settle(self, caller: Caller, reserved: int, used: int) -> None:
        """Release what was reserved but not used."""
        if caller.tokens_per_day is not None:
            self._quotas.settle(caller.client, reserved, used)

    def _find_key(self, authorization: str | None) -> Key | None:
        scheme, _, token = (authorization or "").partition(" ")
        return self._keys.find(token.strip()) if scheme.lower() == "bearer" else None

    def _take(self, client: str, requests_per_minute: int | None) -> None:
        if requests_per_minute is None:
            return
        wait_s = self._rates.take(client, requests_per_minute)
        if wait_s > 0:
            raise errors.rate_limit_exceeded(wait_s)


def get_network(address: str) -> str:
    """Return what counts as one client: an IPv4 address, or the /64 of an IPv6 address (one customer's)."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"  # a Unix socket or a proxy's name: all of them count as one client
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
