"""The documents say what the code does: keys, defaults, verbs, options, methods, paths, codes."""

import re
import shutil
import subprocess
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import homegptd
from homegptd.app import cli
from homegptd.config import schema as settings
from homegptd.config.parse import ConfigError, parse
from homegptd.ctl.verbs import VERBS
from homegptd.faces.methods import METHODS
from homegptd.faces.routes import ROUTES, Where
from homegptd.wire import codes, schema

ROOT = Path(homegptd.__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "man").iterdir())

_WHERE = {Where.BODY: "body", Where.FORM: "form", Where.STORED: "id", Where.SESSION: "session"}
_DERIVED = {"start_limit_s", "estimated"}
_SECTIONS: dict[str, Any] = {
    "gpus[]": settings.GpuConfig,
    "models[]": settings.ModelConfig,
    "models[].engine": settings.EngineConfig,
    "models[].idle": settings.IdleConfig,
    "models[].request": settings.RequestConfig,
    **{f.name: type(f.default) for f in fields(settings.Config) if is_dataclass(f.default)},
}


def page(name: str) -> str:
    return (DOCS / "man" / name).read_text().replace(r"\-", "-")


def documented_keys() -> dict[str, str]:
    """Each key of homegpt.yaml(5) and what stands in its brackets."""
    return dict(re.findall(r'^\.BR (\S+) " \((.+)\)"$', page("homegpt.yaml.5"), re.MULTILINE))


def settings_keys() -> dict[str, object]:
    """Each key that the schema knows, with its default."""
    keys: dict[str, object] = {f"engine.{name}": None for name in ("image", "args", "env")}
    keys["engine.volumes"] = None
    sections = {name for name in _SECTIONS if "[" not in name}
    for field in fields(settings.Config):
        if field.name not in sections:
            keys[field.name] = None
    for section, record in _SECTIONS.items():
        inner = {name.removeprefix(f"{section}.") for name in _SECTIONS}
        for field in fields(record):
            if field.name not in inner | _DERIVED:
                keys[f"{section}.{field.name}"] = field.default
    return keys


def test_the_manual_lists_every_key_and_no_other() -> None:
    assert sorted(documented_keys()) == sorted(settings_keys())


def test_the_manual_gives_the_defaults_of_the_schema() -> None:
    told = documented_keys()
    for key, default in settings_keys().items():
        if isinstance(default, bool | int | float):
            assert told[key].endswith(f"default: {written(default)}"), key


def written(value: float) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


@pytest.mark.parametrize("key", sorted(documented_keys()))
def test_the_parser_knows_each_documented_key(key: str) -> None:
    """Its value is nonsense: whatever the parser says of it, the key is not unknown."""
    text = "{!nonsense x: 1}"
    for part in reversed(key.split(".")):
        name, is_list = part.removesuffix("[]"), part.endswith("[]")
        text = f"{{{name}: [{text}]}}" if is_list else f"{{{name}: {text}}}"
    with pytest.raises(ConfigError) as caught:
        parse(text, "a.yaml")
    unknown = [str(p) for p in caught.value.problems if "unknown key" in str(p)]
    assert unknown == []


def test_a_key_that_the_manual_does_not_list_is_unknown() -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        parse("{models: [{id: a, gpu_memory_gb: 1, nonsense: 1}]}", "a.yaml")


def test_a_file_of_required_keys_alone_is_complete() -> None:
    required = {key for key, told in documented_keys().items() if told.endswith("required")}
    assert required == {"models[].id", "models[].gpu_memory_gb"}
    assert parse("models: [{id: a, gpu_memory_gb: 1}]", "a.yaml").models[0].id == "a"


@pytest.mark.parametrize("document", ["README.md", "docs/man/homegpt.yaml.5"])
def test_the_example_is_a_good_configuration(document: str) -> None:
    text = (ROOT / document).read_text().replace(r"\-", "-")
    found = re.search(r"^(?:```yaml|\.nf)\n(.*?)^(?:```|\.fi)$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    assert parse(found[1], document).default_model is not None


def test_the_manual_of_homegptctl_lists_every_verb_and_option() -> None:
    text = page("homegptctl.1")
    verbs = text.partition(".SH VERBS")[2].partition(".SH OPTIONS")[0]
    told = re.findall(r'^\.TP\n\.B[IR]? "?(\w+)', verbs, re.MULTILINE)
    assert told == list(VERBS)
    options = {word.rstrip("=*") for row in VERBS.values() for word in row[2].split()}
    assert {option for option in options if option not in text} == set()


def test_the_manual_of_homegptd_lists_every_option_and_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = page("homegptd.8")
    for words in (["--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(words)
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out))
    options = text.partition(".SH OPTIONS")[2].partition(".SH SIGNALS")[0]
    assert set(re.findall(r"^\.B.*?(--[a-z-]+)", options, re.MULTILINE)) == shown
    told = re.findall(r"^\.B (\d+)$", text, re.MULTILINE)
    known = [cli.OK, cli.FAILED, 2, cli.UNAVAILABLE, cli.DEFECT, cli.BAD_CONFIG]
    assert told == [str(code) for code in known]


def test_the_manual_of_homegptctl_lists_every_exit_code() -> None:
    told = re.findall(r"^\.B (\d+)$", page("homegptctl.1"), re.MULTILINE)
    known = [codes.DONE, codes.FAILED, codes.USAGE, codes.ABSENT, codes.REFUSED, codes.UNKNOWN,
             codes.CONFIG, codes.INTERRUPTED, 141]  # fmt: skip
    assert told == [str(code) for code in known]


def test_the_control_socket_is_documented_method_by_method() -> None:
    text = (DOCS / "control-socket.md").read_text()
    told = re.findall(r"^\| `([\w.]+)` \| (.*?)\| (.+) \|$", text, re.MULTILINE)
    rows = [row for row in told if row[0] in METHODS]
    known = [
        (
            str(entry.name),
            ", ".join(
                f"`{k.name}{'' if k.required else '?'}`" for k in schema.fields(entry.params)
            ),
            entry.summary,
        )
        for entry in METHODS.values()
    ]
    assert [(name, params.strip(), summary) for name, params, summary in rows] == known


def test_the_http_api_is_documented_path_by_path_and_code_by_code() -> None:
    text = (DOCS / "http.md").read_text()
    row = r"^\| `(\w+) (\S+)` \| (\w+) \| (\w+) \| (yes)? ?\| (yes|no) \|$"
    assert re.findall(row, text, re.MULTILINE) == [
        (
            route.method,
            route.path,
            _WHERE[route.where],
            route.shape.value,
            "yes" if route.streams else "",
            "yes" if route.wakes else "no",
        )
        for route in ROUTES
    ]
    told = re.findall(r"^\| `(\w+)` \| (\d+) \| `(\w+)` \| .+ \|$", text, re.MULTILINE)
    assert told == [
        (codes.openai_code(word), str(row.http), row.openai) for word, row in codes.TABLE.items()
    ]


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_groff_has_nothing_to_say_against_a_manual_page(path: Path) -> None:
    groff = ["groff", "-man", "-ww", "-Tutf8", str(path)]
    done = subprocess.run(groff, check=True, capture_output=True, text=True)
    assert done.stderr == ""
