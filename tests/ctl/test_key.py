"""`homegptctl key`: what it prints where, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from homegptd.config.keys import digest, load
from homegptd.ctl.__main__ import main

from .conftest import Daemon

Ctl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ctl(tmp_path: Path, socket_path: str, capsys: pytest.CaptureFixture[str]) -> Ctl:
    def run(*words: str) -> tuple[int, str, str]:
        code = main(["key", *words, "--file", str(tmp_path / "keys.yaml")])
        return code, *capsys.readouterr()

    return run


def test_the_key_is_alone_on_standard_output(ctl: Ctl, tmp_path: Path) -> None:
    code, said, told = ctl("add", "laptop", "--models", "a,b", "--max-wait=30")
    assert code == 0
    (key,) = load(tmp_path / "keys.yaml")
    assert key.digest == digest(said.removesuffix("\n"))
    assert (key.models, key.max_wait_s) == ({"a", "b"}, 30)
    assert "shown only here" in told
    assert "http.keys" in told  # which does not name this file


def test_a_daemon_is_told_whatever_file_its_configuration_names(ctl: Ctl, daemon: Daemon) -> None:
    """It may be another configuration than the one that is looked at here."""
    ctl("add", "laptop")
    _, _, told = ctl("remove", "laptop")
    assert "homegptctl: homegptd: " in told
    assert "it counts once http.keys is" in told


def test_keys_are_listed_without_their_secret(ctl: Ctl) -> None:
    _, secret, _ = ctl("add", "child", "--no-switch", "--concurrency", "2", "--models=a")
    ctl("add", "boss", "--manage")
    _, shown, _ = ctl("list")
    assert [line.split()[:2] for line in shown.splitlines()] == [
        ["NAME", "MODELS"], ["child", "a"], ["boss", "all"],
    ]  # fmt: skip
    assert "no switch, 2 at once" in shown
    _, text, _ = ctl("list", "--json")
    told = json.loads(text)["keys"]
    assert [(one["name"], one["manage"], one["switch"]) for one in told] == [
        ("child", False, False), ("boss", True, True),
    ]  # fmt: skip
    assert secret.strip() not in shown + text
    assert digest(secret.strip()).hex() not in shown + text


def test_a_program_gets_the_key_as_json(ctl: Ctl) -> None:
    _, text, _ = ctl("add", "bot", "--json")
    assert json.loads(text).keys() == {"name", "key", "file"}


def test_removing_the_last_one_says_what_that_means(ctl: Ctl) -> None:
    ctl("add", "a")
    code, _, told = ctl("remove", "a")
    assert code == 0
    assert "nobody gets in" in told
    assert ctl("list")[2].endswith("has no keys\n")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["show"], 2, 'no verb "show"'),
        (["add"], 2, "NAME is missing"),
        (["remove"], 2, "NAME is missing"),
        (["list", "a"], 2, "takes no name"),
        (["add", "a", "--max-wait=soon"], 2, "number of seconds"),
        (["add", "a", "--concurrency=0"], 2, "above 0"),
        (["add", "a b"], 78, "letters"),
        (["remove", "nobody"], 1, "has no key"),
    ],
)
def test_mistakes_are_told(ctl: Ctl, words: list[str], code: int, says: str) -> None:
    found = ctl(*words)
    assert (found[0], found[1]) == (code, "")
    assert says in found[2]
