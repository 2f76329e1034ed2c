"""What is stored of a text that is too long: its length, and a hash by which equal ones are recognised.

One thread redacts and writes all events. A megabyte in one of them would keep all others waiting for seconds.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

MAX_STORED_CHARS = 65_536  # as many as a schema may have
MIN_HASHED_CHARS = 1000  # a shorter text, such as a phone number, could be guessed from its hash


def limit_size(value: Any) -> Any:
    """Return a JSON value as it is; if it has more than `MAX_STORED_CHARS`, outlines of it or its items."""
    text = _write(value)
    if len(text) <= MAX_STORED_CHARS:
        return value
    return [outline(_write(one)) for one in value] if isinstance(value, list) else outline(text)


def outline(text: str) -> str:
    """Return the length of a text, and the hash of one that is too long to be guessed."""
    if len(text) < MIN_HASHED_CHARS:
        return f"[{len(text)} characters]"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"[{len(text)} characters, hashed {digest}]"


def _write(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
