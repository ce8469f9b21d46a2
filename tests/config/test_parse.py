"""What a file may say, and what it hears when it says it wrong."""

from pathlib import Path
from textwrap import dedent

import pytest

from homegptd.config.parse import ConfigError, load, parse
from homegptd.config.schema import Config, IdleConfig, ModelConfig, command_line

ROOT = Path(__file__).parents[2]

ORIGINAL = """
models:
  - id: coder
    name: Coder
    container_name: vllm-coder
    port: 8000
    host_port: 8001
    gpu_memory_gb: 57.0
    startup_mode: active
  - id: writer
    name: Writer
    container_name: vllm-writer
    port: 8000
    host_port: 8002
    gpu_memory_gb: 60.0
    startup_mode: sleep
switching:
  available_ram_gb: 128
  max_retries: 60
  health_check_interval_seconds: 5
"""


def config(text: str) -> Config:
    return parse(dedent(text), "homegpt.yaml")


def model(text: str) -> ModelConfig:
    """One model with the given further lines."""
    lines = "".join(f"    {line}\n" for line in dedent(text).strip().splitlines())
    return config(f"models:\n  - id: a\n    gpu_memory_gb: 20\n{lines}").models[0]


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config(text)
    lines = [problem.line for problem in caught.value.problems if problem.line]
    assert lines == sorted(lines)
    return [str(problem).removeprefix("homegpt.yaml:") for problem in caught.value.problems]


def test_a_model_may_be_given_more_time_than_the_others() -> None:
    slow = model("first_byte_timeout_s: 1800\nbetween_bytes_timeout_s: 300")
    assert (slow.first_byte_timeout_s, slow.between_bytes_timeout_s) == (1800, 300)
    read = config("models: [{id: a, gpu_memory_gb: 1}]\nrouter: {early_head_s: 0}")
    assert read.router.early_head_s == 0


def test_a_file_of_the_original_manager_loads_as_it_is() -> None:
    read = config(ORIGINAL)
    coder, writer = read.models
    assert (coder.id, coder.name, coder.host_port, coder.port) == ("coder", "Coder", 8001, 8000)
    assert (coder.startup_mode, writer.startup_mode) == ("active", "sleep")
    assert (coder.unit, coder.engine) == ("vllm-coder.service", None)
    assert read.available_ram_gb == 128
    assert coder.start_limit_s == 300
    assert read.gpus == ()
    assert coder.estimated == {"gpus", "weights_gb", "residue_gb"}
    assert read.default_model == coder


def test_the_shipped_file_has_the_four_models_with_the_figures_of_the_original() -> None:
    read = load(ROOT / "etc/homegpt/config.yaml")
    assert [(m.id, m.host_port, m.gpu_memory_gb, m.startup_mode) for m in read.models] == [
        ("qwen3-vl-30b-a3b", 8001, 57.0, "active"),
        ("qwen3-vl-32b", 8002, 60.0, "sleep"),
        ("qwen3-next-80b-a3b-thinking", 8003, 60.0, "sleep"),
        ("gpt-oss-20b", 8004, 57.0, "disabled"),
    ]
    assert read.model("qwen3-vl-30b") is read.models[0]
    assert {(m.port, m.gpus) for m in read.models} == {(8000, (0, 1))}


def test_every_shipped_model_can_wake_while_all_other_started_ones_sleep() -> None:
    read = load(ROOT / "etc/homegpt/config.yaml")
    started = [m for m in read.models if m.startup_mode != "disabled"]
    for awake in started:
        residue = sum(m.residue_mib_each for m in started if m is not awake)
        assert all(
            awake.gpu_memory_mib_each + residue <= (card.memory_mib or 0) for card in read.gpus
        )


def test_the_weights_of_all_shipped_sleepers_fit_the_ram_of_the_box() -> None:
    read = load(ROOT / "etc/homegpt/config.yaml")
    started = [m for m in read.models if m.startup_mode != "disabled"]
    assert sum(m.weights_mib for m in started) <= (read.available_ram_gb or 0) * 1024


def test_shipped_engines_have_the_flags_of_the_original_units() -> None:
    read = load(ROOT / "etc/homegpt/config.yaml")
    lines = [" ".join(command_line(m, socket="/run/e.sock") or ()) for m in read.models]
    for line in lines:
        for flag in (
            "--gpu-memory-utilization 0.90",
            "--max-num-batched-tokens 49152",
            "--kv-cache-dtype fp8",
            "--tensor-parallel-size 2",
            "--enable-chunked-prefill",
            "--enable-sleep-mode",
            "--enable-auto-tool-choice",
            "--uds /run/e.sock",
        ):
            assert flag in line
    assert ["--max-model-len 262144" in line for line in lines] == [True, True, True, False]
    assert "--served-model-name qwen3-vl-30b-a3b qwen3-vl-30b " in lines[0]


@pytest.mark.parametrize("word", ["no", "on", "22", "1e3", "0x10", "2024-01-01", "1_000"])
def test_a_name_is_taken_as_it_is_written(word: str) -> None:
    assert config(f"models: [{{id: {word}, gpu_memory_gb: 1}}]").models[0].id == word


def test_text_with_colons_is_no_sexagesimal_number() -> None:
    assert model("name: 22:22").name == "22:22"


def test_environment_values_stay_as_written() -> None:
    read = model("engine: {model: m, env: {A: 0.90, B: yes, C: , D: 0755}}")
    assert read.engine is not None
    assert dict(read.engine.env) == {"A": "0.90", "B": "yes", "C": "", "D": "0755"}


def test_empty_optional_keys_count_as_not_given() -> None:
    read = model("idle:\nengine:\nname: ~\nhost_port: null")
    assert (read.idle, read.engine, read.name, read.host_port) == (None, None, "a", None)


def test_flags_read_the_same_as_a_mapping_and_as_a_list() -> None:
    mapping = model(
        "engine: {model: m, args: {max_model-len: 8192, eager: true, x: false, y: [1, 2]}}"
    )
    listed = model(
        "engine: {model: m, args: [--max-model-len 8192, --eager, --no-x, --y, '1', '2']}"
    )
    assert mapping.engine == listed.engine
    assert mapping.engine is not None
    assert mapping.engine.args == (
        *("--max-model-len", "8192", "--eager", "--no-x", "--y", "1", "2"),
    )


def test_a_value_with_blanks_stays_one_word() -> None:
    read = model("""engine: {model: m, args: [--limit, '{"image": 4}']}""")
    assert read.engine is not None
    assert read.engine.args == ("--limit", '{"image": 4}')


def test_a_model_replaces_the_common_flags_that_it_names() -> None:
    read = config("""
        engine:
          image: example.org/vllm:1
          env: {A: "1", B: "1"}
          args: {max-model-len: 100, enable-x: true, kv-cache-dtype: fp8}
          volumes: [/a:/b]
        models:
          - id: a
            gpu_memory_gb: 20
            engine:
              model: m
              env: {B: "2"}
              args: {max-model-len: 7, enable-x: false}
              volumes: [/c:/d:ro]
          - {id: unit-by-hand, gpu_memory_gb: 20}
    """)
    engine = read.models[0].engine
    assert engine is not None
    assert engine.args == ("--kv-cache-dtype", "fp8", "--max-model-len", "7", "--no-enable-x")
    assert dict(engine.env) == {"A": "1", "B": "2"}
    assert (engine.image, engine.volumes) == ("example.org/vllm:1", ("/a:/b", "/c:/d:ro"))
    assert read.models[1].engine is None


def test_a_command_gets_its_placeholders_and_else_a_socket() -> None:
    plain = model("engine: {command: [serve, '{id}', '--json={\"a\": {}}']}")
    assert command_line(plain) == ("serve", "{id}", '--json={"a": {}}')
    assert command_line(plain, socket="/s") == ("serve", "a", '--json={"a": {}}', "--uds", "/s")
    port = model("port: 18001\nengine: {command: [serve, '--port={port}']}")
    assert command_line(port, socket="/s") == ("serve", "--port=18001")
    assert port.engine is not None
    assert port.engine.over_tcp
    socket = model("engine: {command: [serve, '{socket}']}")
    assert command_line(socket, socket="/s") == ("serve", "/s")


def test_a_model_without_engine_has_no_command_line() -> None:
    assert command_line(model(""), socket="/s") is None


@pytest.mark.parametrize(
    ("args", "gpus"),
    [
        ("{}", (0,)),
        ("{tensor-parallel-size: 2}", (0, 1)),
        ("[-tp, '2', --pipeline-parallel-size=2]", (0, 1, 2, 3)),
        ("[--tensor_parallel_size=3]", (0, 1, 2)),
    ],
)
def test_a_model_takes_the_first_gpus_that_its_parallel_sizes_need(
    args: str, gpus: tuple[int, ...]
) -> None:
    read = model(f"engine: {{model: m, args: {args}}}")
    assert read.gpus == gpus
    assert "gpus" not in read.estimated


def test_a_hand_written_unit_is_guessed_onto_as_few_gpus_as_hold_it() -> None:
    read = config("""
        gpus: [{memory_mib: 24000}, {index: 5, memory_mib: 24000}]
        models: [{id: small, gpu_memory_gb: 20}, {id: large, gpu_memory_gb: 40}]
    """)
    assert [m.gpus for m in read.models] == [(0,), (0, 5)]
    assert "gpus" in read.models[1].estimated


def test_single_values_stand_for_lists_of_one() -> None:
    read = model("aliases: b\ngpus: 1")
    assert (read.aliases, read.gpus) == (("b",), (1,))


def test_idle_and_overrides_are_read() -> None:
    read = model(
        "idle: {sleep_after_s: 60, stop_after_s: 3600}\nsleep_level: 2\npinned: yes\n"
        "priority: -3\nauto_switch: off\ndrain_s: 0\non_deadline: freeze"
    )
    assert read.idle == IdleConfig(sleep_after_s=60, stop_after_s=3600)
    assert (read.sleep_level, read.pinned, read.priority, read.auto_switch) == (2, True, -3, False)
    assert (read.drain_s, read.on_deadline) == (0, "freeze")


def test_trust_is_of_all_models_or_of_one() -> None:
    one, other = "id: a\n    gpu_memory_gb: 1", "id: b\n    gpu_memory_gb: 1\n    trust: measured"
    read = parse(f"trust: configured\nmodels:\n  - {one}\n  - {other}\n", "config.yaml")
    assert [m.trust for m in read.models] == ["configured", "measured"]
    assert model("").trust == "measured"


def test_a_start_timeout_of_its_own_overrules_the_common_limit() -> None:
    assert model("engine: {model: m, start_timeout_s: 42}").start_limit_s == 42
    assert model("engine: {model: m}").start_limit_s == 600


def test_guesses_follow_the_footprint() -> None:
    read = model("gpus: [0, 1]")
    assert (read.gpu_memory_mib, read.gpu_memory_mib_each) == (20 * 1024, 10 * 1024)
    assert (read.weights_mib, read.residue_mib_each) == (12 * 1024, 768)
    given = model("gpus: [0, 1]\nweights_gb: 8\nresidue_gb: 3")
    assert (given.weights_mib, given.residue_mib_each) == (8 * 1024, 1536)
    assert given.estimated == frozenset()


def test_anchors_and_merges_share_settings_between_models() -> None:
    read = config("""
        x-common: &common {gpu_memory_gb: 20, startup_mode: disabled}
        models:
          - {<<: *common, id: a}
          - {<<: *common, id: b, startup_mode: active}
    """)
    assert [m.startup_mode for m in read.models] == ["disabled", "active"]


def test_several_actives_may_start_together_where_they_fit() -> None:
    read = config("""
        gpus: [{memory_mib: 40960}]
        default: bee
        models:
          - {id: a, gpu_memory_gb: 20, startup_mode: active}
          - {id: b, gpu_memory_gb: 20, startup_mode: active, aliases: [bee]}
    """)
    assert read.default_model is read.models[1]


@pytest.mark.parametrize("listen", ["127.0.0.1:9000", '"[::1]:0"', "box.lan:80", "0.0.0.0:9000"])
def test_addresses_are_read(listen: str) -> None:
    read = config(f"{ORIGINAL}\nhttp: {{listen: {listen}}}")
    assert read.http.listen == (listen.strip('"'),)


def test_a_file_with_everything_wrong_hears_everything_at_once() -> None:
    assert problems("""\
        models:
          - id: a b
            gpu_memory_gb: -1
            prot: 8000
            port: "8000"
            host_port: 70000
            startup_mode: activ
          - name: B
            startup_mode: off
            name: C
        swiching: {}
        router: [1]
        """) == [
        '2: models[a b].id: found "a b", must be letters, digits, dots, dashes and underscores'
        " (it becomes part of a unit's name)",
        "3: models[a b].gpu_memory_gb: found -1, must be greater than 0",
        '4: models[a b].prot: unknown key; did you mean "port"?',
        '5: models[a b].port: found the text "8000", must be a whole number;'
        " write it without quotes",
        "6: models[a b].host_port: found 70000, allowed are 1 to 65535",
        '7: models[a b].startup_mode: found "activ", allowed are disabled, sleep, active;'
        ' did you mean "active"?',
        "8: models[1].id: missing",
        "8: models[1].gpu_memory_gb: missing",
        '9: models[1].startup_mode: found "off", allowed are disabled, sleep, active',
        "10: models[1].name: given twice (first on line 8)",
        '11: swiching: unknown key; did you mean "switching"?',
        "12: router: found a list, must be a mapping",
    ]


MODELS = "models: [{id: a, gpu_memory_gb: 20}]\n"
A = "models:\n- id: a\n  gpu_memory_gb: 20\n"

BAD = {
    "nothing": ("", "1: is empty: it must at least list models:"),
    "only a comment": ("# hm\n", "1: is empty: it must at least list models:"),
    "no mapping": ("hello", '1: found "hello", must be a mapping'),
    "no models": ("models: []", "1: models: must be a list of at least one model"),
    "empty models": ("models:", "1: models: is empty"),
    "a model that is a word": ("models: [a]", '1: models[0]: found "a", must be a mapping'),
    "models as a mapping": ("models: {a: 1}", "1: models: found a mapping, must be a list"),
    "tabs": ("models:\n\t- id: a", "2: not valid YAML: while scanning"),
    "open bracket": ("models: [", "1: not valid YAML: while parsing"),
    "two documents": (f"{MODELS}---\na: 1", "2: not valid YAML: expected a single document"),
    "unknown anchor": ("models: *x", "1: not valid YAML: found undefined alias"),
    "control character": (f"{MODELS}a: \x07", "2: character U+0007 is not allowed in YAML"),
    "impossible escape": ('a: "\\UFFFFFFFF"', "1: not valid YAML: a number or an escape"),
    "deep nesting": ("a: " + "[" * 30, "1: nested more than 20 levels deep"),
    "a tag": (
        "models: [{id: !x a, gpu_memory_gb: 2}]",
        "1: models[a].id: the tag !x means nothing",
    ),
    "a mapping as a key": (f"{MODELS}? {{a: 1}}\n: 2", "2: a key must be a plain word"),
    "merging a word": ("models: [{<<: x, id: a, gpu_memory_gb: 2}]", "1: models[a].<<: can only"),
    "an empty id": ("models: [{id: '', gpu_memory_gb: 2}]", "1: models[0].id: must not be empty"),
    "an id with a slash": ("models: [{id: a/b, gpu_memory_gb: 2}]", "1: models[a/b].id: found"),
    "a name of two lines": (f'{A}  name: "a\\nb"', "4: models[a].name: must be one line"),
    "not a number": (
        f"{A}  weights_gb: lots",
        '4: models[a].weights_gb: found "lots", must be a n',
    ),
    "infinity": (f"{A}  weights_gb: .inf", '4: models[a].weights_gb: found ".inf", must be a n'),
    "a fraction": (f"{A}  port: 80.5", "4: models[a].port: found 80.5, must be a whole number"),
    "a list": (f"{A}  port: [80]", "4: models[a].port: found a list, must be a whole number"),
    "no truth value": (
        f"{A}  pinned: maybe",
        '4: models[a].pinned: found "maybe", must be true or',
    ),
    "sleep level 3": (
        f"{A}  sleep_level: 3",
        "4: models[a].sleep_level: found 3, allowed are auto",
    ),
    "stops before it sleeps": (
        f"{A}  idle: {{sleep_after_s: 60, stop_after_s: 30}}",
        "4: models[a].idle.stop_after_s: 30 must be more than sleep_after_s, 60",
    ),
    "weights beyond the footprint": (
        f"{A}  weights_gb: 30",
        "4: models[a].weights_gb: 30 is more than gpu_memory_gb, 20, which it is a part of",
    ),
    "engine without model": (f"{A}  engine: {{kind: embed}}", "4: models[a].engine.model: missing"),
    "empty command": (
        f"{A}  engine: {{command: []}}",
        "4: models[a].engine.command: must be a list",
    ),
    "engine key in the model": (
        f"{A}  image: x/y:1",
        "4: models[a].image: unknown key; it belongs below engine:",
    ),
    "model key in the engine": (
        f"{A}  engine: {{model: m, gpus: [0]}}",
        "4: models[a].engine.gpus: unknown key; it belongs to the model, above",
    ),
    "a flag of ours": (
        f"{A}  engine: {{model: m, args: {{port: 80}}}}",
        "4: models[a].engine.args: --port does not belong here: homegptd sets where",
    ),
    "a flag with a mapping": (
        f"{A}  engine: {{model: m, args: {{x: {{a: 1}}}}}}",
        "4: models[a].engine.args.x: found a mapping, must be a value; put JSON in single",
    ),
    "args as a word": (
        f"{A}  engine: {{model: m, args: x}}",
        '4: models[a].engine.args: found "x"',
    ),
    "an odd parallel size": (
        f"{A}  engine: {{model: m, args: {{tensor-parallel-size: two}}}}",
        '4: models[a].engine.args: found --tensor-parallel-size "two", must be',
    ),
    "a bad volume": (
        f"{A}  engine: {{model: m, volumes: [data]}}",
        '4: models[a].engine.volumes[0]: found "data", must be host:/container or',
    ),
    "a bad variable": (
        f"{A}  engine: {{model: m, env: {{a-b: 1}}}}",
        "4: models[a].engine.env.a-b: is no name of an environment variable",
    ),
    "parallel sizes and gpus differ": (
        f"{A}  gpus: [0]\n  engine: {{model: m, args: {{tensor-parallel-size: 2}}}}",
        "4: models[a].gpus: names 1 GPUs, but the engine's parallel sizes need 2",
    ),
    "a gpu twice": (f"{A}  gpus: [0, 0]", "4: models[a].gpus: names a GPU twice"),
    "no gpu at all": (f"{A}  gpus: []", "4: models[a].gpus: must name at least one GPU"),
    "a gpu that is not there": (
        f"{A}  gpus: [2]\ngpus: [{{}}, {{}}]",
        "4: models[a].gpus: there is no GPU 2; gpus: has 0, 1",
    ),
    "more gpus than there are": (
        f"{A}  engine: {{model: m, args: {{tensor-parallel-size: 2}}}}\ngpus: [{{}}]",
        "4: models[a].engine: its parallel sizes need 2 GPUs, gpus: has 1",
    ),
    "a card twice": (
        f"{MODELS}gpus:\n- index: 1\n- {{}}",
        "4: gpus[1].index: GPU 1 is given twice (first on line 3)",
    ),
    "too big for its gpus": (
        f"{A}gpus: [{{memory_mib: 8192}}, {{memory_mib: 8192}}]",
        "3: models[a].gpu_memory_gb: 20.0 GB / 2 GPUs = 10.0 GB is more than GPU 0 has, 8.0 GB",
    ),
    "an id twice": (
        f"{A}- id: a\n  gpu_memory_gb: 2",
        '4: models[a].id: "a" is given twice (first on line 2)',
    ),
    "an alias that is an id": (
        f"{A}- id: b\n  gpu_memory_gb: 2\n  aliases: [x, a]",
        '6: models[b].aliases: "a" is the id on line 2',
    ),
    "an alias twice": (
        f"{A}  aliases: [x]\n- id: b\n  gpu_memory_gb: 2\n  aliases: [x]",
        '7: models[b].aliases: "x" is an alias of a already',
    ),
    "a container twice": (
        f"{A}- id: b\n  gpu_memory_gb: 2\n  container_name: vllm-a",
        '6: models[b].container_name: "vllm-a" is the container of a already',
    ),
    "a host port twice": (
        f"{A}  host_port: 8001\n- id: b\n  gpu_memory_gb: 2\n  host_port: 8001",
        "7: models[b].host_port: port 8001 is taken by models[a].host_port",
    ),
    "the management's port": (
        f"{A}  host_port: 9000",
        "4: models[a].host_port: port 9000 is taken by http.listen",
    ),
    "the port of Open WebUI": (
        f"{A}  host_port: 3000\nwebui: {{enabled: true}}",
        "4: models[a].host_port: port 3000 is taken by webui.port",
    ),
    "an unknown default": (
        f"{MODELS}default: b",
        '2: default: no model is named "b"; there are a',
    ),
    "a disabled default": (
        f"{A}  startup_mode: disabled\ndefault: a",
        '5: default: "a" has startup_mode disabled',
    ),
    "a port alone": (
        f"{MODELS}http: {{listen: 9000}}",
        '2: http.listen: found "9000", must be addr',
    ),
    "an address that is none": (
        f"{MODELS}http:\n  listen:\n  - 127.0.0.1:80\n  - 1.2.3.999:80",
        '5: http.listen[1]: found "1.2.3.999:80", must be addr:port',
    ),
    "an impossible port": (
        f"{MODELS}http: {{listen: 127.0.0.1:70000}}",
        "2: http.listen: found port 70000, allowed are 0 to 65535",
    ),
    "an address twice": (
        f"{MODELS}http: {{listen: [127.0.0.1:80, 127.0.0.1:80]}}",
        '2: http.listen: "127.0.0.1:80" is given twice',
    ),
    "a negative length": (
        f"{MODELS}router: {{drain_s: -1}}",
        "2: router.drain_s: found -1, must be at least 0",
    ),
    "all time for switching": (
        f"{MODELS}router: {{switch_share: 1}}",
        "2: router.switch_share: found 1, must be at most 0.9",
    ),
    "a relative socket": (
        f"{MODELS}control: {{socket: run/x}}",
        '2: control.socket: found "run/x", must be an absolute path of at most 107',
    ),
    "an unknown backend": (
        f"{MODELS}backend: docker",
        '2: backend: found "docker", allowed are pr',
    ),
    "no retries": (
        f"{MODELS}switching: {{max_retries: 0}}",
        "2: switching.max_retries: found 0, al",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_hears_where_and_why(case: str) -> None:
    text, expected = BAD[case]
    heard = problems(text)
    assert [line[: len(expected)] for line in heard] == [expected]


def test_actives_that_do_not_fit_together_see_their_sum() -> None:
    assert problems("""\
        gpus: [{memory_mib: 32768}, {memory_mib: 32768}]
        models:
          - {id: a, gpu_memory_gb: 57, gpus: [0, 1], startup_mode: active}
          - {id: b, gpu_memory_gb: 3.5, startup_mode: active}
          - id: c
            gpu_memory_gb: 12
            gpus: 1
            startup_mode: active
        """) == [
        "8: models[c].startup_mode: the active models do not fit together on GPU 1:"
        " a 28.5 GB + c 12.0 GB = 40.5 GB of 32.0 GB; let all but one start asleep"
    ]


def test_what_can_never_be_awake_beside_what_is_pinned_sees_its_sum() -> None:
    assert problems("""\
        gpus: [{memory_mib: 98304}, {memory_mib: 98304}]
        models:
          - {id: c, gpu_memory_gb: 38, startup_mode: active, pinned: true}
          - {id: small, gpu_memory_gb: 58}
          - {id: later, gpu_memory_gb: 90, gpus: 1, pinned: true}
          - {id: other, gpu_memory_gb: 90, gpus: 1}
          - id: big
            gpu_memory_gb: 120
            gpus: [0, 1]
        """) == [
        "8: models[big].gpu_memory_gb: can never be awake: needs 60.0 GB on gpu0;"
        " 96.0 total - 38.0 pinned c = 58.0"
    ]


def test_ram_that_suffices_for_no_engine_sees_its_sum() -> None:
    assert problems("""\
        switching: {available_ram_gb: 6}
        models:
          - {id: a, gpu_memory_gb: 38, startup_mode: active, pinned: true}
          - {id: b, gpu_memory_gb: 20}
        """) == [
        "1: switching.available_ram_gb: b can never run: needs 4.0 GB of host RAM;"
        " 6.0 total - 4.0 process of a = 2.0"
    ]
    enough = config("{switching: {available_ram_gb: 4}, models: [{id: a, gpu_memory_gb: 1}]}")
    assert enough.available_ram_gb == 4


def test_a_default_that_returns_cannot_rest_for_idleness_too() -> None:
    assert problems("""\
        router: {return_to_default_s: 600}
        models:
          - id: a
            gpu_memory_gb: 38
            startup_mode: active
            idle: {sleep_after_s: 60}
        """) == [
        "6: models[a].idle: router.return_to_default_s wakes this model when nobody wants"
        " anything; it cannot rest for idleness too"
    ]
    assert problems("""\
        router: {return_to_default_s: 600}
        models: [{id: a, gpu_memory_gb: 38}]
        """) == [
        "1: router.return_to_default_s: there is no default model to return to; give default,"
        " or start one active"
    ]


def test_foreign_text_cannot_break_a_message_into_lines() -> None:
    heard = problems(MODELS + '"a\\nb\\e[31m' + "x" * 100 + '": 1')
    assert len(heard) == 1
    assert "\n" not in heard[0]
    assert "\x1b" not in heard[0]
    assert len(heard[0]) < 250


def test_a_flood_of_problems_is_cut_and_says_so() -> None:
    heard = problems("models:\n" + "- x\n" * 500)
    assert len(heard) == 201
    assert heard[-1].endswith("and more than these 200 problems")


def test_a_problem_prints_as_file_line_path_and_words() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"{MODELS}webui: {{port: 0}}", "/etc/homegpt/config.yaml")
    assert str(caught.value) == (
        "/etc/homegpt/config.yaml:2: webui.port: found 0, allowed are 1 to 65535"
    )


def test_what_is_set_in_requests_is_json() -> None:
    read = model("""
        request:
          defaults: {temperature: 0.6, stop: ["</s>", 2], language: no, seed: "7"}
          overrides:
            max_tokens: 4096
            logit_bias: null
            chat_template_kwargs: {enable_thinking: false, deep: {a: [1, {b: 1e3}]}}
    """)
    assert read.request.defaults == {
        "temperature": 0.6, "stop": ["</s>", 2], "language": "no", "seed": "7",
    }  # fmt: skip
    assert read.request.overrides == {
        "max_tokens": 4096,
        "logit_bias": None,
        "chat_template_kwargs": {"enable_thinking": False, "deep": {"a": [1, {"b": 1000.0}]}},
    }


def test_the_model_and_streaming_are_not_for_the_file_to_say() -> None:
    told = problems("""
        models:
          - id: a
            gpu_memory_gb: 20
            request:
              defaults: {model: b}
              overrides: {stream: true}
              default: {}
          - {id: b, gpu_memory_gb: 1, request: {defaults: [1]}}
    """)
    assert [line.partition(": ")[2] for line in told] == [
        "models[a].request.defaults.model: is the client's to say",
        "models[a].request.overrides.stream: is the client's to say",
        'models[a].request.default: unknown key; did you mean "defaults"?',
        "models[b].request.defaults: must be a mapping of a request's parameters to values",
    ]
