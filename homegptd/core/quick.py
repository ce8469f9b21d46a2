"""The everyday case of a step: a request comes to a model that is awake, or leaves it, and nobody
wants anything else. Then there are no goals to look for, which is most of what a step costs.

What comes out is what `step` would make of the event; only what the box does by itself (idle
models, proofs) is left for the next call, which is asked for shortly.
"""

from msgspec.structs import replace

from .commands import Grant
from .draft import Outcome
from .events import Event, RequestArrived, TicketClosed
from .model import Asleep, Awake, Down, Engine, ModelId, State, Ticket, TicketId

LOOK_AGAIN_S = 0.2
"""Until the box looks what to do by itself after the last answer of an engine, in seconds; and the
longest that the core may not know of a request (`runtime.brief`)."""


def quick(state: State, event: Event, now: float, *, calm: bool = False) -> Outcome | None:
    """The outcome, or None where this is a case for `step`. `calm`: the state came out of here.

    `wake_at` comes beside what was asked for before: no deadline of the state has changed.
    """
    match event:
        case RequestArrived(ticket):
            engine = state.engines.get(ticket.model)
            if engine is not None and engine.enabled and (calm or is_calm(state)):
                return _granted(state, engine, ticket, now)
        case TicketClosed(number, served):
            known = state.granted.get(number)
            engine = None if known is None else state.engines.get(known.model)
            if known is not None and engine is not None and (calm or is_calm(state)):
                return _left(state, engine, known, now, served=served)
        case _:
            pass
    return None


def serves(state: State, model: ModelId, *, calm: bool = False) -> bool:
    """Whether a ticket for the model would be granted at once, by `quick`."""
    engine = state.engines.get(model)
    return (
        engine is not None
        and engine.enabled
        and isinstance(engine.phase, Awake)
        and (calm or is_calm(state))
    )


def _granted(state: State, engine: Engine, ticket: Ticket, now: float) -> Outcome | None:
    phase = engine.phase
    if not isinstance(phase, Awake):
        return None
    awake = Awake(phase.since, phase.leases | {ticket.id}, None, phase.held_until)
    busy = replace(engine, phase=awake, last_used=now)
    granted = {**state.granted, ticket.id: ticket}
    return Outcome(_with(state, busy, granted, now), (Grant(ticket.id),), None)


def _left(
    state: State, engine: Engine, ticket: Ticket, now: float, *, served: bool
) -> Outcome | None:
    phase = engine.phase
    if not isinstance(phase, Awake) or ticket.id not in phase.leases:
        return None
    left = phase.leases - {ticket.id}
    awake = Awake(phase.since, left, None if left else now, phase.held_until)
    failures = 0 if served else engine.failures
    rest = replace(engine, phase=awake, failures=failures, last_used=now)
    granted = dict(state.granted)
    del granted[ticket.id]
    at = None if left else now + LOOK_AGAIN_S
    return Outcome(_with(state, rest, granted, now), (), at)


def _with(state: State, engine: Engine, granted: dict[TicketId, Ticket], now: float) -> State:
    engines = {**state.engines, engine.spec.model: engine}
    return replace(state, engines=engines, granted=granted, wanted_at=now)


def is_calm(state: State) -> bool:
    """Nobody wants anything, and nothing is under way. `quick` leaves it so."""
    if state.waiting or state.operations or state.chores or state.freed or state.stopping:
        return False
    return state.booted and all(map(_is_settled, state.engines.values()))


def _is_settled(engine: Engine) -> bool:
    phase = engine.phase
    up_or_down = isinstance(phase, Awake | Down) or (isinstance(phase, Asleep) and not phase.frozen)
    return up_or_down and not (engine.retiring or engine.renew)
