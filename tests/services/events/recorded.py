"""Exchanges as the service records them; in a module of its own, which a process imports quickly."""

from dataclasses import replace

from tests import exchanges

# With a key, a time and a duration that no float32 could hold.
EXCHANGE = replace(
    exchanges.EXCHANGE,
    received_at=1000.25,
    key_id="k1",
    session="s1",
    messages='[{"role": "user", "content": "light on"}]',
    parameters='{"max_tokens": 9}',
    total_s=1 / 3,
    decisions='{"injection": [true, null]}',
)


def exchange(number, **changes):
    """Return the exchange of this number."""
    return replace(EXCHANGE, request_id=f"r{number}", received_at=1000.0 + number, **changes)
