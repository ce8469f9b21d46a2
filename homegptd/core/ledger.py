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
from .refusals import Reason, Refusal

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


def explain(state: State, model: ModelId) -> tuple[str, ...]:
    """One sum for each place where `model` lacks room, as a person would write it.

    For example `needs 60.0 GB on gpu0; 96.0 total - 2.1 residue of a - 38.0 b awake = 55.9`.
    """
    limit = budget(state)
    lines = []
    for place, amount in sorted(awake(state.engines[model]).items()):
        held = {
            name: eventual(engine)[place]
            for name, engine in state.engines.items()
            if name != model and eventual(engine)[place]
        }
        left = limit[place] - sum(held.values())
        if amount > left:
            lines.append(_sum_line(state, place, amount, held))
    return tuple(lines)


def no_room(state: State, model: ModelId) -> Refusal:
    """Why `model` cannot be brought up."""
    sums = "; ".join(explain(state, model))
    pinned = any(e.spec.pinned and name != model for name, e in state.engines.items())
    reason = Reason.PINNED if pinned else Reason.DOES_NOT_FIT
    text = f'cannot bring up "{model}": {sums or "no room"}'
    return Refusal(reason, text, f"homegptctl plan {model}")


def _sum_line(state: State, place: Gpu, need: int, held: Mapping[ModelId, int]) -> str:
    limit = budget(state)[place]
    left = limit - sum(held.values())
    terms = "".join(
        f" - {_gb(amount)} {_what(state.engines[name], place)} {name}"
        for name, amount in held.items()
    )
    where = "host RAM" if place == HOST else f"gpu{place}"
    return f"needs {_gb(need)} GB on {where}; {_gb(limit)} total{terms} = {_gb(left)}"


def _what(engine: Engine, place: Gpu) -> str:
    if place == HOST:
        return "pinned" if engine.holds_pinned else "process of"
    if isinstance(engine.phase, Asleep | FallingAsleep):
        return "residue of"
    return "pinned by the operator:" if engine.spec.pinned else "awake"


def _gb(mib: int) -> str:
    return f"{mib / 1024:.1f}"


def _host(engine: Engine, *, holds_pinned: bool) -> int:
    return engine.spec.host_mib + (engine.spec.pinned_mib if holds_pinned else 0)
