"""What came of orders, and what befell engines that nobody gave an order.

A result counts only if it belongs to the order that the engine's phase is waiting for.
"""

from msgspec.structs import replace

from . import durations, figures, foreign, likely
from .commands import Probe
from .draft import Draft
from .events import (
    EngineDied,
    EngineSilent,
    Found,
    Observed,
    ProveEnded,
    RouseEnded,
    SleepEnded,
    StartEnded,
    StopEnded,
    WakeEnded,
)
from .model import (
    Act,
    Asleep,
    Awake,
    Down,
    Draining,
    Engine,
    Failure,
    FallingAsleep,
    ModelId,
    OrderId,
    Proving,
    Roused,
    Rousing,
    SleepLevel,
    Starting,
    Stopping,
    TicketId,
    Traits,
    Waking,
    half_awake,
)
from .refusals import NEXT_LIFE_S, Reason, Refusal

STOP_AGAIN_S = 30.0
"""When a stop that left something behind is tried again, in seconds."""


def start_ended(d: Draft, event: StartEnded) -> None:
    engine = _awaited(d, event.model, event.order, Starting)
    if engine is None:
        return
    if event.crowded is not None:
        d.phase(event.model, Down(d.now))
        foreign.bar(d, event.model, event.crowded)
        return
    if event.failure is not None or event.traits is None:
        _fail(d, engine, event.failure or Failure("it did not say what it is"), again_at_once=False)
        return
    adopted = isinstance(engine.phase, Starting) and engine.phase.adopts
    timed = engine if adopted else _timed(d, engine)
    phase = _found_phase(d, event.traits)
    known = figures.identified(timed, event.traits)
    if adopted:
        noted = None if engine.pins_unsure else engine.holds_pinned
        known = _with_pins(known, event.traits, noted)
        known = figures.adopted(known, event.after)
    else:
        known = replace(known, holds_pinned=isinstance(phase, Asleep))
        known = figures.started(known, event.before, event.after)
    d.put(replace(known, phase=phase, up_since=d.now, no_room=None))
    _came_up(d, event.model)
    d.watch(event.model)


def wake_ended(d: Draft, event: WakeEnded) -> None:
    engine = _awaited(d, event.model, event.order, Waking)
    if engine is None or not isinstance(engine.phase, Waking):
        return
    if event.crowded is not None:
        _back_to_sleep(d, engine, engine.phase)
        foreign.bar(d, event.model, event.crowded)
        return
    if event.failure is not None:
        _fail(d, engine, event.failure)
        return
    frozen = engine.phase.frozen
    awake = Awake(d.now, leases=frozen, idle_since=None if frozen else d.now)
    roused = engine.phase.roused
    timed = figures.woke(_timed(d, engine), event.before, event.after, roused=roused)
    d.put(replace(timed, phase=awake, last_used=d.now, no_room=None))
    _came_up(d, event.model)


def _came_up(d: Draft, model: ModelId) -> None:
    """Remember whom a wake was for; what the box does by itself says nothing of what is likely."""
    if d.is_wanted(model):
        d.wanted = (*d.wanted, model)[-likely.KEPT :]


def rouse_ended(d: Draft, event: RouseEnded) -> None:
    engine = _awaited(d, event.model, event.order, Rousing)
    if engine is None or not isinstance(engine.phase, Rousing):
        return
    level = engine.phase.level
    if event.crowded is not None:  # in one look, which may have come too soon to refuse anybody
        d.phase(event.model, Asleep(level, d.now, crowded=True))
        return
    if event.failure is not None:
        _fail(d, engine, event.failure)
        return
    timed = figures.roused(_timed(d, engine), event.before, event.after)
    d.put(replace(timed, phase=Roused(level, d.now)))


def _back_to_sleep(d: Draft, engine: Engine, phase: Waking) -> None:
    if phase.roused:
        d.phase(engine.spec.model, Roused(phase.level, d.now))
        return
    until = d.now + d.policy.freeze_max_s if phase.frozen else None
    d.phase(engine.spec.model, Asleep(phase.level, d.now, phase.frozen, until))


def sleep_ended(d: Draft, event: SleepEnded) -> None:
    engine = _awaited(d, event.model, event.order, FallingAsleep)
    if engine is None or not isinstance(engine.phase, FallingAsleep):
        return
    if event.failure is not None:
        _fail(d, engine, event.failure)
        return
    why = figures.hoarded(engine, event.before, event.after)
    if why is not None:
        d.put(engine if engine.phase.roused else figures.hoarding(engine))
        text = f"vLLM says that it sleeps, but only {why}"
        _fail(d, d.engines[event.model], Failure(text, f"homegptctl logs {event.model}"))
        return
    level, frozen = engine.phase.level, engine.phase.frozen
    until = d.now + d.policy.freeze_max_s if frozen else None
    asleep = Asleep(level, d.now, frozen, until)
    d.put(replace(figures.slept(_timed(d, engine), event.before, event.after), phase=asleep))


def stop_ended(d: Draft, event: StopEnded) -> None:
    engine = _awaited(d, event.model, event.order, Stopping)
    if engine is None or not isinstance(engine.phase, Stopping):
        return
    if event.failure is not None:
        again = d.now + STOP_AGAIN_S
        d.phase(event.model, replace(engine.phase, order=None, again_at=again))
        return
    down = Down(d.now, engine.phase.failure, engine.phase.retry_at)
    ended = figures.renewed(_timed(d, engine))
    d.put(
        replace(
            figures.configured(ended, engine.next_spec or engine.spec),
            phase=down,
            traits=None,
            holds_pinned=False,
            renew=False,
            next_spec=None,
        )
    )
    refusal = failed_refusal(d, d.engines[event.model])
    if refusal is not None:
        d.refuse_waiting(lambda ticket: ticket.model == event.model, refusal)


def prove_ended(d: Draft, event: ProveEnded) -> None:
    engine = _awaited(d, event.model, event.order, Proving)
    if engine is None or engine.traits is None:
        return
    if event.failure is None:
        proofs = {**engine.traits.proofs, event.proof: event.holds}
        unproved = dict(engine.unproved)
        if not event.holds:
            unproved[event.proof] = event.detail
        traits = replace(engine.traits, proofs=proofs)
        awake = Awake(d.now, idle_since=d.now)
        engine = figures.woke(engine, None, event.after)
        d.put(replace(engine, traits=traits, unproved=unproved, phase=awake))
        return
    unproved = {**engine.unproved, event.proof: event.failure.message}
    d.put(replace(engine, unproved=unproved))
    _fail(d, d.engines[event.model], event.failure)


def engine_died(d: Draft, event: EngineDied) -> None:
    engine = d.engines.get(event.model)
    if engine is None or engine.incarnation != event.incarnation:
        return
    match engine.phase:
        case Down() | Stopping() | Starting():
            pass  # already known, ordered, or told by the start itself
        case _:
            _fail(d, engine, event.failure)


def engine_silent(d: Draft, event: EngineSilent) -> None:
    """A long silence is a reason to ask, not a proof: the prompt may be long, the queue full."""
    engine = d.engines.get(event.model)
    if engine is None or engine.incarnation != event.incarnation:
        return
    if isinstance(engine.phase, Awake | Draining):
        d.say(Probe(event.model, event.incarnation))


def observed(d: Draft, event: Observed) -> None:
    """Adopt what runs. One that does not answer yet is started, which adopts it when it does.

    Of several such on one GPU only the first is: they would fight for its memory. The others are
    stopped and come up in their turn.
    """
    for name, found in event.found.items():
        engine = d.engines.get(name)
        if engine is not None:
            _adopt(d, engine, found)


def _adopt(d: Draft, engine: Engine, found: Found) -> None:
    name = engine.spec.model
    if found.traits is None:
        if d.quiet(engine.spec.gpus):
            d.start(name, adopts=True)
        else:
            d.stop(name)
        pins, unsure = found.pinned is not False, found.pinned is None
        d.put(replace(d.engines[name], holds_pinned=pins, pins_unsure=unsure))
        return
    phase = _found_phase(d, found.traits)
    known = figures.identified(engine, found.traits)
    known = replace(
        known,
        phase=phase,
        incarnation=engine.incarnation + 1,
        up_since=d.now,
        enabled=True,
    )
    known = _with_pins(known, found.traits, found.pinned)
    d.put(figures.adopted(known, found.held))
    d.watch(name)


def _with_pins(engine: Engine, traits: Traits, noted: bool | None) -> Engine:
    """What was found may have slept at level 1 before: nobody else than we puts it to sleep."""
    sure = traits.asleep_level is SleepLevel.ONE
    pins = sure or (SleepLevel.ONE in traits.levels and noted is not False)
    return replace(engine, holds_pinned=pins, pins_unsure=pins and not sure and noted is None)


def _found_phase(d: Draft, traits: Traits) -> Asleep | Awake:
    """An unknown level counts as 2: reloading what was kept is slow but right."""
    if traits.asleep:
        return Asleep(traits.asleep_level or SleepLevel.TWO, d.now)
    return Awake(d.now, idle_since=d.now)


# ---------------------------------------------------------------- failure


def give_up(d: Draft, engine: Engine, failure: Failure) -> None:
    """Nobody waits for its order any more: it has failed."""
    _fail(d, engine, failure)


def _fail(d: Draft, engine: Engine, failure: Failure, *, again_at_once: bool = True) -> None:
    """Stop what is left of it; it may start again after a back-off that grows."""
    name = engine.spec.model
    failures = engine.failures + 1
    retry_at = _retry_at(d, failures, failure, again_at_once=again_at_once)
    text = f'"{name}" failed while its answer was frozen: {failure.message}'
    d.cut(
        frozen(engine), text, retry_after_s=None if retry_at is None else max(1.0, retry_at - d.now)
    )
    if half_awake(engine.phase):
        engine = figures.rouses_badly(engine)
    d.put(replace(engine, failures=failures))
    d.stop(name, failure, retry_at=retry_at)
    d.drop_chores(name)
    refusal = Refusal(Reason.MODEL_FAILED, _cannot(name, failure), failure.hint)
    for operation in [o for o in d.operations if o.model == name and o.act is not Act.STOP]:
        d.finish(operation, refusal.message, refusal)


def _retry_at(d: Draft, failures: int, failure: Failure, *, again_at_once: bool) -> float | None:
    """The first failure of an engine that worked costs nothing; after that the pause doubles."""
    if failure.lasting or failures >= d.policy.max_failures:
        return None
    grown = failures - 1 if again_at_once else failures
    if grown == 0:
        return d.now
    return d.now + min(d.policy.backoff_s * 2.0 ** (grown - 1), d.policy.backoff_max_s)


def failed_refusal(d: Draft, engine: Engine) -> Refusal | None:
    """Why requests for a failed engine are turned away during its back-off; None: they wait."""
    if not isinstance(engine.phase, Down | Stopping) or engine.phase.failure is None:
        return None
    failure, at = engine.phase.failure, engine.phase.retry_at
    if at is not None and at <= d.now:
        return None
    name = engine.spec.model
    wait = None if at is None else at - d.now
    hint = failure.hint or f"homegptctl logs {name}"
    return Refusal(Reason.MODEL_FAILED, _cannot(name, failure), hint, retry_after_s=wait)


def disabled_refusal(name: ModelId) -> Refusal:
    hint = f"homegptctl start {name}"
    return Refusal(Reason.MODEL_DISABLED, f'model "{name}" is disabled', hint)


def shutdown_refusal(d: Draft) -> Refusal:
    """Before running answers have ended nobody else is here who could answer."""
    left_s = max(d.stop_by - d.now, 0.0) if d.granted else 0.0
    text = "homeGPT is shutting down"
    return Refusal(Reason.SHUTTING_DOWN, text, retry_after_s=left_s + NEXT_LIFE_S)


def _cannot(name: ModelId, failure: Failure) -> str:
    return f'model "{name}" is not available: {failure.message}'


def frozen(engine: Engine) -> frozenset[TicketId]:
    """Tickets whose answers are held in this engine while it sleeps."""
    match engine.phase:
        case Asleep(frozen=frozen) | FallingAsleep(frozen=frozen) | Waking(frozen=frozen):
            return frozen
        case _:
            return frozenset()


# ---------------------------------------------------------------- helpers


def _awaited(d: Draft, model: ModelId, order: OrderId, phase: type) -> Engine | None:
    engine = d.engines.get(model)
    if engine is None or not isinstance(engine.phase, phase):
        return None
    return engine if getattr(engine.phase, "order", None) == order else None


def _timed(d: Draft, engine: Engine) -> Engine:
    """The engine with what the order took that just ended."""
    act = durations.act_of(engine.phase)
    return engine if act is None else durations.timed(engine, act, d.now - engine.phase.since)
