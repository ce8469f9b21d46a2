"""The table of reasons, and where the socket lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from homegptd.wire import codes, paths
from homegptd.wire.rpc import Code


def test_every_reason_has_a_code_of_its_own() -> None:
    numbers = [row.rpc for row in codes.TABLE.values()]
    assert len(set(numbers)) == len(numbers)
    reserved = {int(code) for code in Code}
    assert all(-32099 <= number <= -32000 or number in reserved for number in numbers)


def test_every_reason_is_a_kebab_word_and_says_something_to_each_door() -> None:
    for word, row in codes.TABLE.items():
        assert word == word.lower().replace("_", "-")
        assert 400 <= row.http < 600
        assert row.exit in {1, 2, 3, 4, 5, 78}


def test_a_reason_of_the_future_counts_as_internal() -> None:
    assert codes.row("made-up-tomorrow") == codes.TABLE["internal"]


def test_the_code_that_openai_clients_know() -> None:
    assert codes.openai_code("unknown-model") == "model_not_found"
    assert codes.openai_code("model-disabled") == "model_disabled"


def test_the_environment_names_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOMEGPT_SOCKET", "/x/y.sock")
    assert paths.socket_to_ask() == paths.socket_to_offer() == "/x/y.sock"


def test_root_and_everybody_on_a_system_with_a_daemon_ask_the_system_socket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HOMEGPT_SOCKET", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert paths.socket_to_ask() == paths.socket_to_offer() == paths.SYSTEM_SOCKET
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    system = tmp_path / "control.sock"
    system.touch()
    assert paths.socket_to_ask(str(system)) == str(system)


def test_a_user_without_a_system_daemon_has_a_socket_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HOMEGPT_SOCKET", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert paths.socket_to_ask("/nowhere/at/all") == "/run/user/1000/homegpt/control.sock"
    assert paths.socket_to_offer() == "/run/user/1000/homegpt/control.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert paths.socket_to_ask("/nowhere/at/all") == "/tmp/homegpt-1000/control.sock"


def test_a_directory_of_a_stranger_in_tmp_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
    path = paths.user_socket()
    directory = Path(path).parent
    assert paths.foreign_directory(path) is None
    directory.mkdir()
    try:
        owner = directory.stat().st_uid
        assert paths.foreign_directory(path) == (owner or None)
        monkeypatch.setattr(os, "geteuid", lambda: owner)
        assert paths.foreign_directory(path) is None
    finally:
        directory.rmdir()
