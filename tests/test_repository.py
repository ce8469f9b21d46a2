"""What the repository is made of, and that its parts agree with one another."""

import pkgutil
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import homegptd

ROOT = Path(homegptd.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

TOP_LEVEL = {
    ".ci", ".gitignore", "CHANGELOG.md", "LICENSE", "Makefile", "README.md", "bench", "docs", "etc",
    "homegptd", "pyproject.toml", "quadlet", "systemd", "tests", "vllm-logging.json",
}  # fmt: skip


def tracked() -> list[str]:
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        listed = subprocess.run(git, check=True, capture_output=True, text=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git work tree, or no git")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def test_the_version_is_said_once_and_heard_everywhere() -> None:
    assert "version" in PROJECT["dynamic"]
    assert metadata.version("homegptd") == homegptd.__version__


def test_the_console_scripts_can_be_called() -> None:
    assert set(PROJECT["scripts"]) == {"homegptd", "homegptctl"}
    for target in PROJECT["scripts"].values():
        assert callable(pkgutil.resolve_name(target))


def test_the_top_level_is_as_agreed() -> None:
    assert {name.partition("/")[0] for name in tracked()} <= TOP_LEVEL


def test_the_licence_is_mit() -> None:
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert PROJECT["license"] == {"text": "MIT"}


def test_nothing_is_left_for_later_in_the_sources() -> None:
    marks = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b")
    sources = [name for name in tracked() if not name.endswith((".png", ".svg", ".ico"))]
    left = [
        f"{name}:{number}"
        for name in sources
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1)
        if marks.search(line)
    ]
    assert left == []


def test_the_changelog_has_a_place_for_what_comes() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert headings[0] == "Unreleased"


def test_make_says_what_it_can_do() -> None:
    """Every phony target has its line in `make help`, and README names only targets that exist."""
    text = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY:(.*)$", text, re.MULTILINE)[0].split())
    helped = set(re.findall(r"^([a-z-]+):.*##", text, re.MULTILINE))
    assert helped == phony
    named = set(re.findall(r"(?m)(?:^|`)make ([a-z]+)", (ROOT / "README.md").read_text()))
    assert named <= phony
