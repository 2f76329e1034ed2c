"""Escape text of users for pages, plots, tables and messages: one function for each format.

Nothing that comes out of them runs, is laid out, links or calls anyone. They are for one value; the text
around it is ours.
"""

from __future__ import annotations

import re

_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")
# Reorder what comes after them: a text could look like another one.
_DIRECTIONS = re.compile(r"[\u202a-\u202e\u2066-\u2069]")
_FORMULA = tuple("=+-@＝＋－＠")
# Where another cell begins if a spreadsheet takes another separator than the comma; possessive, so linear.
_SEPARATORS = re.compile(r"[;|\t\r\n][;|\s\"]*+")
_LOOK_ALIKES = str.maketrans({"<": "‹", ">": "›"})


def clean_line(text: str) -> str:
    """Return text as one line without control characters, for a terminal or a log."""
    text = _CONTROLS.sub(" ", _BREAKS.sub(" ⏎ ", text))
    return _SURROGATES.sub("\ufffd", _DIRECTIONS.sub("", text))


def format_code(text: str, limit: int = 160) -> str:
    """Return text as a code span that is safe in a Markdown table, cut after `limit` characters."""
    text = clean_line(text.strip())
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    if not text:
        return "(nothing)"
    # A fence longer than any run of backticks inside; a pipe would end the cell even in code.
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    escaped = text.replace("|", "\\|")
    return f"{fence}{pad}{escaped}{pad}{fence}"


def escape_markdown(text: str) -> str:
    """Return text for a line or a table cell of Markdown: no markup, no HTML, no link, no formula."""
    text = re.sub(r"([\\`*\[\]<>|~$&#!])", r"\\\1", clean_line(text))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside of a word it is no markup
    return _defang(text)


def escape_mathtext(text: str) -> str:
    """Return text so that matplotlib draws it as it is: `$...$` would be a formula, and a control no SVG."""
    return clean_line(text).replace("$", r"\$")


def escape_widget(text: str) -> str:
    """Return text for Evidently's and Prefect's tables and charts, which take some HTML and Markdown.

    They have no escape of their own, so `<` and `>` become the letters ‹ and ›.
    """
    return _defang(clean_line(text).translate(_LOOK_ALIKES).replace("](", "] ("))


def escape_message(text: str) -> str:
    """Return text for a mail or a chat, line by line: no HTML, no link, no one is called by `@`."""
    lines = (escape_widget(line) for line in text.splitlines())
    return "\n".join(re.sub(r"@(?=\w)", "＠", line) for line in lines)


def escape_csv_cell(text: str) -> str:
    """Return text for a cell of CSV: a spreadsheet would compute what begins like a formula.

    So would one that separates cells at semicolons, bars, tabs or line ends: no quotes keep it from that.
    """
    text = _SURROGATES.sub("\ufffd", text.replace("\0", " "))
    begins = text.lstrip()[:1] in _FORMULA or text[:1] in ("\t", "\r", "\n")
    text = _SEPARATORS.sub(lambda found: found[0] + "'" * text.startswith(_FORMULA, found.end()), text)
    return f"'{text}" if begins else text


def escape_script_json(line: str) -> str:
    """Return a line of a script that holds JSON so that no string in it can end the script."""
    return line.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _defang(text: str) -> str:
    """Return text in which no program finds an address to link to."""
    return re.sub(r"\b(www)\.", r"\1[.]", text.replace("://", "[:]//"), flags=re.IGNORECASE)
