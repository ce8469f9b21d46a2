"""The books of memory: what each engine holds on each GPU and in host RAM, and what is left.

Memory is charged from the moment of an order until its answer, at the larger of what the engine
held before and holds after.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from .model import (
    Asleep,
    Awake,
    Down,
    Draining,
    Engine,
    FallingAsleep,
    Gpu,
    ModelId,
    Proving,
    SleepLevel,
    Starting,
    State,
    Stopping,
    Waking,
)

HOST = Gpu(-1)
"""Host RAM, as one more place on the books."""

Books = Counter[Gpu]


def awake(engine: Engine) -> Books:
    """What it holds awake."""
    books = Books(dict.fromkeys(engine.spec.gpus, engine.spec.awake_mib))
    books[HOST] = _host(engine, holds_pinned=engine.holds_pinned)
    return books


def asleep(engine: Engine, level: SleepLevel) -> Books:
    """What it holds asleep. Pinned RAM stays for the life of the process, whatever the level."""
    books = Books(dict.fromkeys(engine.spec.gpus, engine.spec.residue_mib))
    pinned = engine.holds_pinned or level is SleepLevel.ONE
    books[HOST] = _host(engine, holds_pinned=pinned)
    return books


def charge(engine: Engine) -> Books:
    """What it must be assumed to hold now."""
    match engine.phase:
        case Down():
            return Books()
        case Asleep(level=level) | Stopping(slept=SleepLevel() as level):
            return asleep(engine, level)
        case FallingAsleep(level=level):
            return awake(engine) | asleep(engine, level)
        case Starting() | Waking() | Awake() | Draining() | Proving() | Stopping():
            return awake(engine)


def eventual(engine: Engine) -> Books:
    """What it will hold when the order in flight has ended well."""
    match engine.phase:
        case Down() | Stopping():
            return Books()
        case Asleep(level=level) | FallingAsleep(level=level):
            return asleep(engine, level)
        case Starting() | Waking() | Awake() | Draining() | Proving():
            return awake(engine)


def budget(state: State) -> Books:
    return Books({**state.gpus, HOST: state.host_mib})


def total(books: Iterable[Books]) -> Books:
    """The sum. (`sum()` on Counters drops nothing here: every entry is positive.)"""
    result = Books()
    for each in books:
        result.update(each)
    return result


def used(state: State) -> Books:
    return total(charge(engine) for engine in state.engines.values())


def within(books: Books, limit: Books) -> bool:
    return all(amount <= limit[place] for place, amount in books.items())


def fits_now(engines: Mapping[ModelId, Engine], model: ModelId, limit: Books) -> bool:
    """Whether `model` can be awake beside what the others hold at this moment."""
    others = (charge(engine) for name, engine in engines.items() if name != model)
    return within(total([*others, awake(engines[model])]), limit)


def ram_allows(
    engines: Mapping[ModelId, Engine], model: ModelId, level: SleepLevel, limit: Books
) -> bool:
    """Whether host RAM has room at this moment for `model` to be put to sleep at `level`."""
    others = sum(charge(engine)[HOST] for name, engine in engines.items() if name != model)
    return others + asleep(engines[model], level)[HOST] <= limit[HOST]


def _host(engine: Engine, *, holds_pinned: bool) -> int:
    return engine.spec.host_mib + (engine.spec.pinned_mib if holds_pinned else 0)
