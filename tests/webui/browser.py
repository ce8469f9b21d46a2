"""Chromium on Open WebUI, led by lines of JSON: browser.py URL TOKEN DIRECTORY-FOR-PICTURES.

Runs in the environment of `.ci/webui/install`. What the page looks like is known here alone.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE_MS = 30_000


class Browser:
    def __init__(self, page: Page, url: str, shots: Path) -> None:
        self.page, self.url, self.shots = page, url, shots

    def act(self, order: dict[str, Any]) -> Any:
        return getattr(self, order.pop("act"))(**order)

    def shot(self, name: str) -> None:
        self.page.screenshot(path=str(self.shots / f"{name}.png"))

    def html(self, name: str) -> None:
        (self.shots / f"{name}.html").write_text(self.page.content())

    def new_chat(self) -> None:
        self.page.goto(self.url)
        self.page.locator("#chat-input").wait_for()

    def models(self) -> dict[str, bool]:
        """Every model of the selector, and whether it has the dot of a loaded one."""
        self._open_selector()
        entries = self.page.locator("#model-selector-list [role=option]")
        entries.first.wait_for()
        return {
            entry.get_attribute("data-value"): entry.locator(".bg-green-500").count() > 0
            for entry in entries.all()
        }

    def choose(self, model: str) -> None:
        self._open_selector()
        self.page.locator(f"[data-value='{model}']").first.click()

    def _open_selector(self) -> None:
        button = self.page.locator("#model-selector-model-button")
        if button.get_attribute("aria-expanded") != "true":
            button.click()

    def say(self, text: str) -> None:
        box = self.page.locator("#chat-input")
        box.click()
        self.page.keyboard.insert_text(text)
        self.page.keyboard.press("Enter")

    def until(self, text: str, seconds: float = 30) -> str:
        """Until the page shows something that fits; what it was."""
        found = self.page.get_by_text(re.compile(text)).last
        found.wait_for(timeout=seconds * 1000)
        return found.inner_text()

    def stop(self) -> None:
        self.page.get_by_role("button", name="Stop").click()

    def answering(self) -> bool:
        return self.page.get_by_role("button", name="Stop").count() > 0

    def text(self) -> str:
        return self.page.locator("#messages-container").inner_text()


def main(kind: type[Browser]) -> None:
    url, token, shots = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        context = chromium.new_context(viewport={"width": 1280, "height": 800})
        context.add_init_script(f"localStorage.setItem('token', {json.dumps(token)})")
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        news = page.get_by_role("button", name="Okay, Let's Go!")  # comes at some moment, once
        page.add_locator_handler(news, lambda button: button.click())
        browser = kind(page, url, shots)
        for line in sys.stdin:
            try:
                answer = {"result": browser.act(json.loads(line))}
            except Exception as error:  # noqa: BLE001 - the other side must hear of it
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)
        chromium.close()


if __name__ == "__main__":
    main(Browser)
