"""The models and their engines, each checked for itself."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import yaml

from .flags import Flag, flags, gpus_needed, merged
from .nodes import join, shown
from .request import request
from .schema import (
    DEFAULT_IMAGE,
    EngineConfig,
    EngineKind,
    GpuConfig,
    IdleConfig,
    ModelConfig,
    SleepChoice,
    StartupMode,
    SwitchingConfig,
    Trust,
)
from .sections import DEADLINE, IMAGE, PORT, SECONDS, SECONDS_ABOVE_0, TRUST
from .table import Table
from .values import (
    Bad,
    Item,
    Reader,
    choice,
    flag,
    found,
    is_null,
    listing,
    matching,
    number,
    one_or_more,
    text,
    whole,
)

MODEL_ID = matching(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}",
    "letters, digits, dots, dashes and underscores (it becomes part of a unit's name)",
)
ALIAS = matching(r"\S{1,200}", "a name without blanks")
CONTAINER = matching(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}",
    "letters, digits, dots, dashes and underscores, as Podman wants it",
)
VOLUME = matching(r"[^:]+:/[^:]*(:[^:]+)?", "host:/container or host:/container:options")
STARTUP: Reader[StartupMode] = choice(
    {"disabled": "disabled", "sleep": "sleep", "active": "active"}
)
LEVEL: Reader[SleepChoice] = choice({"auto": "auto", "1": 1, "2": 2})
KIND: Reader[EngineKind] = choice(
    {"generate": "generate", "embed": "embed", "score": "score", "audio": "audio"}
)
GIB = number(above=0, most=16384)

_IN_ENGINE = ("args", "command", "env", "image", "kind", "model", "network",
              "start_timeout_s", "volumes")  # fmt: skip
_IN_MODEL = ("aliases", "gpus", "name", "port", "priority")


@dataclass(frozen=True, slots=True)
class Defaults:
    """The file's top-level `engine:`, which every model with an engine starts from."""

    image: str
    args: tuple[Flag, ...]
    env: Mapping[str, str]
    volumes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """A model with the table it came from, for the lines of later problems."""

    model: ModelConfig
    table: Table
    gpus_needed: int | None
    """By its parallel sizes; None where nothing says."""


def defaults(root: Table) -> Defaults:
    table = root.section("engine")
    read = Defaults(
        image=table.get("image", IMAGE, DEFAULT_IMAGE),
        args=table.get("args", flags, ()),
        env=table.get("env", environment, {}),
        volumes=table.get("volumes", listing(VOLUME), ()),
    )
    table.finish()
    return read


def models(
    root: Table,
    *,
    base: Defaults,
    cards: Sequence[GpuConfig],
    switching: SwitchingConfig,
    trust: Trust,
) -> tuple[Read, ...]:
    entries = root.need("models", listing(_keep, most=500), None)
    if entries == ():
        root.problem("models", "must be a list of at least one model")
    limit = switching.max_retries * switching.health_check_interval_seconds
    return tuple(
        _model(_named(e), base=base, cards=cards, limit_s=limit, trust=trust) for e in entries or ()
    )


def _keep(item: Item) -> Item:
    return item


def _named(item: Item) -> Item:
    """The item under its model's id, which tells a person more than a number."""
    if isinstance(item.node, yaml.MappingNode):
        for key, value in item.node.value:
            if key.value == "id" and isinstance(value, yaml.ScalarNode) and value.value:
                return Item(item.node, f"models[{shown(value.value)}]", item.document)
    return item


def _model(
    item: Item, *, base: Defaults, cards: Sequence[GpuConfig], limit_s: float, trust: Trust
) -> Read:
    table = Table(item)
    ident = table.need("id", MODEL_ID, "")
    engine = _engine(table, base)
    memory = table.need("gpu_memory_gb", GIB, 0.0)
    needed = _needed(table, engine)
    gpus = table.get("gpus", one_or_more(whole(0, 63)), None)
    if gpus == ():
        table.problem("gpus", "must name at least one GPU")
    model = ModelConfig(
        id=ident,
        gpu_memory_gb=memory,
        name=table.get("name", text, ident),
        container_name=table.get("container_name", CONTAINER, f"vllm-{ident}"),
        port=table.get("port", PORT, 8000),
        host_port=table.get("host_port", PORT, None),
        startup_mode=table.get("startup_mode", STARTUP, "sleep"),
        aliases=table.get("aliases", one_or_more(ALIAS), ()),
        gpus=gpus or _first_gpus(memory, cards, needed if engine else None),
        weights_gb=table.get("weights_gb", GIB, None),
        residue_gb=table.get("residue_gb", number(least=0, most=16384), None),
        sleep_level=table.get("sleep_level", LEVEL, "auto"),
        idle=_idle(table),
        pinned=table.get("pinned", flag, default=False),
        priority=table.get("priority", whole(-1000, 1000), 0),
        auto_switch=table.get("auto_switch", flag, default=True),
        drain_s=table.get("drain_s", SECONDS, None),
        on_deadline=table.get("on_deadline", DEADLINE, None),
        first_byte_timeout_s=table.get("first_byte_timeout_s", SECONDS_ABOVE_0, None),
        between_bytes_timeout_s=table.get("between_bytes_timeout_s", SECONDS_ABOVE_0, None),
        request=request(table),
        trust=table.get("trust", TRUST, trust),
        engine=engine,
        start_limit_s=(engine and engine.start_timeout_s) or limit_s,
        estimated=_estimated(table, needed),
    )
    table.finish(lambda key: "it belongs below engine:" if key in _IN_ENGINE else None)
    return Read(model, table, needed)


def _estimated(table: Table, needed: int | None) -> frozenset[str]:
    guessed = {key for key in ("gpus", "weights_gb", "residue_gb") if key not in table}
    return frozenset(guessed if needed is None else guessed - {"gpus"})


def _engine(table: Table, base: Defaults) -> EngineConfig | None:
    section = table.table("engine")
    if section is None:
        return None
    env = {**base.env, **section.get("env", environment, {})}
    command = section.get("command", listing(text), None)
    engine = EngineConfig(
        model=section.get("model", text, None),
        image=section.get("image", IMAGE, base.image),
        args=merged(base.args, section.get("args", flags, ())),
        env=MappingProxyType(env),
        command=command,
        volumes=(*base.volumes, *section.get("volumes", listing(VOLUME), ())),
        network=section.get("network", flag, default=False),
        kind=section.get("kind", KIND, "generate"),
        start_timeout_s=section.get("start_timeout_s", SECONDS_ABOVE_0, None),
    )
    if "model" not in section and "command" not in section:
        section.problem("model", "missing: say what vLLM is to load, or give a command")
    if command == () and "command" in section:
        section.problem("command", "must be a list of at least one word")
    section.finish(lambda key: "it belongs to the model, above" if key in _IN_MODEL else None)
    return engine


def _idle(table: Table) -> IdleConfig | None:
    section = table.table("idle")
    if section is None:
        return None
    idle = IdleConfig(
        sleep_after_s=section.get("sleep_after_s", SECONDS_ABOVE_0, None),
        stop_after_s=section.get("stop_after_s", SECONDS_ABOVE_0, None),
    )
    sleep, stop = idle.sleep_after_s, idle.stop_after_s
    if sleep is not None and stop is not None and stop <= sleep:
        section.problem("stop_after_s", f"{stop:g} must be more than sleep_after_s, {sleep:g}")
    section.finish()
    return idle


def environment(item: Item) -> Mapping[str, str]:
    """Names and values as written; an empty value is an empty string."""
    if not isinstance(item.node, yaml.MappingNode):
        raise Bad(f"{found(item.node)}, must be a mapping of names to values")
    table = Table(item)
    values: dict[str, str] = {}
    for key in tuple(table.rest()):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            table.problem(key, "is no name of an environment variable")
        child = table.at(key)
        values[key] = "" if is_null(child.node) else table.get(key, text, "")
    return values


def _needed(table: Table, engine: EngineConfig | None) -> int | None:
    """GPUs by the parallel sizes; a plain `vllm serve` without any needs one."""
    if engine is None:
        return None
    try:
        if engine.command is not None:
            return gpus_needed(engine.command)
        return gpus_needed(engine.args) or 1
    except Bad as bad:
        table.item.document.problems.add(
            table.line("engine"), join(table.item.path, "engine.args"), str(bad)
        )
        return None


def _first_gpus(
    memory_gb: float, cards: Sequence[GpuConfig], needed: int | None
) -> tuple[int, ...]:
    """The first cards: as many as needed, else as few as hold the model, as far as is known."""
    indices = tuple(card.index for card in cards) or tuple(range(needed or 1))
    if needed is not None:
        return indices[:needed]
    for count in range(1, len(indices) + 1):
        sizes = [card.memory_mib for card in cards[:count]]
        if all(size is None or memory_gb * 1024 / count <= size for size in sizes):
            return indices[:count]
    return indices
