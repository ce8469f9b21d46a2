"""A user at Open WebUI, in Chromium: nobody told the page anything but what the unit tells it."""

import json
import os
import time
from collections.abc import Callable

import pytest

from tests.contract.subjects import SocketConnection

from .conftest import PYTHON, Desktop

pytestmark = [
    pytest.mark.webui,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="HOMEGPT_WEBUI names no Python (.ci/webui/install)"),
]
_TASK = "### Task:"


def test_an_evening_at_the_page(desktop: Desktop) -> None:
    """One story: what each step leaves is where the next begins."""
    _dots_show_who_is_awake(desktop)
    _a_chat_wakes_its_model_and_says_so(desktop)
    _stop_ends_it_in_the_engine(desktop)
    _going_on_with_another_model_is_one_switch(desktop)
    _stop_while_it_waits_wakes_nobody(desktop)


def _dots_show_who_is_awake(desktop: Desktop) -> None:
    page = desktop.page
    page("new_chat")
    assert page("models") == {"a": True, "b": False}
    page("shot", name="dots")


def _a_chat_wakes_its_model_and_says_so(desktop: Desktop) -> None:
    page = desktop.page
    page("choose", model="b")
    page("say", text="Hello there")
    assert page("until", text=r"\d+ % \(\d+ s left\)").startswith(("Putting a to sleep", "Waking"))
    page("shot", name="waking")
    page("until", text="This is b:")


def _stop_ends_it_in_the_engine(desktop: Desktop) -> None:
    page = desktop.page
    assert any("Hello there" in prompt for prompt in chats(desktop, "b"))
    page("stop")
    until(lambda: not chats(desktop, "b"), 3.0)
    until(lambda: not page("answering"), 10.0)
    assert "b answers after" in page("text")
    page("shot", name="stopped")
    assert desktop.wakes() == ["b"]


def _going_on_with_another_model_is_one_switch(desktop: Desktop) -> None:
    """b's title may still be asked for; nobody switches back for it, or for a's."""
    page = desktop.page
    page("new_chat")
    assert page("models") == {"a": False, "b": True}
    page("choose", model="a")
    page("say", text="And hello to you")
    page("until", text="This is a:", seconds=400)
    until(lambda: not page("answering"), 60.0)
    page("shot", name="second")
    assert "And hello to you" in page("text")
    assert "% (" not in page("text")
    assert desktop.wakes() == ["b", "a"]


def _stop_while_it_waits_wakes_nobody(desktop: Desktop) -> None:
    """The last chat's title is being written on a, so b must wait; then nobody wants it."""
    page = desktop.page
    page("new_chat")
    page("choose", model="b")
    before = len(desktop.log())
    page("say", text="Never mind")
    page("until", text=r"(Putting a to sleep|Waking b|waits|left)")
    page("stop")
    until(lambda: not page("answering"), 10.0)
    until(lambda: all(m["requests"]["waiting"] == 0 for m in desktop.box.status()["models"]), 10.0)
    assert not chats(desktop, "b")
    page("shot", name="never-mind")
    assert not [line for line in desktop.log()[before:] if "refused" in line and "Never" in line]


def chats(desktop: Desktop, model: str) -> list[str]:
    """What the engine is asked at this moment, by its own word, but for titles and the like."""
    path = desktop.box.root / "engines" / model / "engine.sock"
    connection = SocketConnection(path, timeout=10.0)
    connection.request("GET", "/sim/state")
    prompts = json.load(connection.getresponse())["prompts"]
    connection.close()
    return [prompt for prompt in prompts if _TASK not in prompt]


def until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds * float(os.environ.get("HOMEGPT_PATIENCE", "1"))
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
