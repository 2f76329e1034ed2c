"""Take the pictures of the playground again, from a service that runs with a challenger.

Reads nothing; writes playground-light.png and playground-dark.png next to this file.

    python docs/images/playground.py http://127.0.0.1:3000/ "dim the string bulbs in the hallway"

The last question is the one in the picture, so take one that the two versions answer differently.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, expect, sync_playwright

FOLDER = Path(__file__).parent
BEFORE = ("set a timer for 12 minutes", "turn on the kitchen lights")
SIZE = {"width": 1200, "height": 800}


def take(browser: Browser, url: str, questions: list[str], scheme: str) -> None:
    """Ask the questions one after the other and write the picture of the last answers."""
    page = browser.new_page(
        color_scheme=scheme, viewport=SIZE, device_scale_factor=1.5, reduced_motion="reduce"
    )
    page.goto(url)
    for question in questions:
        expect(page.locator("#send")).to_have_attribute("aria-disabled", "false")
        page.get_by_label("Your question").fill(question)
        page.keyboard.press("Enter")
        page.locator("#current .panel[data-state=done]").last.wait_for()
        expect(page.locator("#stop")).to_be_hidden()
    page.get_by_role("button", name="Good answer").first.click()
    page.get_by_text("Saved, thank you").wait_for()
    path = FOLDER / f"playground-{scheme}.png"
    part = path.with_name(path.name + ".part")
    part.write_bytes(page.screenshot(full_page=True))
    os.replace(part, path)
    page.close()


def main(url: str, question: str) -> None:
    """Take both pictures."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for scheme in ("light", "dark"):
            take(browser, url, [*BEFORE, question], scheme)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
