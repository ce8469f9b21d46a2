"""The dashboard's page: what it may run, that nothing of the box is in it, and that it ships."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import pytest

from homegptd.faces import dashboard, http
from homegptd.faces.clients import Keyring
from homegptd.faces.guard import Guard

from . import box


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Path]:
    return {"chat": tmp_path / "chat", "coder": tmp_path / "coder"}


async def test_the_page_is_for_everybody_and_holds_nothing(two: dict[str, Path]) -> None:
    async with box.running(two, guard=Guard(keys=Keyring())) as b:
        page = await b.ask("/", method="GET", more="Host: evil.example\r\n")
        head = await b.ask("/", method="HEAD")
        assert (await b.ask("/", {})).status == 405
        assert (await b.ask("//", method="GET")).status == 404
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.body.decode() == dashboard.assembled()[0]
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-security-policy"] == page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"


async def test_the_policy_lets_in_the_page_s_own_parts_and_nothing_else(
    two: dict[str, Path],
) -> None:
    async with box.running(two) as b:
        page = await b.ask("/", method="GET")
    policy = dict(
        part.split(" ", 1) for part in page.headers["content-security-policy"].split("; ")
    )
    text = page.body.decode()
    for tag, which in (("script", "script-src"), ("style", "style-src")):
        (inside,) = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", text, re.DOTALL)
        own = b64encode(sha256(inside.encode()).digest()).decode()
        assert policy[which] == f"'sha256-{own}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"


def test_the_page_is_one_piece_without_handlers_in_its_html() -> None:
    text, _ = dashboard.assembled()
    html = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    assert not re.search(r"\s(on\w+|style)=", html)
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert "<!--" not in text


def test_it_ships_with_the_package() -> None:
    root = Path(http.__file__).parents[2]
    wheel, deb = (root / "pyproject.toml").read_text(), (root / "systemd/install").read_text()
    for kind in (".html", ".css", ".js"):
        assert f'"faces/dashboard{kind}"' in wheel
        assert f"'*{kind}'" in deb
