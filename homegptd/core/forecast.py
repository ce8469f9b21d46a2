"""How long until a model is awake, with a spread: for plans, Retry-After and progress.

What goes on side by side counts once, what goes on one after the other adds up, and of orders in
flight the part that is over is taken off. Answers that run are the widest part of it: they end
when they end, at the latest when the policy ends them.
"""

from collections.abc import Iterable, Iterator

from . import durations, fairness, rousing
from .draft import in_flight
from .drains import fate
from .durations import ZERO, Span, longest, total
from .levels import Displacements
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
    SleepLevel,
    Starting,
    State,
    Stopping,
    Waking,
)
from .plans import is_not_pinned, make_room, running

PROOF = Span(2.0, 8.0, 30.0)
"""Of a proof: two answers, a sleep and a wake."""


def eta(state: State, model: ModelId, now: float, *, ordered: bool = False) -> Span | None:
    """Seconds until `model` is awake if it is wanted before all others. None: it cannot be.

    `ordered`: by an operator, who brings up what no request can: what was stopped, or is disabled.
    """
    engine = state.engines[model]
    match engine.phase:
        case Awake() | Draining():
            return ZERO
        case Starting() | Waking() | Proving():
            return _left(engine, now)
        case Asleep() | Rousing() | Roused() | FallingAsleep() | Down() | Stopping():
            may = ordered or _ever_up(engine)
            return _from_rest(state, engine, now, ordered=ordered) if may else None


def wait_s(state: State, model: ModelId, now: float) -> Span | None:
    """Seconds that a request for `model` would wait from now on. None: nobody can say.

    Beside `eta` it counts the courtesies: models that others have waited for longer come first,
    and whoever is displaced may stay until it is idle, or its residency and the patience are over.
    """
    engine = state.engines[model]
    if isinstance(engine.phase, Awake):
        return ZERO
    mine = _after_it_left(engine) if isinstance(engine.phase, Draining) else eta(state, model, now)
    if mine is None:
        return None
    visits = [visit for other in ahead(state, model) for visit in _visit(state, other, now)]
    return _together([*visits, _held(state, model, now), mine])


# ---------------------------------------------------------------- parts


def _from_rest(state: State, engine: Engine, now: float, *, ordered: bool) -> Span | None:
    model = engine.spec.model
    room = make_room(state, model, may_displace=is_not_pinned)
    freed = not state.freed.keys().isdisjoint(engine.spec.gpus)
    if room is None or freed:
        return None
    clear = _clearing(state, model, room, now)
    match engine.phase:
        case Asleep(level=level):
            if rousing.possible(state, engine, [state.engines[name] for name in room]):
                weights = durations.span(engine, f"rouse-{level}")
                clear = _clearing(state, model, room, now, weights)
                return total([clear, durations.span(engine, "wake-roused")])
            return total([clear, durations.span(engine, f"wake-{level}")])
        case Rousing() | Roused():
            before = longest([clear, _left(engine, now)])
            return total([before, durations.span(engine, "wake-roused")])
        case FallingAsleep(level=level):
            before = longest([clear, _left(engine, now)])
            return total([before, durations.span(engine, f"wake-{level}")])
        case Stopping() | Down():
            at = None if ordered else engine.phase.retry_at  # who orders it waits for no back-off
            pause = max((at or now) - now, 0.0)
            waits = [clear, _left(engine, now), Span(pause, pause, pause)]
            return total([longest(waits), durations.span(engine, "start")])
        case _:
            return None


def _left(engine: Engine, now: float) -> Span:
    """Of the order that it carries out; nothing where it carries out none."""
    phase = engine.phase
    if isinstance(phase, Stopping) and phase.again_at is not None:  # a try has failed
        pause = max(phase.again_at - now, 0.0)
        return total([Span(pause, pause, pause), durations.span(engine, "stop")])
    if not in_flight(phase):
        return ZERO
    act = durations.act_of(phase)
    span = PROOF if act is None else durations.span(engine, act)
    return span.after(now - phase.since)


def _clearing(
    state: State, model: ModelId, room: Displacements, now: float, meanwhile: Span = ZERO
) -> Span:
    """Until all of `room` is made and the GPUs of `model` are quiet.

    `meanwhile`: what goes on beside the drains.
    """
    mine = set(state.engines[model].spec.gpus)
    gpus = mine.union(*(state.engines[name].spec.gpus for name in room))
    others = [e for n, e in state.engines.items() if n != model and gpus.intersection(e.spec.gpus)]
    first = longest(
        [
            meanwhile,
            *(_left(e, now) for e in others),
            *(_drain(state, n, room, now) for n in room),
        ]
    )
    in_turn = []
    for gpu in gpus:
        here = [name for name in room if gpu in state.engines[name].spec.gpus]
        in_turn.append(total(_rest(state.engines[name], room, name) for name in here))
    return total([first, longest(in_turn)])


def _drain(state: State, name: ModelId, room: Displacements, now: float) -> Span:
    """Until its answers have ended, or the policy ends them."""
    engine = state.engines[name]
    leases = running(engine)
    if not leases:
        return ZERO
    _, most_s = fate(state, engine, leases, room[name])
    began = engine.phase.since if isinstance(engine.phase, Draining) else now
    span = durations.span(engine, "drain").after(now - began)
    most_s = max(most_s - (now - began), 0.0)
    return Span(0.0, min(span.mid_s, most_s), most_s)


def _rest(engine: Engine, room: Displacements, name: ModelId) -> Span:
    level = room[name]
    act = "stop" if level is None else durations.to_sleep(engine, level)
    return durations.span(engine, act)


def _ever_up(engine: Engine) -> bool:
    """Whether it comes up without an operator."""
    phase = engine.phase
    failed = isinstance(phase, Down | Stopping) and phase.failure is not None
    return engine.enabled and not (failed and getattr(phase, "retry_at", None) is None)


def _together(spans: Iterable[Span]) -> Span:
    """One after another, where all are long if one is: on a crowded box."""
    low = mid = high = 0.0
    for span in spans:
        low, mid, high = low + span.low_s, mid + span.mid_s, high + span.high_s
    return Span(low, mid, high)


def _after_it_left(engine: Engine) -> Span:
    """Whoever it makes room for goes first: only then is it brought up again."""
    level = engine.phase.level if isinstance(engine.phase, Draining) else None
    return durations.span(engine, "start" if level is None else f"wake-{level}")


def ahead(state: State, model: ModelId) -> list[ModelId]:
    """Models whose turn on these GPUs comes before: they come up, or were asked for earlier."""
    engine = state.engines[model]
    gpus = set(engine.spec.gpus)
    oldest: dict[ModelId, float] = {}
    for ticket in state.waiting:
        oldest.setdefault(ticket.model, ticket.since)
    own = oldest.get(model, float("inf"))
    first = {getattr(engine.phase, "wanted_by", None)}
    first |= {n for n, e in state.engines.items() if isinstance(e.phase, Starting | Waking)}
    first |= {other for other, since in oldest.items() if since < own}
    return [
        name
        for name, other in state.engines.items()
        if name in first and name != model and gpus.intersection(other.spec.gpus)
    ]


def _visit(state: State, other: ModelId, now: float) -> Iterator[Span]:
    """Its switch, its stay, and its leave."""
    switch = eta(state, other, now)
    if switch is not None:
        engine = state.engines[other]
        waiting = sum(ticket.model == other for ticket in state.waiting)
        most = max(fairness.residency_s(state, other), fairness.quiet_s(state, other))
        yield switch
        yield _stay(state, engine, most, crowd=waiting)
        yield durations.span(
            engine, durations.to_sleep(engine, engine.spec.level or SleepLevel.ONE)
        )


def _stay(state: State, engine: Engine, most_s: float, *, crowd: int) -> Span:
    """How long it is used before it makes room: an answer and a quiet gap, or all it may."""
    quiet = fairness.quiet_s(state, engine.spec.model)
    one = durations.span(engine, "drain").mid_s + quiet
    return Span(min(quiet, most_s), most_s if crowd > 1 else min(one, most_s), most_s)


def _held(state: State, model: ModelId, now: float) -> Span:
    """How long those that are awake in its place may stay: till they are idle, if they are busy."""
    if isinstance(state.engines[model].phase, Starting | Waking | Proving | Draining):
        return ZERO
    since = min((t.since for t in state.waiting if t.model == model), default=now)
    stays = [ZERO]
    for name in make_room(state, model, may_displace=is_not_pinned) or {}:
        engine = state.engines[name]
        if isinstance(engine.phase, Awake):
            at = fairness.leaves_at(
                state, engine, engine.phase, wanted_by=model, since=since, now=now
            )
            most, leases = max(at - now, 0.0), len(running(engine))
            busy = _stay(state, engine, most, crowd=leases)
            stays.append(busy if leases else Span(most, most, most))
    return longest(stays)
