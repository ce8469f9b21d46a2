"""What must hold in every state. Tests call it after each step; a debug setting can, too."""

from collections.abc import Iterator

from msgspec.structs import replace

from . import ledger
from .draft import in_flight
from .model import (
    Asleep,
    Awake,
    Draining,
    Engine,
    FallingAsleep,
    SleepLevel,
    State,
    Stopping,
    TicketId,
    Waking,
)


def violations(state: State, before: State | None = None) -> list[str]:
    """Every broken rule in words; empty if all is well.

    With `before`, the books may be overdrawn where they were so already and got no worse: an
    adoption, a smaller configuration or a measurement can bring that about, and no order can undo
    it at once.
    """
    return [
        *_memory(state, _used_before(state, before)),
        *_one_transition_per_gpu(state),
        *_tickets(state),
        *_phases(state),
        *_nobody_waits_at_an_open_door(state),
    ]


def held(engine: Engine) -> frozenset[TicketId]:
    """Tickets whose answers live in this engine, running or frozen."""
    match engine.phase:
        case Awake(leases=leases) | Draining(leases=leases):
            return leases
        case Asleep(frozen=frozen) | FallingAsleep(frozen=frozen) | Waking(frozen=frozen):
            return frozen
        case _:
            return frozenset()


def _used_before(state: State, before: State | None) -> ledger.Books:
    """As the books would have been, had one known what was measured since."""
    if before is None:
        return ledger.Books()
    now = state.engines
    engines = {
        name: replace(engine, learnt=now[name].learnt) if name in now else engine
        for name, engine in before.engines.items()
    }
    return ledger.used(replace(before, engines=engines))


def _memory(state: State, used_before: ledger.Books) -> Iterator[str]:
    limit = ledger.budget(state)
    for place, amount in ledger.used(state).items():
        if amount > max(limit[place], used_before[place]):
            yield f"{amount} MiB charged to place {place} of {limit[place]}"


def _one_transition_per_gpu(state: State) -> Iterator[str]:
    """A stop does not count: what died or hangs is cleared away whatever else goes on."""
    busy: dict[int, str] = {}
    for name, engine in state.engines.items():
        if not in_flight(engine.phase) or isinstance(engine.phase, Stopping):
            continue
        for gpu in engine.spec.gpus:
            if gpu in busy:
                yield f"orders for {name} and {busy[gpu]} at once on gpu{gpu}"
            busy[gpu] = name


def _tickets(state: State) -> Iterator[str]:
    seen: dict[TicketId, str] = {}
    for name, engine in state.engines.items():
        for ticket in held(engine):
            if ticket in seen:
                yield f"ticket {ticket} is held by {seen[ticket]} and {name}"
            if ticket not in state.granted:
                yield f"{name} holds ticket {ticket}, which is closed"
            seen[ticket] = name
    for waiting in state.waiting:
        if waiting.id in state.granted:
            yield f"ticket {waiting.id} waits and is granted"


def _phases(state: State) -> Iterator[str]:
    for name, engine in state.engines.items():
        match engine.phase:
            case Awake(leases=leases, idle_since=idle) if bool(leases) == (idle is not None):
                yield f"{name} is idle and busy at once, or neither"
            case Asleep(level=SleepLevel.ONE) if not engine.holds_pinned:
                yield f"{name} sleeps at level 1 with no RAM on the books"
            case Asleep(frozen=frozen, level=SleepLevel.TWO) if frozen:
                yield f"{name} holds frozen answers at level 2"
            case _:
                pass


def _nobody_waits_at_an_open_door(state: State) -> Iterator[str]:
    for ticket in state.waiting:
        engine = state.engines.get(ticket.model)
        if engine is None:
            yield f"ticket {ticket.id} waits for {ticket.model}, which does not exist"
        elif isinstance(engine.phase, Awake):
            yield f"ticket {ticket.id} waits for {ticket.model}, which is awake"
