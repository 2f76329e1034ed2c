"""The files that all HTML pages share: colours and fonts, the frame of the two live pages, and the icon."""

from pathlib import Path

PAGE_FILES = Path(__file__).parent / "files"


def read_tokens() -> str:
    """Return the CSS of the colours and fonts, for a page that has to be one file."""
    return (PAGE_FILES / "tokens.css").read_text(encoding="utf-8")
