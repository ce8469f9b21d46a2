"""Chromium on the dashboard; called as `browser.py` is, with a token that says nothing here.

What the page looks like is known here alone.
"""

import re
from typing import Any

from browser import Browser, main


class Dashboard(Browser):
    said: list[str]

    def open(self) -> None:
        self.said = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(self.url)

    def complaints(self) -> list[str]:
        """What the browser had to say of the page: errors, and what its policy kept out."""
        return self.said

    def text_of(self, part: str) -> str:
        """Of a part of the page, by its id: summary, link, now, places, lines, who."""
        return self.page.locator(f"#{part}").inner_text()

    def part_until(self, part: str, text: str, seconds: float = 30) -> str:
        found = self.page.locator(f"#{part}", has_text=re.compile(text))
        found.wait_for(timeout=seconds * 1000)
        return found.inner_text()

    def models(self) -> dict[str, dict[str, str]]:  # type: ignore[override]
        """The table: for each model its cells, by their headings."""
        self.page.locator("tr.model").first.wait_for()
        headings = self.page.get_by_role("columnheader").all_inner_texts()
        rows = [row.locator("td").all_inner_texts() for row in self.page.locator("tr.model").all()]
        return {row[0].split()[0]: dict(zip(headings, row, strict=True)) for row in rows}

    def bars(self) -> dict[str, list[str]]:
        """What each bar is made of, by the name of its place."""
        places = self.page.locator(".place").all()
        return {
            place.locator("h3").inner_text(): [
                part.get_attribute("class") for part in place.locator(".bar i").all()
            ]
            for place in places
        }

    def plan(self, model: str) -> str:
        """Open the plan of a switch with the keyboard alone; what it says."""
        button = self.page.get_by_role("button", name=f"a switch to {model}:")
        button.focus()
        self.page.keyboard.press("Enter")
        assert button.get_attribute("aria-expanded") == "true"
        shown = self.page.locator(f'[id="plan-{model}"]')
        shown.get_by_text(re.compile("a switch to|nothing to do")).wait_for()
        return shown.inner_text()

    def can_switch(self, model: str) -> bool:
        return self.page.get_by_role("button", name=f"Switch to {model}", exact=True).is_visible()

    def switch(self, model: str) -> None:
        self.page.get_by_role("button", name=f"Switch to {model}", exact=True).click()

    def show_key(self, key: str) -> None:
        self.page.get_by_label(re.compile("API key|This box")).fill(key)
        self.page.get_by_role("button", name="Show the box").click()

    def asks_for_key(self) -> bool:
        self.page.locator("#door").wait_for()
        return not self.page.locator("#box").is_visible()

    def evaluate(self, script: str) -> Any:
        return self.page.evaluate(script)

    def look(self, name: str, width: int, height: int, scheme: str) -> bool:
        """A picture at that size; whether all of it fits the width."""
        self.page.emulate_media(color_scheme=scheme)
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=str(self.shots / f"{name}.png"), full_page=True)
        return self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


if __name__ == "__main__":
    main(Dashboard)
