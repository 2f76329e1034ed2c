"""A page that shows some rows as the model reads them, with what is learned in colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Any

from stages.common.chat.control_tokens import read_control_tokens
from stages.common.chat.template import Encoded
from stages.common.page.shared import read_tokens
from stages.common.records import Row

# Nothing runs and nothing is loaded, whatever the rows hold.
HEAD = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>What is learned</title>
<style>
{read_tokens()}
body {{ font: 15px/1.5 var(--sans); background: var(--ground); color: var(--ink); }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
.row {{ font-family: var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; padding: 1rem; }}
.row {{ background: var(--sunken); color: var(--soft); }}
details {{ display: inline; }}
summary {{ display: inline; cursor: pointer; text-decoration: underline dotted; }}
details[open] > summary {{ display: block; }}
.learned {{ background: var(--tint); color: var(--accent-strong); }}
.control {{ border: 1px solid var(--edge); border-radius: 3px; }}
.learned.control {{ border-color: var(--accent-strong); font-weight: bold; }}
</style>
<main>
<h1>What is learned</h1>
<p>Each row as the model reads it. <span class="learned">Green</span> is learned: each answer and the end of
its turn. <span class="control">Framed</span> are control tokens: only the chat template writes them. The same
letters in a text of yours have no frame. Long texts that are not learned, such as descriptions of tools, are
folded: choose the underlined line to read them.</p>
"""
MAX_UNFOLDED = 800  # characters of a text that is not learned
BEGINNING = 120  # characters of a folded text that stay to be seen


def find_spans(tokenizer: Any, example: Encoded) -> Iterator[tuple[str, bool, bool]]:
    """Yield the pieces of a row, each with whether it is learned and whether it is a control token."""
    control = set(read_control_tokens(tokenizer).ids.values())
    learned_places = {place for start, end in example.learned for place in range(start, end)}
    marked = [
        (token, place in learned_places, token in control, place if token in control else -1)
        for place, token in enumerate(example.input_ids)
    ]
    for (learned, is_control, _), tokens in groupby(marked, key=lambda m: (m[1], m[2], m[3])):
        ids = [token[0] for token in tokens]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield text, learned, is_control


def render_page(tokenizer: Any, rows: Sequence[tuple[Row, Encoded]]) -> str:
    """Return the page of these rows as HTML."""
    parts = [HEAD]
    for row, example in rows:
        parts.append(
            f"<h2>Row {escape(row.id)}</h2>\n<p>{escape(row.source)}: {len(example.input_ids)} tokens, "
            f'{example.learned_count} of them learned.</p>\n<div class="row">'
        )
        for text, is_learned, is_control in find_spans(tokenizer, example):
            parts.append(_render_piece(text, is_learned, is_control))
        parts.append("</div>\n")
    return "".join([*parts, "</main></html>\n"])


def _render_piece(text: str, is_learned: bool, is_control: bool) -> str:
    """Return a piece of a row as HTML; a long one that is not learned is folded behind its beginning."""
    classes = " ".join(["learned"] * is_learned + ["control"] * is_control)
    if classes:
        return f'<span class="{classes}">{escape(text)}</span>'
    if len(text) <= MAX_UNFOLDED:
        return escape(text)
    seen, folded = text[:BEGINNING], text[BEGINNING:]
    summary = f"<summary>… {len(folded):,} more characters</summary>"
    return f"{escape(seen)}<details>{summary}{escape(folded)}</details>"
