"""When a model is worth asking for again, and what goes on until then, for those who wait."""

from collections.abc import Iterator

from msgspec import Struct

from .forecast import ahead, eta, wait_s
from .model import (
    Asleep,
    Awake,
    Down,
    Draining,
    Engine,
    FallingAsleep,
    ModelId,
    Proving,
    Roused,
    Rousing,
    Starting,
    State,
    Stopping,
    Waking,
)
from .plans import is_not_pinned, make_room, running
from .words import count

_LEAST_S = 1.0
_ROOM_S = 10.0
"""When there may be room where only running answers hold it, in seconds: nobody can know."""
_HOPELESS_S = 60.0
"""When to look again where nothing that is known leads to the model being awake, in seconds."""
_ORDERED: dict[type, str] = {
    Waking: "Waking {}",
    Starting: "Starting {}",
    FallingAsleep: "Putting {} to sleep",
    Stopping: "Stopping {}",
    Proving: "Trying out {}",
}


class Outlook(Struct, frozen=True):
    """`doing` is what goes on now, for a person; `at` the instant of being awake."""

    doing: str
    at: float


def retry_s(state: State, model: ModelId, now: float) -> float:
    """When it is worth asking for `model` again, in seconds from now."""
    return max(outlook(state, model, now).at - now, _LEAST_S)


def room_s(state: State, now: float) -> float:
    """When some of those who wait will have gone on, in seconds from now."""
    waited_for = {ticket.model for ticket in state.waiting}
    return min((retry_s(state, model, now) for model in waited_for), default=_ROOM_S)


def outlook(state: State, model: ModelId, now: float) -> Outlook:
    """What lies between now and `model` being awake, if it is asked for."""
    engine = state.engines.get(model)
    if engine is None:
        return Outlook(f"There is no {model}", now + _HOPELESS_S)
    span = wait_s(state, model, now)
    if span is None:
        return Outlook(f"No room for {model}", now + _HOPELESS_S)
    return Outlook(next(_doing(state, engine, now)), now + span.mid_s)


def _doing(state: State, engine: Engine, now: float) -> Iterator[str]:
    """What goes on for it, the first thing first; at least one."""
    model = engine.spec.model
    match engine.phase:
        case Awake():
            yield f"{model} is awake"
        case Waking() | Starting() | Proving():
            yield _ordered(engine)
        case _:
            gpus = set(engine.spec.gpus)
            near = [e for e in state.engines.values() if gpus.intersection(e.spec.gpus)]
            orders = [each for each in near if type(each.phase) in _ORDERED]
            if orders:
                yield _ordered(max(orders, key=lambda each: _left_s(state, each, now)))
            for other in ahead(state, model):
                if isinstance(state.engines[other].phase, Asleep | Rousing | Roused | Down):
                    yield f"Waiting for the turn of {other}"
            for name, how in (make_room(state, model, may_displace=is_not_pinned) or {}).items():
                leases = running(state.engines[name])
                if leases:
                    yield f"Waiting for {count(len(leases), 'answer')} of {name}"
                yield f"Stopping {name}" if how is None else f"Putting {name} to sleep"
            rests = isinstance(engine.phase, Asleep | Rousing | Roused | Draining)
            yield f"{'Waking' if rests else 'Starting'} {model}"


def _ordered(engine: Engine) -> str:
    return _ORDERED[type(engine.phase)].format(engine.spec.model)


def _left_s(state: State, engine: Engine, now: float) -> float:
    span = eta(state, engine.spec.model, now)
    return 0.0 if span is None else span.mid_s
