"""The books of memory: what each engine holds on each GPU and in host RAM, and what is left.

Memory is charged from the moment of an order until its answer, at the larger of what the engine
held before and holds after.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from . import figures
from .memory import HOST as HOST
from .memory import Kind
from .model import (
    Asleep,
    Awake,
    Down,
    Draining,
    Engine,
    FallingAsleep,
    Gpu,
    ModelId,
    Phase,
    Proving,
    Roused,
    Rousing,
    SleepLevel,
    Starting,
    State,
    Stopping,
    Waking,
)

Books = Counter[Gpu]


def awake(engine: Engine) -> Books:
    """What it holds awake."""
    books = _on_gpus(engine, Kind.AWAKE)
    books[HOST] = _host(engine, holds_pinned=engine.holds_pinned)
    return books


def asleep(engine: Engine, level: SleepLevel) -> Books:
    """What it holds asleep. Pinned RAM stays for the life of the process, whatever the level."""
    books = _on_gpus(engine, Kind.RESIDUE)
    pinned = engine.holds_pinned or level is SleepLevel.ONE
    books[HOST] = _host(engine, holds_pinned=pinned)
    return books


def roused(engine: Engine, level: SleepLevel) -> Books:
    """What it holds when its weights alone are awake, after a sleep at `level`."""
    return asleep(engine, level) | _on_gpus(engine, Kind.ROUSED)


def charge(engine: Engine) -> Books:
    """What it must be assumed to hold now."""
    match engine.phase:
        case Down():
            return Books()
        case Rousing(level=level) | Roused(level=level):
            return roused(engine, level)
        case FallingAsleep(level=level, roused=True):
            return roused(engine, level)
        case Stopping(slept=SleepLevel() as level, roused=True):
            return roused(engine, level)
        case Asleep(level=level) | Stopping(slept=SleepLevel() as level):
            return asleep(engine, level)
        case FallingAsleep(level=level):
            return awake(engine) | asleep(engine, level)
        case Starting() | Waking() | Awake() | Draining() | Proving() | Stopping():
            return awake(engine)


def charged_as(phase: Phase) -> Kind:
    """Which of its figures `charge` takes on GPUs."""
    match phase:
        case Rousing() | Roused() | FallingAsleep(roused=True):
            return Kind.ROUSED
        case Stopping(slept=SleepLevel(), roused=roused):
            return Kind.ROUSED if roused else Kind.RESIDUE
        case Asleep():
            return Kind.RESIDUE
        case _:
            return Kind.AWAKE


def eventual(engine: Engine) -> Books:
    """What it will hold when the order in flight has ended well."""
    match engine.phase:
        case Down() | Stopping():
            return Books()
        case Asleep(level=level) | FallingAsleep(level=level):
            return asleep(engine, level)
        case Rousing(level=level) | Roused(level=level):  # back to sleep where nobody wants it
            return asleep(engine, level)
        case Starting() | Waking() | Awake() | Draining() | Proving():
            return awake(engine)


def budget(state: State) -> Books:
    """What engines may hold together: what was given, less what others hold."""
    given = Books({**state.gpus, HOST: state.host_mib})
    return Books({place: mib - foreign(state, place) for place, mib in given.items()})


def foreign(state: State, place: Gpu) -> int:
    """What others hold there, as far as it was seen."""
    return state.foreign[place].mib if place in state.foreign else 0


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


def room_for(state: State, model: ModelId) -> Books:
    """The budget while `model` is brought up.

    What others take where it needs nothing more, on other GPUs and of the host's RAM for a wake,
    cannot stand in its way: there the books may stay as they are, overdrawn or not.
    """
    limit = budget(state)
    need, now = awake(state.engines[model]), charge(state.engines[model])
    held = total(eventual(engine) for engine in state.engines.values())
    for place in state.foreign:
        if need[place] <= now[place]:
            limit[place] = max(limit[place], held[place])
    return limit


def fits_now(engines: Mapping[ModelId, Engine], model: ModelId, limit: Books) -> bool:
    """Whether `model` can be awake beside what the others hold at this moment."""
    others = (charge(engine) for name, engine in engines.items() if name != model)
    return within(total([*others, awake(engines[model])]), limit)


def fits_roused(
    engines: Mapping[ModelId, Engine], model: ModelId, level: SleepLevel, limit: Books
) -> bool:
    """Whether the weights of `model` have room beside what the others hold at this moment."""
    others = (charge(engine) for name, engine in engines.items() if name != model)
    return within(total([*others, roused(engines[model], level)]), limit)


def takes_no_more(engine: Engine, level: SleepLevel) -> bool:
    """Whether it holds all the host RAM already that its sleep at `level` takes, for sure."""
    sure = level is SleepLevel.TWO or not engine.pins_unsure
    return sure and asleep(engine, level)[HOST] <= charge(engine)[HOST]


def ram_allows(
    engines: Mapping[ModelId, Engine], model: ModelId, level: SleepLevel, limit: Books
) -> bool:
    """Whether host RAM has room at this moment for `model` to be put to sleep at `level`."""
    engine = engines[model]
    if takes_no_more(engine, level):
        return True
    others = sum(charge(engine)[HOST] for name, engine in engines.items() if name != model)
    return others + asleep(engine, level)[HOST] <= limit[HOST]


def processes(engine: Engine) -> int:
    """MiB of host RAM without what is pinned."""
    return _host(engine, holds_pinned=False)


def _on_gpus(engine: Engine, kind: Kind) -> Books:
    return Books({gpu: figures.figure(engine, kind, gpu).charged_mib for gpu in engine.spec.gpus})


def _host(engine: Engine, *, holds_pinned: bool) -> int:
    pinned = figures.figure(engine, Kind.PINNED).charged_mib if holds_pinned else 0
    return figures.figure(engine, Kind.HOST).charged_mib + pinned
