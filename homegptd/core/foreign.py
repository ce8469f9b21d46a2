"""What the books miss: memory that others hold, and engines that leak.

A card has less free memory than the books say when somebody else uses it, or when an engine holds
more than its figures. Either way it is not there for a wake, so it is charged as foreign.
"""

from collections.abc import Mapping

from msgspec.structs import replace

from . import figures, ledger
from .draft import Draft
from .memory import HOST, Foreign, Gpu, Kind, Learnt, Seen
from .model import (
    Act,
    Asleep,
    Chore,
    Down,
    Engine,
    Failure,
    ModelId,
    Rousing,
    Starting,
    Startup,
    State,
    Waking,
)

NOISE_MIB = 64
"""Changes up to this are no news: a desktop's usage flickers."""
PRESSED = 10.0
"""Percent of the time with some task waiting for host memory from which on somebody should know."""
AT_ONCE = 4
"""So many times what may leak, and the engine is renewed even while others wait."""


def see(d: Draft, missing: Mapping[Gpu, int], strangers: Mapping[Gpu, str]) -> None:
    """Charge what is missing."""
    new, less = dict(d.foreign), False
    for place, mib in missing.items():
        known = d.foreign.get(place, Foreign(0))
        if abs(mib - known.mib) > NOISE_MIB or (known.mib and not mib):
            less = less or mib < known.mib
            new[place] = Foreign(mib, strangers.get(place, ""))
    d.foreign = {place: foreign for place, foreign in new.items() if foreign.mib}
    if less:
        _try_again(d)


def bar(d: Draft, model: ModelId, seen: Seen) -> None:
    """`model` was not started or woken for want of memory. Every MiB counts, or the same order
    would be given again at once."""
    for place, mib in missing(d.state(), seen, barred=model).items():
        if mib > 0:
            d.foreign = {**d.foreign, place: Foreign(mib, seen.strangers.get(place, ""))}


def is_news(state: State, missing: Mapping[Gpu, int], pressure: float) -> bool:
    """Whether it would change anything that matters."""
    d = Draft(state, 0.0)
    see(d, missing, {})
    pressed = (pressure >= PRESSED) is not (state.pressure >= PRESSED)
    return pressed or d.foreign != state.foreign


def suffices(engine: Engine, seen: Seen) -> bool:
    """Whether what is free is enough for its start or its wake, or for its weights alone.

    Only where it takes more than it has: a wake takes no host RAM, so that want of it is no reason
    (`ledger.room_for` says the same, or the wake would be ordered again and again).
    """
    match engine.phase:
        case Rousing(level=level) | Waking(level=level, roused=False):
            before, holds = ledger.asleep(engine, level), ledger.asleep(bare(engine), level)
        case Waking(level=level):
            before, holds = ledger.roused(engine, level), ledger.roused(bare(engine), level)
        case Starting(adopts=False):
            before = holds = ledger.Books()
        case _:
            return True
    need, free = ledger.charge(engine), seen.free_mib
    takes = [place for place in need if place in free and need[place] > before[place]]
    return all(need[place] - holds[place] <= free[place] for place in takes)


def bare(engine: Engine) -> Engine:
    """With what it holds asleep as it was seen last: a wake must not count on more."""
    last = engine.learnt.last_residue
    exact = {
        (kind, place): replace(
            f, margin_mib=0, mib=last.get(place, f.mib) if kind is Kind.RESIDUE else f.mib
        )
        for (kind, place), f in figures.table(engine).items()
    }
    return replace(engine, learnt=Learnt(exact), spec=replace(engine.spec, trust_given=False))


def missing(state: State, seen: Seen, *, barred: ModelId | None = None) -> dict[Gpu, int]:
    """For each place what is neither on the books nor free.

    An order in flight is charged with the most it can hold, so while it moves memory too little
    is missing rather than too much; what an engine gave back may show a little late."""
    engines = dict(state.engines)
    if barred is not None and barred in engines:
        engines[barred] = bare(engines[barred])
    used = ledger.total(ledger.charge(engine) for engine in engines.values())
    given = {**state.gpus, HOST: state.host_mib}
    free = seen.free_mib
    return {
        place: max(0, given[place] - used[place] - free[place]) for place in given if place in free
    }


def _try_again(d: Draft) -> None:
    """There is more room than before: what found none may find some, and is loaded as at first."""
    for name, engine in list(d.engines.items()):
        if engine.no_room is None:
            continue
        d.put(replace(engine, no_room=None))
        wanted = engine.keep_loaded and engine.spec.startup is not Startup.DISABLED
        if wanted and isinstance(engine.phase, Down) and not d.stopping:
            d.drop_chores(name)
            d.chores.append(Chore(Act.START, name, d.now, gentle=True))


def renew_leaking(d: Draft) -> None:
    """Stop a sleeper whose residue has grown: at a quiet moment, or at once if by very much.

    It is loaded again as after a failure, when there is quiet room for it.
    """
    busy = bool(d.waiting or d.operations or d.chores)
    for name, engine in list(d.engines.items()):
        phase = engine.phase
        if d.stopping or not isinstance(phase, Asleep) or phase.frozen or d.waits_for(name):
            continue
        limit = d.policy.leak_mib * (AT_ONCE if busy else 1)
        why = figures.leak(engine, limit)
        if why is not None and d.quiet(engine.spec.gpus):
            text = f"it is started anew: {why}"
            d.stop(name, Failure(text), retry_at=d.now)
