"""How deep an engine may sleep: by what it was told, what is proved, and what RAM is left."""

from collections.abc import Iterator, Mapping

from . import ledger
from .ledger import Books
from .model import Engine, ModelId, Policy, Proof, SleepLevel

Displacements = Mapping[ModelId, SleepLevel | None]
"""How each engine in the way makes room: the level it sleeps at, or None: it is stopped."""


def levels(engine: Engine, policy: Policy) -> Iterator[SleepLevel]:
    """The levels it may sleep at, best first. None of them: it has to be stopped."""
    can = engine.traits.levels if engine.traits else frozenset()
    reloads = engine.traits is not None and engine.traits.proofs.get(Proof.RELOAD, False)
    wanted = engine.spec.level or policy.level
    if wanted is SleepLevel.ONE and SleepLevel.ONE in can:
        yield SleepLevel.ONE
    if engine.spec.level is not SleepLevel.ONE and SleepLevel.TWO in can and reloads:
        yield SleepLevel.TWO
    if engine.spec.level is None and wanted is SleepLevel.TWO and SleepLevel.ONE in can:
        yield SleepLevel.ONE  # rather than be stopped, where RAM has room after all


def resting_level(
    engines: Mapping[ModelId, Engine], model: ModelId, policy: Policy, limit: Books
) -> SleepLevel | None:
    """The level at which `model` can sleep beside the others; None: only stopping it works."""
    can = levels(engines[model], policy)
    return next((level for level in can if rests_at(engines, model, level, limit)), None)


def rests_at(
    engines: Mapping[ModelId, Engine], model: ModelId, level: SleepLevel, limit: Books
) -> bool:
    """Whether host RAM has room for `model` asleep at `level` once all orders have ended."""
    if ledger.takes_no_more(engines[model], level):
        return True
    need = ledger.asleep(engines[model], level)[ledger.HOST]
    others = sum(
        ledger.eventual(engine)[ledger.HOST] for name, engine in engines.items() if name != model
    )
    return others + need <= limit[ledger.HOST]


def why_none(engine: Engine, asked: SleepLevel | None) -> str:
    """Why it cannot sleep now at the level that was asked for, or at any."""
    traits = engine.traits
    proved = traits is not None and traits.proofs.get(Proof.RELOAD, False)
    if traits is not None and traits.why_no_sleep is not None:
        return traits.why_no_sleep
    if asked is SleepLevel.TWO and not proved:
        return "level 2 is not proved on this box"
    return f"no host RAM left{' and no proved level 2' if asked is None and not proved else ''}"


def worth_proving(engine: Engine, policy: Policy) -> bool:
    """Whether knowing that a reload works would let it sleep at level 2."""
    traits = engine.traits
    return (
        traits is not None
        and SleepLevel.TWO in traits.levels
        and Proof.RELOAD not in traits.proofs
        and Proof.RELOAD not in engine.unproved
        and engine.spec.level is not SleepLevel.ONE
    )
