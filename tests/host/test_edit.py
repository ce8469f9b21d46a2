"""Models into and out of the text of a configuration."""

from pathlib import Path

import pytest

from homegptd.config.parse import parse
from homegptd.host.additions import Wish, addition, name_for, proposal
from homegptd.host.commands import HostFault
from homegptd.host.edit import added, removed
from homegptd.host.places import Places

SHIPPED = (Path(__file__).parents[2] / "etc/homegpt/config.yaml").read_text()
ENTRY = {"id": "new", "gpu_memory_gb": 7.5, "engine": {"model": "Org/New-8B", "args": {"a": "x y"}}}


def test_a_model_is_added_at_the_end_and_nothing_else_changes() -> None:
    text = added(SHIPPED, ENTRY)
    assert parse(text, "c").models[-1].id == "new"
    block = """
  - id: new
    gpu_memory_gb: 7.5
    engine:
      model: Org/New-8B
      args:
        a: "x y"
"""
    assert text.count(block) == 1
    assert text.replace(block, "") == SHIPPED


def test_comments_below_a_model_stay_with_it() -> None:
    text = added(SHIPPED, ENTRY)
    assert text.index("on older cards add kv-cache-dtype") < text.index("- id: new")


def test_removing_what_was_added_gives_the_same_text() -> None:
    assert removed(added(SHIPPED, ENTRY), "new") == SHIPPED


@pytest.mark.parametrize("ident", [model.id for model in parse(SHIPPED, "c").models])
def test_each_model_can_be_removed_with_its_comments(ident: str) -> None:
    text = removed(SHIPPED, ident)
    left = [model.id for model in parse(text, "c").models]
    assert left == [model.id for model in parse(SHIPPED, "c").models if model.id != ident]
    assert ("about 160 GB of weights" in text) == (ident != "qwen3-next-80b-a3b-thinking")
    assert ("fp8 KV cache its attention" in text) == (ident != "gpt-oss-20b")
    assert "── Requests" in text


@pytest.mark.parametrize("text", ["models: [{id: a, gpu_memory_gb: 1}]\n", "models:\n", "x: 1\n"])
def test_a_list_on_one_line_is_not_edited(text: str) -> None:
    with pytest.raises(HostFault, match="not a list of lines"):
        added(text, ENTRY)


def test_who_is_not_there_cannot_be_removed() -> None:
    with pytest.raises(HostFault, match='no model "nobody"'):
        removed(SHIPPED, "nobody")


# ------------------------------------------------------------ figures


def places(tmp_path: Path) -> Places:
    (tmp_path / "var/cache/homegpt/hf/hub").mkdir(parents=True)
    return Places(tmp_path)


def cache_model(tmp_path: Path, *, size: int, longest: int) -> None:
    folder = tmp_path / "var/cache/homegpt/hf/hub/models--Org--New"
    files = folder / "snapshots/abc"
    files.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    shape = '"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8'
    (files / "config.json").write_text(
        f'{{"text_config": {{{shape}, "head_dim": 128}}, "max_position_embeddings": {longest}}}'
    )
    with (files / "model.safetensors").open("wb") as file:
        file.truncate(size)


PLAIN = "models:\n  - id: a\n    gpu_memory_gb: 20\n"


def test_figures_come_from_the_files_in_the_cache(tmp_path: Path) -> None:
    cache_model(tmp_path, size=16 * 2**30, longest=16384)
    found = addition(Wish("Org/New"), PLAIN, Places(tmp_path))
    model = parse(found.text, "c").models[-1]
    # 2 answers of 16384 tokens, each 2 * 32 layers * 8 heads * 128 * 2 bytes, and 2 for context
    assert (model.weights_gb, model.gpu_memory_gb) == (16, 22)
    assert "weights 16.0 + KV cache 4.0 + context 2.0 = 22.0 GB" in found.reasons[0]


def test_a_common_length_that_the_model_cannot_do_is_lowered(tmp_path: Path) -> None:
    cache_model(tmp_path, size=2**30, longest=16384)
    text = f"engine:\n  args: {{max-model-len: 262144}}\n{PLAIN}"
    engine = parse(addition(Wish("Org/New"), text, Places(tmp_path)).text, "c").models[-1].engine
    assert engine is not None
    assert engine.args == ("--max-model-len", "16384")


def test_a_model_that_nobody_knows_needs_a_figure(tmp_path: Path) -> None:
    at = places(tmp_path)
    with pytest.raises(HostFault, match="cannot tell how much memory") as caught:
        addition(Wish("Org/Mystery"), PLAIN, at)
    assert caught.value.hint == "homegptctl add Org/Mystery --gpu-memory-gb N"
    given = addition(Wish("Org/Mystery", gpu_memory_gb=9), PLAIN, at)
    assert parse(given.text, "c").models[-1].gpu_memory_gb == 9


def test_flags_and_gpus_are_taken_over(tmp_path: Path) -> None:
    wish = Wish("Org/X-8B", id="x", gpus=(0, 1), args=("--dtype=half", "enforce-eager", "n=4"))
    model = parse(addition(wish, PLAIN, places(tmp_path)).text, "c").models[-1]
    assert model.engine is not None
    assert model.gpus == (0, 1)
    assert model.engine.args == (
        *("--dtype", "half", "--enforce-eager", "--n", "4"),
        *("--tensor-parallel-size", "2"),
    )


@pytest.mark.parametrize(
    ("name", "ident"),
    [("Qwen/Qwen3-8B", "qwen3-8b"), ("/srv/My Model/", "my-model"), ("a/__", "model")],
)
def test_ids_are_made_from_names(name: str, ident: str) -> None:
    assert name_for(name) == ident


def test_a_box_without_anything_still_gets_a_sound_proposal(tmp_path: Path) -> None:
    config = parse(proposal(places(tmp_path)), "c")
    assert len(config.models) == 1
    assert config.default_model is not None
