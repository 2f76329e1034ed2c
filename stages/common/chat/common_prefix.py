"""The tokens with which prompts begin alike: the system prompt, the tools, the head of the template."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def count_common_prefix(rows: Iterable[Sequence[int]]) -> int:
    """Return with how many equal tokens all rows begin; they are read one by one, and may be many."""
    shared: list[int] | None = None
    for row in rows:
        if shared is None:
            shared = list(row)
        del shared[len(row) :]
        if shared != list(row[: len(shared)]):
            del shared[next(place for place, token in enumerate(shared) if token != row[place]) :]
    return len(shared or ())
