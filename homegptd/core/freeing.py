"""GPUs lent to something else than models: a game, a training run.

Nothing is started or woken on a freed GPU, and what is there goes to sleep, or is stopped where it
cannot sleep. It stays so over restarts, until an operator reclaims the GPU.
"""

from collections.abc import Iterable, Iterator
from functools import partial

from msgspec.structs import replace

from . import ledger
from .draft import Draft
from .goal import Goal, Reach
from .model import (
    Act,
    Asleep,
    Awake,
    Chore,
    Down,
    Draining,
    Engine,
    Gpu,
    Lent,
    ModelId,
    Operation,
    Startup,
    State,
    Stopping,
    Ticket,
    Waking,
)
from .refusals import Reason, Refusal

_UP = (Act.SWITCH, Act.WAKE, Act.START, Act.PROVE)


def is_freed(box: Draft | State, engine: Engine) -> bool:
    """Whether one of its GPUs is lent: then it cannot be awake."""
    return bool(box.freed) and not box.freed.keys().isdisjoint(engine.spec.gpus)


def refusal(box: Draft | State, engine: Engine) -> Refusal | None:
    """Why it cannot be had while its GPU is lent; None if that is not so."""
    for gpu in engine.spec.gpus:
        lent = box.freed.get(gpu)
        if lent is not None:
            text = f'"{engine.spec.model}" is not to be had: {lent.by} has freed gpu{gpu}'
            return Refusal(Reason.GPU_FREED, text, f"homegptctl reclaim --gpu {gpu}")
    return None


def goals(d: Draft, operation: Operation | None = None) -> Iterator[Goal]:
    """Everything on the GPUs of `operation` is to go; without one, on GPUs freed before."""
    asked = [o for o in d.operations if o.act is Act.FREE]
    for name, engine in d.engines.items():
        first = next((o for o in asked if on(engine, o.gpus)), None)
        if is_freed(d, engine) and first is operation:
            yield Goal(Reach.CLEARED, name, d.now, operation)


def on(engine: Engine, gpus: Iterable[Gpu]) -> bool:
    return not set(engine.spec.gpus).isdisjoint(gpus)


def free(d: Draft, operation: Operation) -> None:
    """From now on its GPUs are lent; the operation ends when nothing runs on them any more."""
    gpus = operation.gpus or tuple(d.gpus)
    place = d.operations.index(operation)
    d.operations[place] = replace(operation, gpus=gpus)
    due = [chore.model for chore in d.chores if chore.act is Act.WAKE]
    up = tuple(
        name
        for name, engine in d.engines.items()
        if on(engine, gpus) and (isinstance(engine.phase, Awake | Draining | Waking) or name in due)
    )
    for gpu in gpus:
        before = d.freed.get(gpu)
        awake = [name for name in up if gpu in d.engines[name].spec.gpus]
        kept = before.awake if before else ()
        lent = Lent(operation.by, (*kept, *(name for name in awake if name not in kept)))
        d.freed = {**d.freed, gpu: lent}


def reclaim(d: Draft, gpus: tuple[Gpu, ...]) -> str:
    """The GPUs serve models again: what is missing is loaded, and what was awake is woken."""
    back = [gpu for gpu in d.freed if not gpus or gpu in gpus]
    awake = dict.fromkeys(name for gpu in back for name in d.freed[gpu].awake)
    d.freed = {gpu: lent for gpu, lent in d.freed.items() if gpu not in back}
    for name in awake:
        _wakes_later(d, name)
    for operation in [o for o in d.operations if o.act is Act.FREE and set(o.gpus) & set(back)]:
        text = "the GPU was reclaimed before it was empty"
        d.finish(operation, text, Refusal(Reason.CANCELLED, text))
    here = [e for e in d.engines.values() if on(e, back) and not is_freed(d, e)]
    loads = [
        Chore(Act.START, engine.spec.model, d.now, gentle=True)
        for engine in here
        if isinstance(engine.phase, Down | Stopping)
        and engine.phase.failure is None
        and engine.keep_loaded
        and engine.spec.startup is not Startup.DISABLED
    ]
    comes = [e.spec.model for e in here if e.spec.model in awake and e.enabled]
    told = {(chore.act, chore.model) for chore in d.chores}
    wakes = [Chore(Act.WAKE, name, d.now, gentle=True) for name in comes]
    if not d.stopping:
        d.chores += [chore for chore in (*loads, *wakes) if (chore.act, chore.model) not in told]
    if not back:
        return "no GPU was freed"
    verb = "serves models again" if len(back) == 1 else "serve models again"
    coming = f"; {_list(comes)} {'wakes' if len(comes) == 1 else 'wake'}" if comes else ""
    return f"{_gpus(back)} {verb}{coming}"


def _wakes_later(d: Draft, model: ModelId) -> None:
    """One that needs another freed GPU too is remembered until that one is given back."""
    gpus = d.engines[model].spec.gpus if model in d.engines else ()
    for gpu in gpus:
        lent = d.freed.get(gpu)
        if lent is not None:
            if model not in lent.awake:
                d.freed = {**d.freed, gpu: replace(lent, awake=(*lent.awake, model))}
            return


def enforce(d: Draft) -> None:
    """Nobody waits for what a freed GPU cannot give; what is empty has been freed."""
    freed = {name for name, engine in d.engines.items() if is_freed(d, engine)}
    for operation in [o for o in d.operations if o.act in _UP and o.model in freed]:
        why = refusal(d, d.engines[operation.model])
        if why is not None:
            d.finish(operation, why.message, why)
    for name in {ticket.model for ticket in d.waiting} & freed:
        why = refusal(d, d.engines[name])
        if why is not None:
            d.refuse_waiting(partial(_is_for, name), why)
    if any(chore.model in freed for chore in d.chores):
        d.chores = [chore for chore in d.chores if chore.model not in freed]
        d.changed = True
    for operation in [o for o in d.operations if o.act is Act.FREE]:
        here = [e for e in d.engines.values() if is_freed(d, e) and on(e, operation.gpus)]
        if all(_rests(engine) for engine in here):
            d.finish(operation, _emptied(d, operation.gpus))


def _is_for(name: ModelId, ticket: Ticket) -> bool:
    return ticket.model == name


def _rests(engine: Engine) -> bool:
    phase = engine.phase
    return isinstance(phase, Down) or (isinstance(phase, Asleep) and not phase.frozen)


def _emptied(d: Draft, gpus: tuple[Gpu, ...]) -> str:
    """How much of each GPU is free now, and who keeps the rest."""
    parts = []
    for gpu in gpus:
        held = {n: ledger.charge(e)[gpu] for n, e in d.engines.items() if ledger.charge(e)[gpu]}
        total, others = d.gpus.get(gpu, 0), d.foreign.get(gpu)
        left = total - sum(held.values()) - (others.mib if others else 0)
        free = f"gpu{gpu} is free: {_gb(left)} of {_gb(total)} GB"
        keeps = f" (asleep there: {_list(held)}; a stop gives back the rest)" if held else ""
        stranger = f" ({_gb(others.mib)} held by {others.who or 'others'})" if others else ""
        parts.append(free + keeps + stranger)
    return "; ".join(parts)


def _gpus(gpus: Iterable[Gpu]) -> str:
    return _list([f"gpu{gpu}" for gpu in gpus])


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def _gb(mib: int) -> str:
    return f"{mib / 1024:.1f}"
