"""What the box should come to, in the order in which it matters.

Goals are derived afresh from the state at every step; nothing remembers them, so none can be stale.
"""

from collections.abc import Iterable, Iterator

from . import freeing, ledger, levels, plans
from .admission import asks_for_a_switch
from .draft import Draft
from .fairness import patience_s
from .goal import Goal, Reach, may_displace
from .idleness import by_itself, may_pin_now, wants_freeze_proof
from .model import (
    Act,
    Asleep,
    Awake,
    Chore,
    Down,
    Engine,
    FallingAsleep,
    ModelId,
    Proof,
    SleepLevel,
    Starting,
    Startup,
    Stopping,
    Waking,
)

_REACH = {
    Act.SWITCH: Reach.AWAKE,
    Act.WAKE: Reach.AWAKE,
    Act.SLEEP: Reach.ASLEEP,
    Act.START: Reach.LOADED,
    Act.STOP: Reach.DOWN,
    Act.PROVE: Reach.PROVEN,
}


def goals(d: Draft) -> Iterator[Goal]:
    """Operators first, in order; then who waits, fairly; then what the box does by itself."""
    for operation in list(d.operations):
        if operation.act is Act.FREE:
            yield from freeing.goals(d, operation)
        else:
            yield Goal(_REACH[operation.act], operation.model, operation.since, operation)
    if d.stopping:
        yield from _thaws(d)
        return
    if d.freed:
        yield from freeing.goals(d)
    for name, engine in d.engines.items():
        if engine.retiring or engine.renew:
            yield Goal(Reach.DOWN, name, d.now)
    yield from _waiters(d)
    if not d.waiting and not d.operations:
        yield from by_itself(d)


def _waiters(d: Draft) -> Iterator[Goal]:
    """One goal for each model that somebody waits for, and the next chore among them.

    Each unit of priority counts as if the ticket had come one patience earlier: so it goes first,
    and yet nobody is overtaken for ever.
    """
    oldest: dict[ModelId, tuple[float, float]] = {}
    for ticket in d.waiting:
        if not asks_for_a_switch(ticket, d.engines[ticket.model]):
            continue
        priority = ticket.priority + d.engines[ticket.model].spec.priority
        lead = priority * patience_s(d, ticket.model) if priority else 0.0
        rank = (ticket.since - lead, ticket.since)
        oldest[ticket.model] = min(oldest.get(ticket.model, rank), rank)
    for goal in _thaws(d):
        rank = (goal.since, goal.since)
        oldest[goal.model] = min(oldest.get(goal.model, rank), rank)
    ranked = [(rank[0], Goal(Reach.AWAKE, model, rank[1])) for model, rank in oldest.items()]
    if d.chores:
        goal = _of_chore(d.chores[0])
        ranked.append((goal.since, goal))
    yield from (goal for _, goal in sorted(ranked, key=lambda pair: pair[0]))


def _thaws(d: Draft) -> Iterator[Goal]:
    """Frozen answers want their engine awake; in a shutdown that is all that is still wanted.

    Gentle there: answers that run are not frozen to let others end.
    """
    for name, engine in d.engines.items():
        since = _frozen_since(engine)
        if since is not None:
            yield Goal(Reach.AWAKE, name, since, gentle=d.stopping)


def _of_chore(chore: Chore) -> Goal:
    reach = Reach.LOADED if chore.act is Act.START else Reach.AWAKE
    return Goal(reach, chore.model, chore.since, chore=chore, gentle=chore.gentle)


def _frozen_since(engine: Engine) -> float | None:
    phase = engine.phase
    if isinstance(phase, Asleep | FallingAsleep | Waking) and phase.frozen:
        return phase.since
    return None


def unproved(d: Draft, goal: Goal, level: SleepLevel | None) -> Proof | None:
    """What a freshly loaded engine proves before it first sleeps at `level`, None if nothing.

    A reload where that decides whether it can sleep here at all; freezing if nobody waits for it.
    """
    engine = d.engines[goal.model]
    lowered = level is None or engine.spec.level is SleepLevel.TWO
    wants_two = lowered or (d.policy.level is SleepLevel.TWO and engine.spec.level is None)
    if wants_two and levels.worth_proving(engine, d.policy):
        return Proof.RELOAD
    own = 0 if goal.operation is None else 1
    alone = not d.waiting and len(d.operations) == own
    if alone and level is SleepLevel.ONE and wants_freeze_proof(engine, d.policy):
        return Proof.FREEZE if may_pin_now(d, goal.model) else None
    return None


def resting_level(d: Draft, goal: Goal) -> SleepLevel | None:
    """The level at which the goal's engine can be put to sleep: as asked, or the best; or none."""
    engine, limit = d.engines[goal.model], ledger.budget(d.state())
    asked = goal.operation.level if goal.operation else None
    if asked is None or engine.traits is None:
        return levels.resting_level(d.engines, goal.model, d.policy, limit)
    proved = asked is SleepLevel.ONE or engine.traits.proofs.get(Proof.RELOAD, False)
    able = proved and asked in engine.traits.levels
    return asked if able and levels.rests_at(d.engines, goal.model, asked, limit) else None


def bootstrap(d: Draft) -> list[Chore]:
    """Load what is not up, in the order of the configuration; then wake what is to be awake.

    A restart of the daemon changes nothing: what was found awake stays, or is woken again.
    """
    staying = [e for e in d.engines.values() if not e.retiring]
    wanted = [e for e in staying if e.spec.startup is not Startup.DISABLED]
    awake = [e.spec.model for e in staying if isinstance(e.phase, Awake)]
    loads = [
        Chore(Act.START, engine.spec.model, d.now, gentle=bool(awake))
        for engine in wanted
        if isinstance(engine.phase, Down | Starting | Stopping)
    ]
    if not awake:
        awake = [e.spec.model for e in wanted if e.spec.startup is Startup.ACTIVE]
        awake.sort(key=lambda name: name != d.policy.default)
    return [*loads, *wakes(d, awake)]


def wakes(d: Draft, models: Iterable[ModelId]) -> list[Chore]:
    """Chores that wake these models once all is loaded, if nobody uses their place then."""
    return [Chore(Act.WAKE, name, d.now, gentle=True) for name in models]


def arranged(d: Draft, more: Iterable[Chore]) -> list[Chore]:
    """The box's chores and `more` of them: loads first, and of the wakes the default's."""
    told = {(chore.act, chore.model) for chore in d.chores}
    chores = [*d.chores, *(c for c in more if (c.act, c.model) not in told)]
    chores.sort(
        key=lambda c: (c.act is Act.WAKE, c.act is Act.WAKE and c.model != d.policy.default)
    )
    return chores


def restores(d: Draft) -> list[Chore]:
    """Load again what a failure took down, once its back-off is over and there is quiet room.

    Quiet is what nobody has used for `restore_after_s`; it is woken again afterwards.
    """
    if d.waiting or d.operations or d.chores or d.stopping:
        return []
    for name, engine in d.engines.items():
        if freeing.is_freed(d, engine):
            continue
        match engine.phase:
            case Down(failure=failure, retry_at=at) if failure and at and engine.keep_loaded:
                if at > d.now:
                    d.call_at(at)
                elif _quiet_room(d, name):
                    load = Chore(Act.START, name, d.now, gentle=True)
                    return [load, *wakes(d, [name] if _is_missed(d, engine) else [])]
            case _:
                pass
    return []


def _quiet_room(d: Draft, model: ModelId) -> bool:
    """Whether `model` fits beside all that is awake, asleep, or was not used for a while."""
    goal = Goal(Reach.LOADED, model, d.now, gentle=True)

    def quiet(engine: Engine) -> bool:
        if isinstance(engine.phase, Awake) and engine.phase.idle_since is not None:
            at = engine.phase.idle_since + d.policy.restore_after_s
            d.call_at(at)
            d.call_at(engine.phase.held_until)
            return at <= d.now and may_displace(d, goal, engine)
        return False

    state = d.state()
    found = plans.make_room(
        state, model, may_displace=quiet, may_stop=False, may_stop_sleepers=False
    )
    return found is not None


def _is_missed(d: Draft, engine: Engine) -> bool:
    """Whether it should be active, and nobody is in its place."""
    gpus = set(engine.spec.gpus)
    return engine.spec.startup is Startup.ACTIVE and not any(
        isinstance(other.phase, Awake) and not gpus.isdisjoint(other.spec.gpus)
        for other in d.engines.values()
    )
