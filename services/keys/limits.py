"""Request rates and daily token quotas, counted in memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

MINUTE_NS = 60_000_000_000
DAY_S = 86_400


class RateLimit:
    """A token bucket per client, stored as one number (GCRA, ITU-T I.371).

    A bucket holds `burst` requests and is refilled evenly. Above `max_clients` the least recently seen client
    is evicted, which bounds the memory that a flood of addresses can use. An evicted client starts with a
    full bucket.
    """

    def __init__(self, max_clients: int, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._max_clients = max_clients
        self._clock_ns = clock_ns
        self._full_at_ns: OrderedDict[str, int] = OrderedDict()  # when each client's bucket is full again

    def take(self, client: str, requests_per_minute: int, burst: int | None = None) -> float:
        """Take one request from the client's bucket; return 0.0, or the seconds until one is available.

        A rejected request takes nothing. `burst` defaults to the requests of one minute.
        """
        now_ns = self._clock_ns()
        each_ns = -(-MINUTE_NS // requests_per_minute)  # rounded up to whole nanoseconds: waits are exact
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
    """Tokens per client since midnight UTC.

    A request reserves the most it can use before it runs and settles afterwards, so that concurrent requests
    cannot exceed the quota together.
    """

    def __init__(self, max_clients: int, clock_s: Callable[[], float] = time.time) -> None:
        self._max_clients = max_clients
        self._clock_s = clock_s
        self._day = 0
        self._used: OrderedDict[str, int] = OrderedDict()

    def reserve(self, client: str, tokens: int, tokens_per_day: int) -> float:
        """Reserve `tokens`; return 0.0, or the seconds until midnight if fewer are left."""
        now_s = self._clock_s()
        self._start_day(now_s)
        if self.used(client) + tokens > tokens_per_day:
            return DAY_S - now_s % DAY_S
        self._add(client, tokens)
        return 0.0

    def settle(self, client: str, reserved: int, used: int) -> None:
        """Release what was reserved but not used."""
        self._start_day(self._clock_s())
        self._add(client, used - reserved)

    def used(self, client: str) -> int:
        """Return the tokens that the client has used or reserved today."""
        self._start_day(self._clock_s())
        return self._used.get(client, 0)

    def _add(self, client: str, tokens: int) -> None:
        # Would be negative where tokens were reserved before midnight and settled after it.
        self._used[client] = max(0, self._used.pop(client, 0) + tokens)
        if len(self._used) > self._max_clients:
            self._used.popitem(last=False)

    def _start_day(self, now_s: float) -> None:
        day = int(now_s // DAY_S)
        if day != self._day:
            self._day = day
            self._used.clear()
