import re
from pathlib import Path

import pytest

from stages.common.page.shared import PAGE_FILES, read_tokens

ROOT = Path(__file__).parents[4]
STYLED = [
    *sorted((ROOT / "services/api/page").glob("*.css")),
    *sorted((ROOT / "flows/dashboard/page").glob("*.css")),
    PAGE_FILES / "base.css",
    ROOT / "stages/validate/page.html.j2",
    ROOT / "stages/preflight/page.py",
]


@pytest.mark.parametrize("path", STYLED, ids=lambda path: path.name)
def test_a_page_takes_its_colours_and_fonts_from_the_tokens(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"#[0-9a-fA-F]{3,8}[;\s}]|rgba?\(|sans-serif|monospace", text)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used and used <= set(re.findall(r"(--[\w-]+):", read_tokens()))


def test_every_colour_has_a_value_for_the_dark_scheme():
    light, dark = read_tokens().split("@media (prefers-color-scheme: dark)")
    names = set(re.findall(r"(--[\w-]+):", light)) - {"--sans", "--mono"}
    assert names == set(re.findall(r"(--[\w-]+):", dark))
