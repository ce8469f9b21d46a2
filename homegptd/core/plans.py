"""Steps to a goal: the cheapest set of sleeps and stops that makes room, and what it will take."""

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from . import drains, ledger
from .ledger import Books
from .model import (
    Asleep,
    Awake,
    Down,
    Draining,
    Engine,
    FallingAsleep,
    ModelId,
    Policy,
    Proof,
    SleepLevel,
    State,
    Stopping,
    TicketId,
)
from .words import count

Displacements = Mapping[ModelId, SleepLevel | None]
"""How each engine in the way makes room: the level it sleeps at, or None: it is stopped."""

_REST, _BUSY, _LOWER, _STOP = 1.0, 10.0, 20.0, 100.0
"""Costs of displacing: an idle engine, one with running answers, a level that wakes slower, a cold
start later. Only their order matters, and that no number of the cheaper kind on one box (a dozen
engines) outweighs one of the dearer kind by much."""

_BEGUN = 5.0
"""What a drain that has begun is worth: else each answer that ends could change the victim."""

DEFAULT_TIMINGS: Mapping[str, float] = {
    "start": 90.0,
    "sleep-1": 3.0,
    "sleep-2": 1.0,
    "wake-1": 3.0,
    "wake-2": 15.0,
    "stop": 3.0,
}
"""Seconds, until this box has its own (vLLM blog 2025-10-26 and reports, rounded up)."""


def levels(engine: Engine, policy: Policy) -> Iterator[SleepLevel]:
    """The levels it may sleep at, best first. None of them: it has to be stopped."""
    can = engine.traits.levels if engine.traits else frozenset()
    reloads = engine.traits is not None and engine.traits.proofs.get(Proof.RELOAD, False)
    wanted = engine.spec.level or policy.level
    if wanted is SleepLevel.ONE and SleepLevel.ONE in can:
        yield SleepLevel.ONE
    if engine.spec.level is not SleepLevel.ONE and SleepLevel.TWO in can and reloads:
        yield SleepLevel.TWO


def resting_level(
    engines: Mapping[ModelId, Engine], model: ModelId, policy: Policy, limit: Books
) -> SleepLevel | None:
    """The level at which `model` can sleep beside the others; None: only stopping it works."""
    can = levels(engines[model], policy)
    return next((level for level in can if rests_at(engines, model, level, limit)), None)


def rests_at(
    engines: Mapping[ModelId, Engine], model: ModelId, level: SleepLevel, limit: Books
) -> bool:
    """Whether host RAM has room for `model` asleep at `level` once all orders have ended."""
    need = ledger.asleep(engines[model], level)[ledger.HOST]
    if need <= ledger.charge(engines[model])[ledger.HOST]:
        return True  # it takes no more than it has
    others = sum(
        ledger.eventual(engine)[ledger.HOST] for name, engine in engines.items() if name != model
    )
    return others + need <= limit[ledger.HOST]


def worth_proving(engine: Engine, policy: Policy) -> bool:
    """Whether knowing that a reload works would let it sleep at level 2."""
    traits = engine.traits
    return (
        traits is not None
        and SleepLevel.TWO in traits.levels
        and Proof.RELOAD not in traits.proofs
        and Proof.RELOAD not in engine.unproved
        and engine.spec.level is not SleepLevel.ONE
    )


@dataclass(frozen=True, slots=True, order=True)
class _Node:
    cost: float
    depth: int
    serial: int


def make_room(
    state: State,
    target: ModelId,
    *,
    may_displace: Callable[[Engine], bool],
    may_stop: bool = True,
    may_stop_sleepers: bool = True,
) -> Displacements | None:
    """The cheapest displacements after which `target` fits everywhere; None if there are none.

    Without `may_stop` only those are stopped that cannot sleep at all.
    Counts with what the orders in flight will leave behind. Explores partial choices in the order
    of their cost, so the first complete one that fits is the best.
    """
    limit, need = ledger.room_for(state, target), ledger.awake(state.engines[target])
    choices = [
        (name, [_Choice(0.0, ledger.eventual(engine), displaces=False)])
        for name, engine in state.engines.items()
        if name != target and ledger.eventual(engine)
    ]
    for name, options in choices:
        engine = state.engines[name]
        if not may_displace(engine):
            continue
        if not isinstance(engine.phase, Asleep | FallingAsleep):
            options.extend(_of_awake(state, engine, may_stop=may_stop))
        elif may_stop_sleepers:
            cost = _STOP * 0.6 + _recency(state, engine)
            options.append(_Choice(cost, Books(), displaces=True))
    least = _least(choices)
    heap: list[tuple[_Node, Books, tuple[_Choice, ...]]] = []
    if ledger.within(ledger.total([need, least[0]]), limit):
        heap.append((_Node(0.0, 0, 0), need, ()))
    serial = 0
    while heap:
        node, books, chosen = heapq.heappop(heap)
        if node.depth == len(choices):
            return {
                name: choice.level
                for (name, _), choice in zip(choices, chosen, strict=True)
                if choice.displaces
            }
        for choice in choices[node.depth][1]:
            so_far = ledger.total([books, choice.books])
            if ledger.within(ledger.total([so_far, least[node.depth + 1]]), limit):
                serial += 1
                step = _Node(node.cost + choice.cost, node.depth + 1, serial)
                heapq.heappush(heap, (step, so_far, (*chosen, choice)))
    return None


@dataclass(frozen=True, slots=True)
class _Choice:
    """One way to treat an engine: what it costs, and what the engine then holds."""

    cost: float
    books: Books
    displaces: bool
    level: SleepLevel | None = None


def _of_awake(state: State, engine: Engine, *, may_stop: bool) -> Iterator[_Choice]:
    """Ways to displace an engine that is awake, or about to be."""
    base = _REST + _recency(state, engine)
    if running(engine):
        base += _BUSY - _BEGUN * isinstance(engine.phase, Draining)
    resting = list(levels(engine, state.policy))
    for rank, level in enumerate(resting):
        cost = base + rank * _LOWER
        yield _Choice(cost, ledger.asleep(engine, level), displaces=True, level=level)
    if may_stop or not resting:
        yield _Choice(_STOP + base, Books(), displaces=True)


def _recency(state: State, engine: Engine) -> float:
    """Between 0 and 0.5: the lowest priority goes first, then the least recently used."""
    worth = (engine.spec.priority, engine.last_used)
    less = sum((e.spec.priority, e.last_used) < worth for e in state.engines.values())
    return 0.5 * less / len(state.engines)


def running(engine: Engine) -> frozenset[TicketId]:
    """The tickets it answers now."""
    match engine.phase:
        case Awake(leases=leases) | Draining(leases=leases):
            return leases
        case _:
            return frozenset()


def _least(choices: list[tuple[ModelId, list[_Choice]]]) -> list[Books]:
    """For each depth, the least that all later engines can come to hold: prunes the search."""
    bounds = [Books()]
    for _, options in reversed(choices):
        low = options[0].books.copy()
        for choice in options[1:]:
            low &= choice.books
        bounds.append(ledger.total([bounds[-1], low]))
    return bounds[::-1]


# ---------------------------------------------------------------- forecasts


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a plan; `do` is drain, sleep, stop, start or wake.

    `expected_s` is None where nobody can know: answers end when they end. `why` says the bounds.
    """

    do: str
    model: ModelId
    expected_s: float | None
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    model: ModelId
    steps: tuple[Step, ...]
    lacks: tuple[str, ...] = ()
    """The sums that do not come out; empty if it fits."""

    @property
    def expected_s(self) -> float | None:
        """All steps together; None if one of them is of unknown length."""
        known = [step.expected_s for step in self.steps if step.expected_s is not None]
        return sum(known) if len(known) == len(self.steps) else None


def takes(engine: Engine, act: str) -> float:
    """Typical seconds of `act` (`start`, `stop`, `sleep-1`, …) for this engine."""
    return engine.timings.get(act, DEFAULT_TIMINGS[act])


def switch_cost_s(engine: Engine) -> float:
    """What one switch to `engine` and away from it takes."""
    level = engine.spec.level or SleepLevel.ONE
    return takes(engine, f"wake-{level}") + takes(engine, f"sleep-{level}")


def can_ever_fit(state: State, model: ModelId) -> bool:
    """Whether `model` can be awake at all, if all that is not pinned makes room."""
    pinned = [name for name, engine in state.engines.items() if engine.spec.pinned]
    return make_room(state, model, may_displace=lambda e: e.spec.model not in pinned) is not None


def plan_switch(state: State, model: ModelId) -> Plan:
    """What making `model` awake would take, were it asked for now."""
    room = make_room(state, model, may_displace=lambda engine: not engine.spec.pinned)
    if room is None:
        return Plan(model, (), ledger.explain(state, model))
    steps = [step for name, how in room.items() for step in _displacing(state, name, model, how)]
    return Plan(model, (*steps, *_bringing_up(state.engines[model])))


def _displacing(
    state: State, name: ModelId, target: ModelId, how: SleepLevel | None
) -> Iterator[Step]:
    engine = state.engines[name]
    leases = running(engine)
    if leases:
        what, _ = drains.fate(state, engine, leases, how)
        are = f"{count(len(leases), 'answer')} {'is' if len(leases) == 1 else 'are'} running"
        yield Step("drain", name, None, f"{are}, {what}")
    why = f"makes room for {target}"
    if how is None:
        yield Step("stop", name, takes(engine, "stop"), why)
    else:
        yield Step("sleep", name, takes(engine, f"sleep-{how}"), f"{why} (level {how})")


def _bringing_up(engine: Engine) -> Iterator[Step]:
    match engine.phase:
        case Down() | Stopping():
            yield Step("start", engine.spec.model, takes(engine, "start"), "it is not running")
        case Asleep(level=level) | FallingAsleep(level=level):
            why = f"it sleeps at level {level}"
            yield Step("wake", engine.spec.model, takes(engine, f"wake-{level}"), why)
        case _:
            return
