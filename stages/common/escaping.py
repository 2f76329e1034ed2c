"""Putting any text into a Markdown page."""

from __future__ import annotations

import re


def format_code(text: str, limit: int = 160) -> str:
    """Return text as a code span that is safe in a Markdown table, cut after `limit` characters."""
    text = re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ⏎ ", text.strip())
    text = re.sub(r"[\x00-\x1f\x7f]", " ", text)
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    if not text:
        return "(nothing)"
    # A fence longer than any run of backticks inside; a pipe would end the cell even in code.
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    escaped = text.replace("|", "\\|")
    return f"{fence}{pad}{escaped}{pad}{fence}"
