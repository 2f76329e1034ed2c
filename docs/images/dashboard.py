"""Take the pictures of the dashboard again, from a checkout that `make up` or `make demo` runs in.

Reads nothing; writes dashboard-light.png and dashboard-dark.png next to this file.

    python docs/images/dashboard.py http://127.0.0.1:8000/
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

FOLDER = Path(__file__).parent
SIZE = {"width": 1200, "height": 800}


def take(browser: Browser, url: str, scheme: str) -> None:
    """Write the picture of the whole page in one colour scheme."""
    page = browser.new_page(
        color_scheme=scheme, viewport=SIZE, device_scale_factor=1, reduced_motion="reduce"
    )
    page.goto(url)
    page.get_by_role("heading", name="At a glance").wait_for()
    path = FOLDER / f"dashboard-{scheme}.png"
    part = path.with_name(path.name + ".part")
    part.write_bytes(page.screenshot(full_page=True))
    os.replace(part, path)
    page.close()


def main(url: str) -> None:
    """Take both pictures."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for scheme in ("light", "dark"):
            take(browser, url, scheme)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
