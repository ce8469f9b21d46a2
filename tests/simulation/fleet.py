"""One random box, drawn from a seed: cards, RAM, models, policy, and how wild it gets."""

from dataclasses import dataclass
from random import Random

from msgspec import Struct
from msgspec.structs import replace

from homegptd.core.memory import Kind
from homegptd.core.model import (
    EngineSpec,
    Gpu,
    ModelId,
    OnDeadline,
    Policy,
    SleepLevel,
    Startup,
)
from homegptd.sim.physics import GIB, Footprint

NAMES = ("ada", "bo", "cy", "dee", "eve", "fay", "gil", "hal", "ivy", "jo", "kit", "lou")
START_LIMIT_S = 400.0


class Model(Struct, frozen=True):
    """What the configuration says of a model, what is true of it, and how it is used."""

    spec: EngineSpec
    foot: Footprint
    levels: frozenset[SleepLevel]
    can_keep: bool
    tells_level: bool
    freezes_well: bool
    """Whether its freeze proof holds."""
    embeds: bool
    leak_mib: int = 0
    """What each sleep leaves on each card, beside what the one before it left."""

    @property
    def id(self) -> ModelId:
        return self.spec.model


@dataclass(frozen=True, slots=True)
class Mood:
    """How often things go wrong: probability for each order, mean seconds between events."""

    order_fault: float = 0.0
    death_s: float | None = None
    hang_s: float | None = None
    operator_s: float | None = None
    reload_s: float | None = None
    restart_s: float | None = None

    @property
    def calm(self) -> bool:
        return self == Mood()


@dataclass(frozen=True, slots=True)
class Fleet:
    gpus: dict[Gpu, int]
    ram_mib: int
    models: tuple[Model, ...]
    spare: tuple[Model, ...]
    """Models that a reload may add."""
    policy: Policy
    mood: Mood
    contended: bool = False
    """Two models that exclude each other, both wanted all the time."""

    @property
    def host_mib(self) -> int:
        return self.ram_mib


def draw(rng: Random) -> Fleet:
    """Any box."""
    gpus = _gpus(rng)
    names = list(NAMES)
    drawn = [_model(rng, ModelId(names.pop(0)), gpus) for _ in range(rng.randint(2, 8))]
    spare = [_model(rng, ModelId(names.pop(0)), gpus) for _ in range(2)]
    models = _with_active(rng, drawn)
    ram = _ram(rng, [*models, *spare])
    mood = _mood(rng)
    policy = _policy(rng, models, calm=mood.calm)
    if not mood.calm and rng.random() < 0.6:
        models, spare = [[_roughly(rng, m, gpus) for m in some] for some in (models, spare)]
    return Fleet(gpus, ram, tuple(models), tuple(spare), policy, mood)


def draw_contended(rng: Random) -> Fleet:
    """One card, two or three models of which only one fits; nothing given that could be derived."""
    gpus = {Gpu(0): 80 * GIB}
    names = list(NAMES)
    models = []
    for _ in range(rng.randint(2, 3)):
        size = round(rng.uniform(50, 64) * GIB)
        model = _sized(rng, ModelId(names.pop(0)), gpus, (Gpu(0),), size)
        spec = replace(model.spec, level=None, priority=0, pinned=False, sleep_after_s=None)
        spec = replace(
            spec, startup=Startup.SLEEP, drain_s=None, on_deadline=None, auto_switch=True
        )
        models.append(replace(model, spec=spec, levels=frozenset(SleepLevel)))
    ram = sum(m.spec.pinned_mib * 1.02 + m.spec.host_mib * 1.125 for m in models) + GIB
    share = rng.choice((0.1, 0.2, 0.3))
    policy = Policy(switch_share=share, drain_s=rng.choice((5.0, 30.0)), max_wait_s=36000.0)
    return Fleet(gpus, round(ram), tuple(models), (), policy, Mood(), contended=True)


def _gpus(rng: Random) -> dict[Gpu, int]:
    size = rng.choice((24, 48, 80, 96)) * GIB
    return {Gpu(index): size for index in range(rng.choice((1, 1, 1, 2, 2, 3)))}


def _model(rng: Random, name: ModelId, gpus: dict[Gpu, int]) -> Model:
    count = rng.choice((1, 1, 2, len(gpus))) if len(gpus) > 1 else 1
    chosen = tuple(sorted(rng.sample(sorted(gpus), count)))
    share = rng.choice((rng.uniform(0.6, 0.92), rng.uniform(0.3, 0.5), rng.uniform(0.1, 0.16)))
    return _sized(rng, name, gpus, chosen, round(gpus[chosen[0]] * share), embeds=share < 0.2)


def _sized(
    rng: Random,
    name: ModelId,
    gpus: dict[Gpu, int],
    chosen: tuple[Gpu, ...],
    awake_mib: int,
    *,
    embeds: bool = False,
) -> Model:
    """A model that holds at most `awake_mib` on each of its cards."""
    residue = rng.randint(400, 1600)
    rest = awake_mib - residue - 200
    weights = round(rest * rng.choice((rng.uniform(0.1, 0.3), rng.uniform(0.4, 0.8)))) * len(chosen)
    foot = Footprint(
        gpus=tuple(int(gpu) for gpu in chosen),
        weights_mib=weights,
        kv_mib=rest * len(chosen) - weights - len(chosen),
        residue_mib=residue,
        rss_mib=rng.randint(2, 5) * GIB,
        utilisation=(awake_mib - 100) / max(gpus[gpu] for gpu in chosen),
    )
    spec = EngineSpec(
        model=name,
        gpus=chosen,
        awake_mib=awake_mib,
        residue_mib=residue,
        pinned_mib=foot.pinned_mib,
        host_mib=foot.rss_mib + foot.buffers_mib,
        startup=Startup.DISABLED if rng.random() < 0.1 else Startup.SLEEP,
        level=rng.choice((None, None, None, SleepLevel.ONE, SleepLevel.TWO)),
        pinned=rng.random() < (0.2 if embeds else 0.05),
        priority=rng.choice((0, 0, 0, 1, 3)),
        auto_switch=rng.random() < 0.95,
        on_deadline=rng.choice((None, None, None, *OnDeadline)),
        drain_s=rng.choice((None, None, 3.0, 40.0)),
        sleep_after_s=rng.choice((None, None, None, 300.0)),
        stop_after_s=rng.choice((None, None, None, 3600.0)),
        fingerprint=f"{name}-1",
    )
    both = frozenset(SleepLevel)
    return Model(
        spec,
        foot,
        levels=rng.choice((both, both, both, frozenset({SleepLevel.ONE}), frozenset())),
        can_keep=rng.random() < 0.8,
        tells_level=rng.random() < 0.7,
        freezes_well=rng.random() < 0.85,
        embeds=embeds,
    )


def _with_active(rng: Random, models: list[Model]) -> list[Model]:
    wake = {0} if rng.random() < 0.7 else set()
    if rng.random() < 0.3:
        wake.add(len(models) - 1)
    return [
        replace(m, spec=replace(m.spec, startup=Startup.ACTIVE)) if place in wake else m
        for place, m in enumerate(models)
    ]


def _roughly(rng: Random, model: Model, gpus: dict[Gpu, int]) -> Model:
    """What the configuration says of it is not what is true."""
    spec, foot = model.spec, model.foot
    awake = round(spec.awake_mib * rng.uniform(0.8, 1.1))
    given = replace(
        spec,
        awake_mib=min(awake, min(gpus.values()) * 95 // 100),
        residue_mib=768,
        pinned_mib=foot.weights_mib,
        pinned_margin_mib=foot.weights_mib,
        host_mib=4 * GIB,
        estimated=frozenset({Kind.RESIDUE, Kind.HOST}),
    )
    within_margin = (foot.weights_mib + foot.kv_mib) // len(foot.gpus) // 100
    return replace(model, spec=given, leak_mib=rng.choice((0, 0, 10, within_margin)))


def changed(rng: Random, model: Model, gpus: dict[Gpu, int]) -> Model:
    """The same model with other flags: another size, and an engine that has to start again."""
    size = min(round(model.spec.awake_mib * rng.uniform(0.7, 1.2)), max(gpus.values()) * 92 // 100)
    new = _sized(rng, model.id, gpus, model.spec.gpus, size, embeds=model.embeds)
    number = int(model.spec.fingerprint.rpartition("-")[2]) + 1
    return replace(new, spec=replace(new.spec, fingerprint=f"{model.id}-{number}"))


def _ram(rng: Random, models: list[Model]) -> int:
    """From so tight that few may sleep at level 1, to ample. Each alone fits, and can sleep."""
    each = [m.spec.pinned_mib * 1.3 + m.spec.host_mib for m in models]
    return round(max(max(each) + 8 * GIB, sum(each) * rng.uniform(0.4, 1.3)))


def _mood(rng: Random) -> Mood:
    if rng.random() < 0.25:
        return Mood()
    hour = 3600.0
    return Mood(
        order_fault=rng.choice((0.0, 0.01, 0.05)),
        death_s=rng.choice((None, 4 * hour, 12 * hour)),
        hang_s=rng.choice((None, 8 * hour)),
        operator_s=rng.choice((None, 0.25 * hour, 2 * hour)),
        reload_s=rng.choice((None, None, 2 * hour)),
        restart_s=rng.choice((None, 1.5 * hour, 6 * hour)),
    )


def _policy(rng: Random, models: list[Model], *, calm: bool) -> Policy:
    default = rng.choice(models).id if rng.random() < 0.7 else None
    return Policy(
        default=default,
        level=rng.choice((SleepLevel.ONE, SleepLevel.ONE, SleepLevel.TWO)),
        patience_s=rng.choice((None, None, 5.0, 60.0)),
        residency_s=rng.choice((None, None, 10.0, 90.0)),
        drain_s=rng.choice((5.0, 10.0, 60.0)),
        on_deadline=rng.choice(tuple(OnDeadline)),
        max_answer_s=rng.choice((120.0, 400.0, 900.0)),
        freeze_max_s=rng.choice((60.0, 300.0)),
        max_waiting=rng.choice((8, 64, 256)),
        max_wait_s=36000.0 if calm else rng.choice((60.0, 300.0, 900.0)),
        prove_after_s=rng.choice((10.0, 30.0, 120.0)),
        return_to_default_s=rng.choice((None, None, 600.0)),
    )
