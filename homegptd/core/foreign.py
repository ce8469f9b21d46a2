"""What the books miss: memory that others hold, and engines that leak.

A card has less free memory than the books say when somebody else uses it, or when an engine holds
more than its figures. Either way it is not there for a wake, so it is charged as foreign.
"""

from dataclasses import replace

from . import figures, ledger
from .draft import Draft
from .memory import HOST, Foreign, Gpu, Seen
from .model import (
    Act,
    Asleep,
    Chore,
    Down,
    Engine,
    Failure,
    ModelId,
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


def see(d: Draft, seen: Seen, *, barred: ModelId | None = None) -> None:
    """Charge what is missing. `barred`: who was not started or woken for it; then every MiB counts,
    or the same order would be given again at once."""
    d.pressure = seen.pressure
    new, less = dict(d.foreign), False
    for place, missing in _missing(d, seen, barred).items():
        known = d.foreign.get(place, Foreign(0))
        if missing == known.mib or (barred is None and abs(missing - known.mib) <= NOISE_MIB):
            continue
        less = less or missing < known.mib
        new[place] = Foreign(missing, seen.strangers.get(place, ""))
    d.foreign = {place: foreign for place, foreign in new.items() if foreign.mib}
    if less:
        _try_again(d)


def better(one: Seen, other: Seen) -> Seen:
    """Of two looks in a row: the most that was free, and the newest of the rest."""
    cards = {
        gpu: min(card, one.cards.get(gpu, card), key=lambda c: c.used_mib)
        for gpu, card in other.cards.items()
    }
    ram = [r for r in (one.available_mib, other.available_mib) if r is not None]
    return replace(other, cards=cards, available_mib=max(ram, default=None))


def is_news(state: State, seen: Seen) -> bool:
    """Whether `see` would change anything that matters."""
    d = Draft(state, 0.0)
    see(d, seen)
    pressed = (seen.pressure >= PRESSED) is not (state.pressure >= PRESSED)
    return pressed or d.foreign != state.foreign


def suffices(engine: Engine, seen: Seen) -> bool:
    """Whether what is free is enough for its start or its wake."""
    match engine.phase:
        case Waking(level=level):
            holds = ledger.asleep(bare(engine), level)
        case Starting(adopts=False):
            holds = ledger.Books()
        case _:
            return True
    need, free = ledger.awake(engine), seen.free_mib
    return all(need[place] - holds[place] <= free[place] for place in need if place in free)


def bare(engine: Engine) -> Engine:
    """With its figures as they are: what it gives or needs more must not count on a margin."""
    exact = {key: replace(f, margin_mib=0) for key, f in figures.table(engine).items()}
    return replace(engine, measured=exact, spec=replace(engine.spec, trust_given=False))


def _missing(d: Draft, seen: Seen, barred: ModelId | None) -> dict[Gpu, int]:
    """For each place what is neither on the books nor free."""
    engines = {**d.engines}
    if barred in engines:
        engines[barred] = bare(engines[barred])
    used = ledger.total(ledger.charge(engine) for engine in engines.values())
    given = {**d.gpus, HOST: d.host_mib}
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
