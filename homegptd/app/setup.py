"""What a configuration comes to: specs for the machine, launches for its engines."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from msgspec.structs import replace

from homegptd.adapters.processes import Launch
from homegptd.config.schema import (
    HOST_PER_ENGINE_GB,
    Config,
    ModelConfig,
    RouterConfig,
    command_line,
)
from homegptd.core.memory import Card, Kind
from homegptd.core.model import (
    EngineSpec,
    Gpu,
    ModelId,
    OnDeadline,
    Policy,
    SleepLevel,
    Startup,
)
from homegptd.faces.adjust import Adjustment
from homegptd.faces.ask import Limits
from homegptd.host import box, weights
from homegptd.host.places import Places as HostPlaces

HOST_MIB_PER_ENGINE = round(HOST_PER_ENGINE_GB * 1024)
HOST_RESERVE_MIB = 4096
"""RAM left to the box itself where the configuration does not say what engines may have."""
DESKTOP_SHARE = 1 / 32
"""Of a card, for what else is on it, where only the driver knows its size."""
Cards = Mapping[Gpu, Card]
NO_CARDS: Cards = MappingProxyType({})
LEVEL_ONE_FROM_GB = 64
"""The original manager's rule: with less RAM than this, sleepers discard their weights."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where engines have their sockets and their logs."""

    sockets: Path
    logs: Path

    def socket(self, model: str) -> Path:
        return self.sockets / model / "engine.sock"

    def image_note(self, model: str) -> Path:
        """Root's word on which image the engine was started from; beside the sockets' folder, where
        no engine can write."""
        return self.sockets.with_name("images") / model

    def log(self, model: str) -> Path:
        return self.logs / f"{model}.log"


@dataclass(frozen=True, slots=True)
class Setup:
    """A configuration in the words of the machine and of the process backend."""

    config: Config
    specs: tuple[EngineSpec, ...]
    policy: Policy
    gpus: Mapping[Gpu, int]
    host_mib: int
    launches: Mapping[ModelId, Launch]
    addresses: Mapping[ModelId, Path | str]
    limits: Mapping[ModelId, Limits]
    """How long each engine may say nothing over an answer."""

    def fingerprint(self, model: ModelId) -> str | None:
        """Of all that an engine is started with and reached by; None if there is no such model."""
        return next((spec.fingerprint for spec in self.specs if spec.model == model), None)

    @property
    def doors(self) -> dict[ModelId, str]:
        """Where each model has a door of its own. A unit written by hand keeps its port itself."""
        return {
            ModelId(m.id): f"127.0.0.1:{m.host_port}"
            for m in self.config.models
            if m.host_port is not None and m.engine is not None
        }

    @property
    def kinds(self) -> dict[ModelId, str]:
        """What each model is for; a unit written by hand says nothing of it."""
        return {ModelId(m.id): m.engine.kind for m in self.config.models if m.engine is not None}

    @property
    def by_id_only(self) -> frozenset[ModelId]:
        """Models whose engine may know no alias: somebody else wrote how it is started."""
        return frozenset(ModelId(m.id) for m in self.config.models if not _knows_aliases(m))

    @property
    def adjustments(self) -> dict[ModelId, Adjustment]:
        """What is set in requests, for the models that have anything set."""
        told = {
            m.id: Adjustment(m.request.defaults, m.request.overrides) for m in self.config.models
        }
        return {ModelId(name): each for name, each in told.items() if each}

    @property
    def names(self) -> dict[ModelId, tuple[str, tuple[str, ...]]]:
        return {ModelId(m.id): (m.name or m.id, m.aliases) for m in self.config.models}


def set_up(config: Config, places: Places, cards: Cards = NO_CARDS) -> Setup:
    """`cards`: the box's as their driver tells them; empty without one."""
    specs = tuple(_spec(model, config) for model in config.models)
    specs = tuple(_capped(spec, config, specs, cards) for spec in specs)
    return Setup(
        config=config,
        specs=specs,
        policy=_policy(config),
        gpus=_gpus(config, specs, cards),
        host_mib=_host_mib(config),
        launches={ModelId(m.id): _launch(m, places) for m in config.models},
        addresses={ModelId(m.id): _address(m, places) for m in config.models},
        limits={ModelId(m.id): _limits(m, config.router) for m in config.models},
    )


def _spec(model: ModelConfig, config: Config) -> EngineSpec:
    idle = model.idle
    pinned, guessed = _weights(model)
    trusted = model.trust == "configured"
    return EngineSpec(
        model=ModelId(model.id),
        gpus=tuple(Gpu(index) for index in model.gpus),
        awake_mib=model.gpu_memory_mib_each,
        residue_mib=model.residue_mib_each,
        pinned_mib=pinned,
        host_mib=HOST_MIB_PER_ENGINE,
        pinned_margin_mib=0 if guessed or trusted else pinned,
        estimated=_estimated(model),
        trust_given=trusted,
        startup=Startup(model.startup_mode),
        level=None if model.sleep_level == "auto" else SleepLevel(model.sleep_level),
        pinned=model.pinned,
        priority=model.priority,
        auto_switch=model.auto_switch and config.router.auto_switch,
        on_deadline=None if model.on_deadline is None else OnDeadline(model.on_deadline),
        drain_s=model.drain_s,
        sleep_after_s=idle.sleep_after_s if idle else None,
        stop_after_s=idle.stop_after_s if idle else None,
        fingerprint=_fingerprint(model),
    )


def _weights(model: ModelConfig) -> tuple[int, bool]:
    """MiB, and whether they are but a guess from `gpu_memory_gb`, which is high as it is."""
    engine = model.engine
    if model.weights_gb is None and engine is not None and engine.model is not None:
        places = box.caches(HostPlaces())
        gib = weights.on_disk_gib(engine.model, places, weights.revision(engine.args))
        if gib:
            return min(math.ceil(gib * 1024), model.gpu_memory_mib), False
    return model.weights_mib, model.weights_gb is None


def _estimated(model: ModelConfig) -> frozenset[Kind]:
    """Host RAM is never given."""
    guessed = {Kind.PINNED: "weights_gb", Kind.RESIDUE: "residue_gb"}
    return frozenset({Kind.HOST, *(k for k, key in guessed.items() if key in model.estimated)})


def _capped(
    spec: EngineSpec, config: Config, specs: tuple[EngineSpec, ...], cards: Cards
) -> EngineSpec:
    """What is given in round numbers may be a little more than a card has beside its sleepers.

    The original manager took for granted that each model fits; up to a tenth that is taken off,
    until the model is measured. Not for cards whose size is given: that was checked already.
    """
    given = {Gpu(card.index) for card in config.gpus if card.memory_mib is not None}
    awake = spec.awake_mib
    for gpu in spec.gpus:
        if gpu in cards and gpu not in given:
            asleep = sum(o.residue_mib for o in specs if gpu in o.gpus and o.model != spec.model)
            awake = min(awake, round(cards[gpu].total_mib * (1 - DESKTOP_SHARE)) - asleep)
    return replace(spec, awake_mib=max(awake, math.ceil(0.9 * spec.awake_mib)))


def _knows_aliases(model: ModelConfig) -> bool:
    if model.engine is None:
        return False
    command = model.engine.command
    return command is None or set(model.aliases) <= set(command)


def _fingerprint(model: ModelConfig) -> str:
    """Of what the engine is started with: when it changes, the engine has to start again."""
    engine = model.engine
    told = [model.container_name, model.port, list(model.gpus), list(model.names)]
    if engine is None:
        told.append(model.host_port)
    else:
        given = {**_plain(engine), "env": dict(engine.env)}
        told.append(json.dumps(given, sort_keys=True))
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _plain(engine: object) -> dict[str, object]:
    fields = getattr(engine, "__dataclass_fields__", {})
    return {name: getattr(engine, name) for name in fields if name != "env"}


def _policy(config: Config) -> Policy:
    router: RouterConfig = config.router
    default = config.default_model
    ram_gb = config.available_ram_gb
    low = ram_gb is not None and ram_gb < LEVEL_ONE_FROM_GB
    return Policy(
        default=ModelId(default.id) if default else None,
        level=SleepLevel.TWO if low else SleepLevel.ONE,
        patience_s=router.patience_s,
        residency_s=router.min_residency_s,
        switch_share=router.switch_share,
        drain_s=router.drain_s,
        on_deadline=OnDeadline(router.on_deadline),
        max_answer_s=router.max_answer_s,
        freeze_max_s=router.freeze_max_s,
        rouse=router.rouse,
        return_to_default_s=router.return_to_default_s,
        max_waiting=router.max_waiting,
        max_wait_s=router.max_wait_s,
    )


def _gpus(config: Config, specs: tuple[EngineSpec, ...], cards: Cards) -> dict[Gpu, int]:
    """Each card's memory as given, but not more than it has; else what it has.

    Where nobody knows it counts as just large enough for its largest model beside the residues of
    the others: what the original manager took for granted."""
    given = {Gpu(card.index): card.memory_mib for card in config.gpus}
    named = {gpu for spec in specs for gpu in spec.gpus}
    sizes: dict[Gpu, int] = {}
    for gpu in sorted({*given, *named}):
        known = [given.get(gpu), cards[gpu].total_mib if gpu in cards else None]
        sizes[gpu] = min((mib for mib in known if mib), default=0) or _assumed(gpu, specs)
    return sizes


def _assumed(gpu: Gpu, specs: tuple[EngineSpec, ...]) -> int:
    here = [spec for spec in specs if gpu in spec.gpus]
    residues = sum(spec.residue_mib for spec in here)
    return max((spec.awake_mib - spec.residue_mib for spec in here), default=0) + residues


def _host_mib(config: Config) -> int:
    if config.available_ram_gb is not None:
        return round(config.available_ram_gb * 1024)
    return max(_host_total_mib() - HOST_RESERVE_MIB, 0)


def _host_total_mib() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return 0


def _launch(model: ModelConfig, places: Places) -> Launch:
    tcp = model.engine is not None and model.engine.over_tcp
    socket = None if tcp else places.socket(model.id)
    argv = command_line(model, socket=str(places.socket(model.id))) or ()
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    given = dict(model.engine.env) if model.engine else {}
    return Launch(argv=argv, env={**env, **given}, socket=socket, log=places.log(model.id))


def _limits(model: ModelConfig, router: RouterConfig) -> Limits:
    first, between = model.first_byte_timeout_s, model.between_bytes_timeout_s
    return Limits(
        first_byte_s=router.first_byte_timeout_s if first is None else first,
        between_bytes_s=router.between_bytes_timeout_s if between is None else between,
    )


def _address(model: ModelConfig, places: Places) -> Path | str:
    """The engine's socket; for a unit written by hand the port it publishes."""
    if model.engine is None:
        return f"http://127.0.0.1:{model.host_port or model.port}"
    if model.engine.over_tcp:
        return f"http://127.0.0.1:{model.port}"
    return places.socket(model.id)
