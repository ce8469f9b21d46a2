"""Units from a configuration: what stands in them, and that words survive their readers."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homegptd.config.parse import load, parse
from homegptd.host.quote import lines, word
from homegptd.host.render import CannotRender, file_name, render, service

ROOT = Path(__file__).parents[2]
SHIPPED = load(ROOT / "etc/homegpt/config.yaml")
MODEL = """\
gpus: [{{memory_mib: 24576}}, {{memory_mib: 24576}}]
models:
  - id: a
    gpu_memory_gb: 20
    engine:
      model: Org/Model
      {more}
"""


def unit(more: str = "", tail: str = "") -> str:
    return render(parse(MODEL.format(more=more) + tail, "c.yaml"))["vllm-a.container"]


def values(text: str, key: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    return re.findall(rf"^{key}=(.*)$", joined, re.MULTILINE)


# ------------------------------------------------------------ what is shipped


def test_the_shipped_units_are_those_of_the_shipped_configuration() -> None:
    shipped = {path.name: path.read_text() for path in (ROOT / "quadlet").iterdir()}
    assert shipped == render(SHIPPED), "make render"


def test_every_model_has_a_unit_and_so_have_the_network_and_the_page() -> None:
    files = set(render(SHIPPED))
    models = {file_name(model) for model in SHIPPED.models}
    assert files == models | {"homegpt.network", "open-webui.container"}


@pytest.mark.parametrize("model", SHIPPED.models, ids=lambda model: model.id)
def test_a_model_is_started_by_the_daemon_alone_and_closed_to_all_others(model: object) -> None:
    text = render(SHIPPED)[file_name(model)]  # type: ignore[arg-type]
    assert "[Install]" not in text
    assert values(text, "Restart") == ["no"]
    assert values(text, "Network") == ["none"]
    assert values(text, "PublishPort") == []
    assert values(text, "DropCapability") == ["all"]
    assert values(text, "NoNewPrivileges") == ["true"]
    assert not re.search(r"(Requires|BindsTo|PartOf|After|Wants)=.*homegpt\.service", text)
    assert all(not value.startswith("-") for value in values(text, "AddDevice"))


def test_the_page_sends_tools_only_where_every_model_can_call_them() -> None:
    off = "DEFAULT_MODEL_METADATA"
    assert off not in render(SHIPPED)["open-webui.container"]
    page = "webui: {enabled: true}\n"
    plain = render(parse(page + MODEL.format(more=""), "c"))
    assert values(plain["open-webui.container"], "Environment").count(
        '"DEFAULT_MODEL_METADATA={\\"capabilities\\":{\\"builtin_tools\\":false}}"'
    )
    calls = "args: {enable-auto-tool-choice: true, tool-call-parser: hermes}"
    able = render(parse(page + MODEL.format(more=calls), "c"))
    assert off not in able["open-webui.container"]


# ------------------------------------------------------------ one model


def test_its_gpus_are_named_one_by_one() -> None:
    text = render(parse(MODEL.format(more="").replace("gpu_mem", "gpus: [1]\n    gpu_mem"), "c"))
    assert values(text["vllm-a.container"], "AddDevice") == ["nvidia.com/gpu=1"]


def test_vllm_gets_the_share_of_the_card_that_the_ledger_counts() -> None:
    assert "--gpu-memory-utilization 0.833 " in unit()
    given_by_hand = unit("args: {gpu-memory-utilization: 0.5}")
    assert values(given_by_hand, "Exec")[0].count("--gpu-memory-utilization") == 1
    assert "--gpu-memory-utilization" not in unit("args: {kv-cache-memory-bytes: 1000}")


def test_sleep_mode_is_on_unless_it_is_forbidden() -> None:
    assert " --enable-sleep-mode" in unit()
    assert " --enable-sleep-mode" not in unit("args: {enable-sleep-mode: false}")


def test_a_model_with_a_network_may_download_and_has_the_token() -> None:
    secret = "secrets: {hf_token: my-token}\n"
    alone, connected = unit("", secret), unit("network: true", secret)
    assert values(alone, "Secret") == []
    assert values(connected, "Secret") == ["my-token,type=env,target=HF_TOKEN"]
    assert values(connected, "Network") == ["homegpt.network"]
    assert "HF_HUB_OFFLINE" in alone
    assert "HF_HUB_OFFLINE" not in connected


def test_compiled_code_is_kept_for_each_model_and_image() -> None:
    def cache(more: str) -> str:
        return next(v for v in values(unit(more), "Volume") if v.endswith(":/var/cache/engine"))

    assert cache("") != cache("image: docker.io/vllm/vllm-openai:v0.33.0")
    assert cache("image: a.example/x:v1") != cache("image: b.example/x:v1")
    assert "/engines/a/v0.32.0-" in cache("")


def test_a_volume_of_the_user_takes_the_place_of_ours() -> None:
    text = unit('volumes: ["/data/hf:/root/.cache/huggingface"]')
    assert [v for v in values(text, "Volume") if "huggingface" in v] == [
        "/data/hf:/root/.cache/huggingface"
    ]


def test_a_variable_of_the_user_wins() -> None:
    found = [v for v in values(unit("env: {VLLM_HOST_IP: 1.2.3.4}"), "Environment") if "_IP" in v]
    assert found == ["VLLM_HOST_IP=1.2.3.4"]


def test_nothing_is_rendered_for_a_unit_written_by_hand() -> None:
    config = parse("models: [{id: a, gpu_memory_gb: 20}]\n", "c.yaml")
    assert set(render(config)) == {"homegpt.network"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{id: a, gpu_memory_gb: 1, container_name: homegpt}", "is a unit of homeGPT itself"),
        ("{id: a, gpu_memory_gb: 1, engine: {command: [x]}}", "needs engine.model"),
        (
            '{id: a, gpu_memory_gb: 1, engine: {model: m, command: [x, "{port}"]}}',
            "containers listen on a socket",
        ),
    ],
)
def test_what_containers_cannot_do_is_said_with_the_models_name(text: str, why: str) -> None:
    with pytest.raises(CannotRender, match=f"a: .*{why}"):
        render(parse(f"models: [{text}]\n", "c.yaml"))


def test_units_are_named_as_podmans_generator_names_them() -> None:
    assert service("vllm-a.b.container") == "vllm-a.b.service"
    assert service("homegpt.network") == "homegpt-network.service"


# ------------------------------------------------------------ words


def read_back(line: str) -> Iterator[str]:
    """An independent reading of systemd.syntax(7), "Quoting", then of `%%` and `$$`."""
    for match in re.finditer(r'"((?:[^"\\]|\\.)*)"|(\S+)', line.replace("\\\n", " ")):
        quoted, plain = match.groups()
        raw = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        assert not re.search(r"(?<!%)(?:%%)*%(?!%)", raw), "systemd would expand this"
        assert not re.search(r"(?<!\$)(?:\$\$)*\$(?!\$)", raw), "systemd would expand this"
        yield raw.replace("%%", "%").replace("$$", "$")


PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "))


@given(st.lists(PRINTABLE.filter(lambda text: text not in {"", ";"})))
def test_words_come_out_as_they_went_in(words: list[str]) -> None:
    assert list(read_back(lines(words))) == words


def test_an_empty_value_is_joined_to_its_flag() -> None:
    assert lines(["--a", "", "--b", "1"]) == "--a= \\\n    --b 1"


@pytest.mark.parametrize("text", ["", ";", "a\nb", "a\x00b"])
def test_what_no_unit_file_can_hold_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cannot stand in a unit file"):
        word(text)


# ------------------------------------------------------------ Open WebUI


def test_open_webui_gets_a_key_of_its_own_where_keys_are_asked_for() -> None:
    head = "webui: {enabled: true}\n"
    plain = render(parse(MODEL.format(more="") + head, "c"))["open-webui.container"]
    asked = render(parse(MODEL.format(more="") + head + "http: {keys: /k.yaml}\n", "c"))
    text = asked["open-webui.container"]
    assert "OPENAI_API_KEYS=homegpt" in plain
    assert "key add" not in plain
    assert "Secret=homegpt-webui-key,type=env,target=OPENAI_API_KEYS" in text
    assert "OPENAI_API_KEYS=homegpt" not in text
    assert any("homegptctl key add open-webui" in one for one in values(text, "ExecStartPre"))
