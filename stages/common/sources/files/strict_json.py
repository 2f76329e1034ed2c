"""JSON in which nothing is lost: a key that was given twice, and a number that is not finite, are found."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class RepeatedKeys(dict[str, Any]):
    """An object in which `key` was given twice; the last value counts, as for every reader of JSON."""

    key: str


def keep_repeated(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object of its pairs; the hook of `json.loads`."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    marked = RepeatedKeys(found)
    keys = [key for key, _ in pairs]
    marked.key = next(key for place, key in enumerate(keys) if key in keys[:place])
    return marked


def decode_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=keep_repeated)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_list(value: Any) -> list[Any] | None:
    """Return a list, or that of its JSON text; None if it is neither."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return None
        try:
            value = decode_json(value)
        except ValueError:
            return None
    return value if isinstance(value, list) else None


def encode_json(value: Any) -> str:
    """Return the JSON text of a value, in the order of its keys.

    Raises:
        ValueError: a key was given twice, a number is not finite, or a value is of a kind that JSON lacks.
    """
    if problem := _find_problem(value):
        raise ValueError(problem)
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except TypeError as error:
        raise ValueError(str(error)) from None


def find_repeated_key(value: Any) -> str | None:
    """Return a key that was given twice in an object of a decoded value, or None."""
    return next((part.key for part in _walk(value) if isinstance(part, RepeatedKeys)), None)


def _find_problem(value: Any) -> str | None:
    """Return which key is there twice or which number is not finite."""
    for part in _walk(value):
        if isinstance(part, RepeatedKeys):
            return f"the key {part.key!r} is there twice"
        if isinstance(part, float) and not math.isfinite(part):
            return f"the number {part} is not finite"
    return None


def _walk(value: Any) -> Iterator[Any]:
    """Yield a value and all that is in it; with a stack, as JSON may be deep."""
    left = [value]
    while left:
        part = left.pop()
        yield part
        if isinstance(part, Mapping):
            left.extend(part.values())
        elif isinstance(part, list | tuple):
            left.extend(part)
