"""API keys into and out of their file."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from homegptd.config.keys import digest, load
from homegptd.config.parse import ConfigError, parse
from homegptd.host import keys
from homegptd.host.commands import HostFault
from homegptd.host.keys import Wish

CONFIG = parse("models: [{id: qwen, gpu_memory_gb: 1, aliases: [q]}]", "c")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "etc" / "keys.yaml"


def test_a_key_is_added_as_its_hash(file: Path) -> None:
    secret = keys.add(file, Wish("laptop"))
    (key,) = load(file)
    assert (key.name, key.digest) == ("laptop", digest(secret))
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_everything_that_was_wished_is_written(file: Path) -> None:
    wish = Wish("1", ("qwen", "no"), may_switch=False, manage=True, max_wait_s=0.5, concurrency=2)
    keys.add(file, wish)
    (key,) = load(file)
    assert key.models == {"qwen", "no"}
    assert (key.name, key.may_switch, key.manage) == ("1", False, True)
    assert (key.max_wait_s, key.concurrency) == (0.5, 2)
    assert key.added.startswith("20")


def test_comments_other_keys_and_mode_stay(file: Path) -> None:
    keys.add(file, Wish("first"))
    text = file.read_text() + "    # lent to a friend\n"
    file.write_text(text)
    file.chmod(0o600)
    keys.add(file, Wish("second"))
    assert file.read_text().startswith(text)
    assert [key.name for key in load(file)] == ["first", "second"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert keys.remove(file, "second") == 1
    assert file.read_text() == text


def test_the_last_one_goes_and_another_comes(file: Path) -> None:
    keys.add(file, Wish("first"))
    assert keys.remove(file, "first") == 0
    assert load(file) == ()
    keys.add(file, Wish("second"))
    assert [key.name for key in load(file)] == ["second"]
    assert file.read_text().count("keys:") == 1


def test_a_name_is_given_once_unless_it_is_to_be_replaced(file: Path) -> None:
    first = keys.add(file, Wish("a"))
    with pytest.raises(HostFault, match='there is a key "a" already'):
        keys.add(file, Wish("a"))
    keys.add(file, Wish("b"))
    second = keys.add(file, Wish("a", manage=True), replace=True)
    assert first != second
    assert {key.name: key.manage for key in load(file)} == {"b": False, "a": True}


def test_what_could_not_be_read_again_is_not_written(file: Path) -> None:
    keys.add(file, Wish("a"))
    text = file.read_text()
    with pytest.raises(ConfigError):
        keys.add(file, Wish("a b"))
    file.write_text(text + "nonsense: 1\n")
    with pytest.raises(ConfigError):
        keys.add(file, Wish("b"))
    assert file.read_text() == text + "nonsense: 1\n"


def test_who_is_not_there_cannot_be_removed(file: Path) -> None:
    with pytest.raises(HostFault, match="has no key"):
        keys.remove(file, "a")


def test_models_are_known_by_id_and_alias() -> None:
    assert keys.unknown(["qwen", "q"], CONFIG) is None
    assert keys.unknown(["qwem"], CONFIG) == 'there is no model "qwem"; did you mean qwen?'
    assert keys.unknown(["zzzz"], CONFIG) == 'there is no model "zzzz"; there are qwen, q'
