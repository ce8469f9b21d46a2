"""Somebody at the dashboard, in Chromium, in front of a real daemon with simulated models."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from homegptd.host import keys
from tests.e2e.harness import Box, SimModel

from .conftest import PYTHON, Page, browser

pytestmark = [
    pytest.mark.webui,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not PYTHON, reason="HOMEGPT_WEBUI names no Python (.ci/webui/install)"),
]
_SLOW = ("--sim-pcie-gbps", "1", "--sim-pin-gbps", "4")
_NAME = "<img src=x onerror=alert(1)>"
_MODELS = (
    SimModel("small", "active", weights_gb=4, awake_gb=9, extra="    pinned: true\n"),
    SimModel("a", "active", weights_gb=20, awake_gb=50, flags=_SLOW),
    SimModel("b", weights_gb=20, awake_gb=55, flags=_SLOW, extra=f"    name: '{_NAME}'\n"),
    SimModel("broken", weights_gb=1, awake_gb=2, command="[/bin/false]"),
)


def card(box: Box, *words: str) -> None:
    program = [sys.executable, "-m", "homegptd.sim", "card", str(box.card), *words]
    subprocess.run(program, check=True, capture_output=True)


@pytest.fixture
def box() -> Iterator[Box]:
    root = Path(tempfile.mkdtemp(prefix="hg-", dir="/tmp"))
    yield Box(root, speed=20.0)
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def page(box: Box) -> Iterator[Page]:
    shots = Path(os.environ.get("HOMEGPT_SHOTS", box.root))
    shots.mkdir(exist_ok=True)
    with browser("dashboard.py", f"{box.url}/", "", shots) as page:
        yield page


def test_an_evening_at_the_dashboard(box: Box, page: Page) -> None:
    """One story: what each step leaves is where the next begins."""
    box.write(*_MODELS)
    with box.daemon("--card-file", str(box.card)) as daemon:
        daemon.ready(60.0)
        page("open")
        _models_and_bars(page)
        _a_refusal_shows_its_sum(box, page)
        _a_switch_is_seen_before_and_followed(page)
        _the_page_takes_no_other_script(page)
        _it_fits(page)
        daemon.terminate()
    _the_daemon_is_gone_and_comes_back(box, page)


def _models_and_bars(page: Page) -> None:
    page("part_until", part="link", text="live")
    models = page("models")
    assert models["a"]["State"] == "● awake"
    assert models["b"]["State"] == "○ asleep L1"
    assert _NAME in models["b"]["Model"]
    assert "pinned" in models["small"]["Model"]
    broken = page("part_until", part="rows", text="✗ failed")  # each try begins anew
    assert 'cannot start "broken"' in broken
    assert "homegptctl logs broken" in broken
    page("part_until", part="summary", text="degraded: ")
    bars = page("bars")
    assert bars["GPU 0"] == ["awake-fill", "awake-fill", "residue-fill"]
    assert set(bars["RAM"]) == {"host-fill", "pinned-fill"}
    assert "b 1.1 residue" in page("text_of", part="places")


def _a_refusal_shows_its_sum(box: Box, page: Page) -> None:
    page("plan", model="b")
    assert page("can_switch", model="b")
    card(box, "--hold", "game=16")
    page("part_until", part="places", text=r"others 1\d\.\d \(game 16\.0 GB\)")
    assert "foreign-fill" in page("bars")["GPU 0"]
    plan = page("part_until", part="plan-b", text="a switch to b is not possible now")
    assert "on gpu0; 80.0 total \u2212 9.1 pinned small" in plan
    assert "held by game" in plan
    assert not page("can_switch", model="b")
    page("shot", name="refused")
    card(box, "--release", "game")
    page("part_until", part="plan-b", text="a switch to b takes 2 steps")


def _a_switch_is_seen_before_and_followed(page: Page) -> None:
    plan = page("text_of", part="plan-b")
    assert "1. sleep a" in plan
    assert "2. wake b" in plan
    assert "GB on gpu0; 80.0 total" in plan
    page("switch", model="b")
    going = page("part_until", part="now", text="▸ sleep a .* of about")
    assert "switch b asked by http 127.0.0.1" in going
    page("shot", name="switching")
    done = page("part_until", part="now", text="done after")
    assert "✓ wake b" in done
    page("part_until", part="lines", text="b is awake")
    models = page("models")
    assert (models["a"]["State"], models["b"]["State"]) == ("○ asleep L1", "● awake")
    assert not page("can_switch", model="b")


def _the_page_takes_no_other_script(page: Page) -> None:
    assert page("complaints") == []
    for attempt in (
        "document.body.innerHTML = '<b>x</b>'",
        "document.createElement('script').src = '/openapi.json'",
        "document.createElement('script').text = 'alert(1)'",
    ):
        tried = f"() => {{ try {{ {attempt}; }} catch (error) {{ return error.name; }} }}"
        assert page("evaluate", script=tried) == "TypeError", attempt
    elsewhere = """() => new Promise((go) => {
        addEventListener('securitypolicyviolation', (event) => go(event.effectiveDirective));
        fetch('http://127.0.0.1:1/').catch(() => {}); })"""
    assert page("evaluate", script=elsewhere) == "connect-src"


def _it_fits(page: Page) -> None:
    for name, width, height in (("desktop", 1280, 900), ("phone", 390, 844), ("wall", 1920, 1080)):
        for scheme in ("light", "dark"):
            assert page("look", name=f"{name}-{scheme}", width=width, height=height, scheme=scheme)


def _the_daemon_is_gone_and_comes_back(box: Box, page: Page) -> None:
    page("part_until", part="link", text="the daemon does not answer; trying again")
    assert page("look", name="gone", width=1280, height=900, scheme="light")
    with box.daemon() as daemon:
        page("part_until", part="link", text="live")
        daemon.terminate()


def test_where_keys_are_asked_for(box: Box, page: Page) -> None:
    path = box.root / "api-keys.yaml"
    box.write(*_MODELS[:3], head=f"http: {{keys: {path}}}\n")
    owner = keys.add(path, keys.Wish("owner", manage=True))
    guest = keys.add(path, keys.Wish("guest", models=("a",)))
    with box.daemon() as daemon:
        daemon.ready(60.0)
        page("open")
        _a_guest_sees_its_models_and_no_switch(page, guest)
        _the_owner_may_switch(page, owner)


def _a_guest_sees_its_models_and_no_switch(page: Page, key: str) -> None:
    assert page("asks_for_key")
    page("shot", name="key")
    page("show_key", key="hg-wrong")
    assert "not known here" in page("part_until", part="denied", text="key")
    page("show_key", key=key)
    page("part_until", part="link", text="live")
    assert set(page("models")) == {"a"}
    assert "a is awake" in page("plan", model="a")
    assert "key guest" in page("text_of", part="who")
    assert not page("can_switch", model="a")
    assert "another model" in page("text_of", part="places")
    page("shot", name="guest")


def _the_owner_may_switch(page: Page, key: str) -> None:
    page("evaluate", script="sessionStorage.clear()")
    page("open")
    assert page("asks_for_key")
    page("show_key", key=key)
    page("part_until", part="link", text="live")
    page("plan", model="b")
    assert page("can_switch", model="b")
    kept = page("evaluate", script="location.href + JSON.stringify({...localStorage})")
    assert key not in kept
