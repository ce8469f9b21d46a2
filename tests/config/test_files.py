"""Files that cannot even be read as text, or that are made to hurt the reader."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from homegptd.config.parse import ConfigError, load, parse
from homegptd.config.schema import Config

MODELS = "models: [{id: a, gpu_memory_gb: 20}]\n"


def heard(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert heard(path) == f"{path}: cannot be read: no such file or directory"


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    assert heard(tmp_path) == f"{tmp_path}: cannot be read: is a directory"


def test_bytes_that_are_no_text_are_shown_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(MODELS.encode() + b"default: \xff")
    assert heard(path) == f"{path}:2: is not UTF-8 text: byte 0xff"


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("# " + "x" * 300_000)
    assert heard(path) == f"{path}: is larger than 256 KiB"


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MODELS.encode())
    assert load(path).models[0].id == "a"


LAUGHS = "x-a: &a0 {k: v}\n" + "".join(
    f"x-{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 15)
)
WIDE_ENV = ", ".join(f"K{n}: v" for n in range(3000))
WIDE = (
    f"x-e: &e {{{WIDE_ENV}}}\n"
    f"x-m: &m {{id: a, gpu_memory_gb: 1, engine: {{model: m, env: *e}}}}\n"
    f"models: [{', '.join(['*m'] * 500)}]\n"
)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(f"{LAUGHS}models: [{{<<: *a14, id: a, gpu_memory_gb: 1}}]", id="merges"),
        pytest.param(WIDE, id="aliases"),
        pytest.param(f"x-m: &m {{id: a}}\nmodels: [{', '.join(['*m'] * 40000)}]", id="models"),
        pytest.param(f"gpus: [{'{},' * 5000}]\n{MODELS}", id="cards"),
        pytest.param("models: &m [*m, *m]", id="a list inside itself"),
        pytest.param("models: [&m {<<: *m, id: a, gpu_memory_gb: 1}]", id="merging itself"),
        pytest.param("&m models: {*m : *m}", id="anchored key"),
        pytest.param("[" * 100_000, id="brackets"),
        pytest.param("- " * 100_000, id="dashes"),
        pytest.param("? " * 100_000, id="questions"),
        pytest.param("".join(f"k{n}: 1\n" for n in range(20_000)), id="unknown keys"),
        pytest.param(f"{MODELS}default: {'9' * 200_000}", id="a long word"),
        pytest.param(f"{MODELS}webui: {{port: {'9' * 100_000}}}", id="a long number"),
        pytest.param("%YAML 1." + "9" * 500 + "\n---\na: 1", id="a long version"),
    ],
)
def test_a_file_made_to_hurt_is_refused_in_time(text: str) -> None:
    start = time.process_time()
    with pytest.raises(ConfigError):
        parse(text, "x")
    assert time.process_time() - start < 10


PIECES = st.sampled_from(
    [
        *(
            "models:",
            "- ",
            "id: ",
            "a",
            "gpu_memory_gb: ",
            "1",
            "-1",
            "gpus: ",
            "engine: ",
            "args: ",
        ),
        *("env: ", "router: ", "http: ", "listen: ", "switching: ", "default: ", "aliases: "),
        *("\n", "\n  ", "\n    ", "\t", "[", "]", "{", "}", ", ", ": ", "? ", "&x ", "*x ", "<<: "),
        *(
            "!t ",
            "!!int ",
            "!<x> ",
            "|",
            ">",
            '"',
            "'",
            "\\",
            "#",
            "%YAML 1.1\n",
            "---",
            "...",
            "~",
        ),
        *(
            "no",
            "22:22",
            "1e9",
            ".nan",
            "0x1",
            "\\U",
            "\\x",
            "--tp 2",
            "{port}",
            "\x00",
            "\x85",
            "é",
        ),
    ]
)
MADE = st.lists(PIECES, max_size=60).map("".join)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
KEYS = (
    *("models", "default", "gpus", "switching", "router", "http", "control", "webui", "state_dir"),
    *("backend", "engine", "id", "gpu_memory_gb", "args", "env", "command", "volumes", "listen"),
)
SHAPED = st.dictionaries(
    st.sampled_from(KEYS),
    VALUES | st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5), max_size=3),
    max_size=6,
).map(repr)  # Python's literals are nearly YAML's flow style: near misses come free


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.text(), MADE, SHAPED, MADE.map(lambda text: MODELS + text)))
def test_any_text_is_a_config_or_a_list_of_problems(text: str) -> None:
    try:
        read = parse(text, "x.yaml")
    except ConfigError as error:
        assert error.problems  # noqa: PT017
        assert all("\n" not in str(problem) for problem in error.problems)  # noqa: PT017
    else:
        assert isinstance(read, Config)
        assert read.models


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_a_list_of_problems(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "a.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        load(path)


def test_reading_a_config_loads_nothing_heavy() -> None:
    code = "import sys, homegptd.config.parse; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in out.stdout.split()}
    assert not loaded & {"aiohttp", "asyncio", "msgspec", "socket", "subprocess", "logging"}
