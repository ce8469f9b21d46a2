"""Steps to a goal: the cheapest set of sleeps and stops that makes room, and what it will take."""

from collections.abc import Callable, Iterator

from msgspec import Struct

from . import drains, durations, ledger, rousing, sums
from .ledger import Books
from .levels import Displacements, levels
from .likely import likely
from .model import (
    Asleep,
    Awake,
    Down,
    Draining,
    Engine,
    FallingAsleep,
    ModelId,
    Roused,
    Rousing,
    Sleeper,
    SleepLevel,
    Starting,
    State,
    Stopping,
    TicketId,
    Waking,
)
from .search import Way, cheapest
from .words import count

_REST = 1.0
"""What it costs to displace at all, in seconds: fewer are better."""
_BUSY = 60.0
"""The same for one with running answers: their drain may be long, and disturbs people."""
_BEGUN = 30.0
"""What a drain that has begun is worth: else each answer that ends could change the victim."""
_COLD = 10.0
"""A start also reads the disk, and fails more often than a wake does: no sleeper is stopped that
could stay, whatever was measured."""


def make_room(
    state: State,
    target: ModelId,
    *,
    may_displace: Callable[[Engine], bool],
    may_stop: bool = True,
    may_stop_sleepers: bool = True,
) -> Displacements | None:
    """The cheapest displacements after which `target` fits everywhere; None if there are none.

    A cost is in seconds: what the displaced will probably make somebody wait for when they are
    wanted again (their chance to be next, times what their return takes from where they rest), and
    more where answers run. So RAM goes to the sleepers that are likely next, and the others are
    put to level 2, or stopped.

    Without `may_stop` only those are stopped that cannot sleep at all.
    Counts with what the orders in flight will leave behind.
    """
    limit, need = ledger.room_for(state, target), ledger.awake(state.engines[target])
    chances = likely(state, target)
    choices = [
        (name, [Way(0.0, ledger.eventual(engine), displaces=False)])
        for name, engine in state.engines.items()
        if name != target and ledger.eventual(engine)
    ]
    for name, options in choices:
        engine = state.engines[name]
        if not may_displace(engine):
            continue
        if not isinstance(engine.phase, Sleeper):
            options.extend(_of_awake(state, engine, chances[name], may_stop=may_stop))
        elif may_stop_sleepers:
            slower = max(_back_s(engine, None) - _back_s(engine, engine.phase.level), 0.0)
            cost = _REST + chances[name] * slower
            options.append(Way(cost, Books(), displaces=True))
    found = cheapest([options for _, options in choices], need, limit)
    if found is None:
        return None
    ways = zip(choices, found, strict=True)
    return {name: way.level for (name, _), way in ways if way.displaces}


def _of_awake(state: State, engine: Engine, chance: float, *, may_stop: bool) -> Iterator[Way]:
    """Ways to displace an engine that is awake, or about to be."""
    base = _REST
    if running(engine):
        base += _BUSY - _BEGUN * isinstance(engine.phase, Draining)
    resting = list(levels(engine, state.policy))
    for level in resting:
        cost = base + chance * _back_s(engine, level)
        yield Way(cost, ledger.asleep(engine, level), displaces=True, level=level)
    if may_stop or not resting:
        yield Way(base + chance * _back_s(engine, None), Books(), displaces=True)


def _back_s(engine: Engine, level: SleepLevel | None) -> float:
    """What its return will cost from there, in seconds; None: from a stop."""
    if level is None:
        return _COLD + max(durations.takes(engine, act) for act in ("start", "wake-1"))
    return durations.takes(engine, f"wake-{level}")


def running(engine: Engine) -> frozenset[TicketId]:
    """The tickets it answers now."""
    match engine.phase:
        case Awake(leases=leases) | Draining(leases=leases):
            return leases
        case _:
            return frozenset()


# ---------------------------------------------------------------- plans


class Step(Struct, frozen=True):
    """One step of a plan; `do` is drain, sleep, stop, start or wake.

    `expected_s` is None where nobody can know: answers end when they end. `why` says the bounds.
    """

    do: str
    model: ModelId
    expected_s: float | None
    why: str


class Plan(Struct, frozen=True):
    model: ModelId
    steps: tuple[Step, ...]
    fits: bool = True
    sums: tuple[str, ...] = ()
    """For each place how it fits; if it does not, for each place that lacks room."""

    @property
    def expected_s(self) -> float | None:
        """All steps together; None if one of them is of unknown length."""
        known = [step.expected_s for step in self.steps if step.expected_s is not None]
        return sum(known) if len(known) == len(self.steps) else None


def can_ever_fit(state: State, model: ModelId) -> bool:
    """Whether `model` can be awake at all, if all that is not pinned makes room."""
    return make_room(state, model, may_displace=is_not_pinned) is not None


def is_not_pinned(engine: Engine) -> bool:
    """Whether somebody else's need may displace it."""
    return not engine.spec.pinned


def plan_switch(state: State, model: ModelId) -> Plan:
    """What making `model` awake would take, were it asked for now."""
    freed = [gpu for gpu in state.engines[model].spec.gpus if gpu in state.freed]
    if freed:
        lent = f"gpu{freed[0]} is freed by {state.freed[freed[0]].by}"
        again = f"homegptctl reclaim --gpu {freed[0]}"
        return Plan(model, (), fits=False, sums=(f"{lent}; to use it again: {again}",))
    engine = state.engines[model]
    if not isinstance(engine.phase, Down | Stopping | Sleeper):
        return Plan(model, tuple(_bringing_up(engine)), sums=sums.fitting(state, model, {}))
    room = make_room(state, model, may_displace=is_not_pinned)
    if room is None:
        lacks = sums.lacking(state, model, may_displace=is_not_pinned)
        return Plan(model, (), fits=False, sums=lacks)
    steps = [step for name, how in room.items() for step in _displacing(state, name, model, how)]
    others = [state.engines[name] for name in room]
    steps += _bringing_up(engine, early=rousing.possible(state, engine, others))
    return Plan(model, tuple(steps), sums=sums.fitting(state, model, room))


def _displacing(
    state: State, name: ModelId, target: ModelId, how: SleepLevel | None
) -> Iterator[Step]:
    engine = state.engines[name]
    leases = running(engine)
    match engine.phase:
        case Asleep(level=level, frozen=frozen) | FallingAsleep(level=level, frozen=frozen):
            if frozen:  # nobody displaces what holds them
                expected_s = durations.takes(engine, f"wake-{level}")
                yield Step("wake", name, expected_s, f"it holds {count(len(frozen), 'answer')}")
                yield Step("drain", name, None, "what was frozen goes on and ends first")
        case _:
            pass
    if leases:
        what, _ = drains.fate(state, engine, leases, how)
        are = f"{count(len(leases), 'answer')} {'is' if len(leases) == 1 else 'are'} running"
        yield Step("drain", name, None, f"{are}, {what}")
    why = f"makes room for {target}"
    if how is None:
        yield Step("stop", name, durations.takes(engine, "stop"), why)
    else:
        expected_s = durations.takes(engine, durations.to_sleep(engine, how))
        yield Step("sleep", name, expected_s, f"{why} (level {how})")


def _bringing_up(engine: Engine, *, early: bool = False) -> Iterator[Step]:
    """`early`: its weights can come back before those in its place have ended."""
    match engine.phase:
        case Asleep() if early:
            expected_s = durations.takes(engine, "wake-roused")
            yield Step("wake", engine.spec.model, expected_s, "its weights come back before")
        case Down() | Stopping():
            expected_s = durations.takes(engine, "start")
            yield Step("start", engine.spec.model, expected_s, "it is not running")
        case Asleep(level=level) | FallingAsleep(level=level):
            why = f"it sleeps at level {level}"
            yield Step("wake", engine.spec.model, durations.takes(engine, f"wake-{level}"), why)
        case Rousing() | Roused():
            expected_s = durations.takes(engine, "wake-roused")
            yield Step("wake", engine.spec.model, expected_s, "its weights wake already")
        case Starting():
            yield Step("start", engine.spec.model, durations.takes(engine, "start"), "under way")
        case Waking() as phase:
            expected_s = durations.takes(engine, durations.act_of(phase) or "")
            yield Step("wake", engine.spec.model, expected_s, "under way")
        case _:
            return
