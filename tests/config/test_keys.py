"""The file of API keys: what is read, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from homegptd.config.keys import PREFIX, Key, digest, load, new_secret, parse
from homegptd.config.parse import ConfigError
from homegptd.config.parse import parse as parse_config
from homegptd.config.schema import HttpConfig

HASH = digest("hg-secret").hex()


def wrong(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "keys.yaml")
    return [str(problem) for problem in caught.value.problems]


def test_a_key_has_all_rights_but_managing_unless_told_otherwise() -> None:
    (key,) = parse(f"keys: [{{name: laptop, sha256: '{HASH}'}}]", "k")
    assert key == Key("laptop", digest("hg-secret"))
    assert (key.models, key.may_switch, key.manage) == (None, True, False)


def test_limits_are_read() -> None:
    text = f"""
keys:
  - name: child
    sha256: {HASH}
    models: [qwen, tiny]
    switch: false
    manage: true
    max_wait_s: 2.5
    concurrency: 3
    added: 2026-11-23
"""
    (key,) = parse(text, "k")
    models = frozenset({"qwen", "tiny"})
    assert key == Key(
        "child", digest("hg-secret"), models, may_switch=False, manage=True, max_wait_s=2.5,
        concurrency=3, added="2026-11-23",
    )  # fmt: skip


@pytest.mark.parametrize("text", ["", "# nothing", "keys:\n", "keys: []"])
def test_a_file_may_have_no_keys(text: str) -> None:
    assert parse(text, "k") == ()


def test_no_models_means_none() -> None:
    (key,) = parse(f"keys: [{{name: a, sha256: '{HASH}', models: []}}]", "k")
    assert key.models == frozenset()


def test_problems_are_told_all_at_once_with_their_lines() -> None:
    text = f"keys:\n- name: a b\n  sha256: x\n- {{name: c, sha256: '{HASH}', model: q}}\n"
    text += f"- {{name: c, sha256: '{HASH}'}}\n"
    lines = [problem.partition(" ")[0] for problem in wrong(text)]
    assert lines == ["keys.yaml:2:", "keys.yaml:3:", "keys.yaml:4:", "keys.yaml:5:"]
    assert 'did you mean "models"' in wrong(text)[2]
    assert "another key already" in wrong(text)[3]


def test_a_file_that_is_not_there_lets_nobody_in_by_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "keys.yaml")


def test_a_hash_does_not_show_in_logs() -> None:
    (key,) = parse(f"keys: [{{name: a, sha256: '{HASH}'}}]", "k")
    assert "digest" not in repr(key)


def test_new_keys_are_long_different_and_can_be_recognised() -> None:
    keys = {new_secret() for _ in range(50)}
    assert len(keys) == 50
    assert all(key.startswith(PREFIX) and len(key) >= 43 for key in keys)


def http(text: str) -> HttpConfig:
    return parse_config(f"{{models: [{{id: a, gpu_memory_gb: 1}}], http: {text}}}", "a").http


def test_the_configuration_names_keys_hosts_and_sites() -> None:
    assert http("{}") == HttpConfig()
    read = http("{keys: /k.yaml, hosts: gpu.example.org, cors: ['http://a:1', 'app://x']}")
    assert (read.keys, read.hosts) == ("/k.yaml", ("gpu.example.org",))
    assert read.cors == ("http://a:1", "app://x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{keys: k.yaml}", "an absolute path"),
        ("{hosts: 'a b'}", "a host name"),
        ("{hosts: 'http://a'}", "a host name"),
        ("{cors: localhost}", "an origin"),
        ("{cors: 'http://a/b'}", "an origin"),
        ("{cors: '*'}", "needs http.keys"),
    ],
)
def test_what_is_no_host_and_no_origin(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        http(text)


@pytest.mark.parametrize(
    ("engine", "key"),
    [
        ("{model: m}", None),
        ("{model: m, env: {VLLM_API_KEY: e}}", "e"),
        ("{model: m, args: {api-key: f}, env: {VLLM_API_KEY: e}}", "f"),
        ("{model: m, args: ['--api-key=f']}", "f"),
    ],
)
def test_an_engines_own_key_is_found_where_vllm_finds_it(engine: str, key: str | None) -> None:
    config = parse_config(f"models: [{{id: a, gpu_memory_gb: 1, engine: {engine}}}]", "a")
    assert config.models[0].engine is not None
    assert config.models[0].engine.api_key == key
