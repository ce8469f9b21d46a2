"""When a model will probably be awake, for those who wait: `Retry-After`, a line of status.

A guess, from the phases, what orders took on this box before, and who is in front.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from . import drains, plans
from .model import (
    Asleep,
    Awake,
    Down,
    Draining,
    Engine,
    FallingAsleep,
    ModelId,
    Proving,
    SleepLevel,
    Starting,
    State,
    Stopping,
    Waking,
)
from .plans import takes
from .words import count

ANSWER_S = 10.0
"""How long a running answer goes on, in seconds, as nobody can know: about 500 tokens."""
_LEAST_S = 1.0
_HOPELESS_S = 60.0
"""When to look again where nothing that is known leads to the model being awake, in seconds."""
_ORDERED: dict[type, str] = {
    Waking: "Waking {}",
    Starting: "Starting {}",
    FallingAsleep: "Putting {} to sleep",
    Stopping: "Stopping {}",
    Proving: "Trying out {}",
}


@dataclass(frozen=True, slots=True)
class Outlook:
    """`doing` is what goes on now, for a person; `at` the instant of being awake."""

    doing: str
    at: float


def retry_s(state: State, model: ModelId, now: float) -> float:
    """When it is worth asking for `model` again, in seconds from now."""
    return max(outlook(state, model, now).at - now, _LEAST_S)


def room_s(state: State, now: float) -> float:
    """When some of those who wait will have gone on, in seconds from now."""
    waited_for = {ticket.model for ticket in state.waiting}
    return min((retry_s(state, model, now) for model in waited_for), default=ANSWER_S)


def outlook(state: State, model: ModelId, now: float) -> Outlook:
    """What lies between now and `model` being awake, if it is asked for."""
    engine = state.engines.get(model)
    if engine is None:
        return Outlook(f"There is no {model}", now + _HOPELESS_S)
    match engine.phase:
        case Awake():
            return Outlook(f"{model} is awake", now)
        case Waking() | Starting() | Proving():
            return Outlook(_doing(engine), _ends_at(engine, now))
        case _:
            return _through_others(state, engine, now)


def _through_others(state: State, engine: Engine, now: float) -> Outlook:
    """Orders under way end first, then come those in front, then room is made."""
    room = _room(state, engine.spec.model)
    if room is None:
        return Outlook(f"No room for {engine.spec.model}", now + _HOPELESS_S)
    act = _way_up(engine)
    waits: list[tuple[str, float]] = []
    ordered = [
        each for each in (engine, *_neighbours(state, engine)) if type(each.phase) in _ORDERED
    ]
    if ordered:
        last = max(ordered, key=lambda each: _ends_at(each, now))
        waits.append((_doing(last), _ends_at(last, now) - now))
    waits += [
        (f"Waiting for the turn of {front.spec.model}", plans.switch_cost_s(front) + ANSWER_S)
        for front in _in_front(state, engine)
    ]
    waits += [_making_room(state, state.engines[name], how, now) for name, how in room.items()]
    pause = (
        max((engine.phase.retry_at or now) - now, 0.0) if isinstance(engine.phase, Down) else 0.0
    )
    left_s = max(sum(seconds for _, seconds in waits), pause) + takes(engine, act)
    own = f"{'Starting' if act == 'start' else 'Waking'} {engine.spec.model}"
    return Outlook(waits[0][0] if waits else own, now + left_s)


def _room(state: State, model: ModelId) -> plans.Displacements | None:
    """Who has to go. Sleepers are stopped for room so seldom that it is looked for last."""
    for stop in (False, True):
        room = plans.make_room(
            state, model, may_displace=lambda other: not other.spec.pinned, may_stop_sleepers=stop
        )
        if room is not None:
            return room
    return None


def _way_up(engine: Engine) -> str:
    match engine.phase:
        case (
            Asleep(level=level) | FallingAsleep(level=level) | Draining(level=SleepLevel() as level)
        ):
            return f"wake-{level}"
        case _:
            return "start"


def _in_front(state: State, engine: Engine) -> Iterator[Engine]:
    """Models on the same GPUs that are not up, and for which somebody has waited longer."""
    own = (ticket.since for ticket in state.waiting if ticket.model == engine.spec.model)
    since = min(own, default=float("inf"))
    earlier = {ticket.model for ticket in state.waiting if ticket.since < since}
    for other in _neighbours(state, engine):
        if other.spec.model in earlier and isinstance(other.phase, Asleep | Down):
            yield other


def _neighbours(state: State, engine: Engine) -> Iterator[Engine]:
    gpus = set(engine.spec.gpus)
    for name, other in state.engines.items():
        if name != engine.spec.model and not gpus.isdisjoint(other.spec.gpus):
            yield other


def _making_room(
    state: State, other: Engine, how: SleepLevel | None, now: float
) -> tuple[str, float]:
    """What `other` does to make room, and how long it takes, in seconds."""
    name, leases = other.spec.model, plans.running(other)
    took_s = takes(other, "stop" if how is None else f"sleep-{how}")
    if not leases:
        return f"Stopping {name}" if how is None else f"Putting {name} to sleep", took_s
    _, longest_s = drains.fate(state, other, leases, how)
    since = other.phase.since if isinstance(other.phase, Draining) else now
    answers_s = min(ANSWER_S, max(since + longest_s - now, 0.0))
    return f"Waiting for {count(len(leases), 'answer')} of {name}", answers_s + took_s


def _doing(engine: Engine) -> str:
    return _ORDERED[type(engine.phase)].format(engine.spec.model)


def _ends_at(engine: Engine, now: float) -> float:
    """When the order under way has probably ended. One that is late ends any moment."""
    phase = engine.phase
    match phase:
        case Waking(level=level):
            at = phase.since + takes(engine, f"wake-{level}")
        case FallingAsleep(level=level):
            at = phase.since + takes(engine, f"sleep-{level}")
        case Starting():
            at = phase.since + takes(engine, "start")
        case Stopping(retry_at=retry_at):
            at = max(phase.since + takes(engine, "stop"), retry_at or 0.0)
        case Proving():
            at = phase.since + plans.switch_cost_s(engine) + ANSWER_S
        case _:
            at = now
    return max(at, now)
