"""Take the pictures of the playground with calls of tools again, from a service with a model of `TASK=tools`.

Reads nothing; writes playground-tools-light.png and playground-tools-dark.png next to this file.

    python docs/images/playground_tools.py http://127.0.0.1:3000/ \\
        "turn on all garden floor lights" '{"ok":true}' "the candelabra alone"

The call of the first question gets the result; that of the second is in correction.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

FOLDER = Path(__file__).parent
SIZE = {"width": 900, "height": 800}
WAIT_MS = 120_000


def ask(page: Page, question: str, answers: int) -> None:
    """Ask a question and wait until there are so many answers."""
    expect(page.locator("#send")).to_have_attribute("aria-disabled", "false", timeout=WAIT_MS)
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")
    expect(page.locator("#current .panel[data-state=done]")).to_have_count(answers, timeout=WAIT_MS)


def take(browser: Browser, url: str, first: str, result: str, second: str, scheme: str) -> None:
    """Hold the conversation and write the picture."""
    page = browser.new_page(
        color_scheme=scheme, viewport=SIZE, device_scale_factor=1.5, reduced_motion="reduce"
    )
    page.goto(url)
    ask(page, first, 1)
    page.locator("#current .result textarea").first.fill(result)
    page.get_by_role("button", name="Send the result").click()
    expect(page.locator("#current .panel[data-state=done]")).to_have_count(2, timeout=WAIT_MS)
    ask(page, second, 3)
    page.get_by_role("button", name="Correct this call").last.click()
    path = FOLDER / f"playground-tools-{scheme}.png"
    part = path.with_name(path.name + ".part")
    part.write_bytes(page.screenshot(full_page=True))
    os.replace(part, path)
    page.close()


def main(url: str, first: str, result: str, second: str) -> None:
    """Take both pictures."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for scheme in ("light", "dark"):
            take(browser, url, first, result, second, scheme)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
