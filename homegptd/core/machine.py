"""The one place where state changes: `step(state, event, now) -> Outcome`.

`step` is total: every event is legal in every state, and where it means nothing it changes nothing.
After each event the machine pursues its goals until nothing more can be done now.
"""

from typing import assert_never

from msgspec.structs import replace

from . import figures, foreign, freeing, results
from .draft import Draft, Outcome
from .drains import ASK_AGAIN_S
from .events import (
    CancelAsked,
    ConfigChanged,
    EngineDied,
    EngineSilent,
    Event,
    MemorySeen,
    Observed,
    OperationAsked,
    ProveEnded,
    RequestArrived,
    RouseEnded,
    ShutdownAsked,
    SleepEnded,
    StartEnded,
    StopEnded,
    TicketClosed,
    TimePassed,
    WakeEnded,
)
from .goals import arranged, bootstrap, wakes
from .model import (
    Act,
    Asleep,
    Awake,
    Chore,
    Down,
    Draining,
    Engine,
    EngineSpec,
    FallingAsleep,
    Gpu,
    ModelId,
    Operation,
    Phase,
    Policy,
    Startup,
    State,
    Stopping,
    Ticket,
    TicketId,
    Waking,
)
from .outlook import retry_s
from .pursue import pursue
from .refusals import Reason, Refusal


def initial(
    specs: tuple[EngineSpec, ...], policy: Policy, gpus: dict[Gpu, int], host_mib: int
) -> State:
    """Every engine down, nothing observed yet."""
    engines = {spec.model: _new_engine(spec) for spec in specs}
    return State(engines=engines, policy=policy, gpus=gpus, host_mib=host_mib)


def step(state: State, event: Event, now: float) -> Outcome:
    """The next state and what to do, `now` in seconds on a clock that never goes back."""
    d = Draft(state, now)
    _apply(d, event)
    _expire(d)
    pursue(d)
    _leave(d)
    return d.outcome()


def _apply(d: Draft, event: Event) -> None:
    match event:
        case RequestArrived(ticket):
            _arrive(d, ticket)
        case TicketClosed(ticket_id, served):
            _close(d, ticket_id, served=served)
        case OperationAsked(operation):
            _ask(d, operation)
        case CancelAsked(operation_id):
            _cancel(d, operation_id)
        case StartEnded():
            results.start_ended(d, event)
        case WakeEnded():
            results.wake_ended(d, event)
        case RouseEnded():
            results.rouse_ended(d, event)
        case SleepEnded():
            results.sleep_ended(d, event)
        case StopEnded():
            results.stop_ended(d, event)
        case ProveEnded():
            results.prove_ended(d, event)
        case EngineDied():
            results.engine_died(d, event)
        case EngineSilent():
            results.engine_silent(d, event)
        case Observed():
            _observe(d, event)
        case ConfigChanged():
            _reconfigure(d, event)
        case MemorySeen(missing, strangers, pressure):
            d.pressure = pressure
            foreign.see(d, missing, strangers)
        case ShutdownAsked():
            _shut_down(d, event)
        case TimePassed():
            pass
        case _:
            assert_never(event)


# ---------------------------------------------------------------- tickets


def _arrive(d: Draft, ticket: Ticket) -> None:
    d.wanted_at = d.now
    refusal = _why_not(d, ticket)
    if refusal is None:
        d.waiting.append(ticket)
    else:
        d.refuse(ticket.id, refusal)


def _why_not(d: Draft, ticket: Ticket) -> Refusal | None:
    engine = d.engines.get(ticket.model)
    if engine is None or engine.retiring:
        return Refusal(Reason.UNKNOWN_MODEL, f'no model "{ticket.model}"', "homegptctl status")
    if d.stopping:
        return results.shutdown_refusal(d)
    if not engine.enabled:
        return results.disabled_refusal(ticket.model)
    freed = freeing.refusal(d, engine)
    if freed is not None:
        return freed
    if len(d.waiting) >= d.policy.max_waiting:
        text = f"{len(d.waiting)} requests are waiting already"
        return Refusal(
            Reason.QUEUE_FULL, text, retry_after_s=retry_s(d.state(), ticket.model, d.now)
        )
    if isinstance(engine.phase, Down | Stopping):
        failed = results.failed_refusal(d, engine)
        if failed is not None:
            return failed
    return None


def _close(d: Draft, ticket_id: TicketId, *, served: bool) -> None:
    d.wanted_at = d.now
    ticket = d.granted.pop(ticket_id, None)
    if ticket is None:
        d.waiting = [waiting for waiting in d.waiting if waiting.id != ticket_id]
        return
    engine = d.engines.get(ticket.model)
    if engine is not None:
        failures = 0 if served else engine.failures
        phase = _without(engine.phase, ticket_id, d.now)
        # who drains does not become dearer to displace with each answer that ends
        used = engine.last_used if isinstance(phase, Draining) else d.now
        d.put(replace(engine, phase=phase, failures=failures, last_used=used))


def _without(phase: Phase, ticket: TicketId, now: float) -> Phase:
    match phase:
        case Awake(leases=leases) if ticket in leases:
            left = leases - {ticket}
            return Awake(phase.since, left, None if left else now, phase.held_until)
        case Draining(leases=leases):
            return replace(phase, leases=leases - {ticket})
        case Asleep(frozen=frozen) | FallingAsleep(frozen=frozen) | Waking(frozen=frozen):
            return replace(phase, frozen=frozen - {ticket})
        case _:
            return phase


# ---------------------------------------------------------------- operators


def _ask(d: Draft, operation: Operation) -> None:
    engine = d.engines.get(operation.model)
    d.operations.append(operation)
    d.wanted_at = d.now
    if operation.act.of_gpus:
        _lend(d, operation)
    elif engine is None or engine.retiring:
        text = f'no model "{operation.model}"'
        d.finish(operation, text, Refusal(Reason.UNKNOWN_MODEL, text, "homegptctl status"))
    elif d.stopping:
        text = "homeGPT is shutting down"
        d.finish(operation, text, Refusal(Reason.SHUTTING_DOWN, text))
    elif operation.act is Act.STOP:
        _forget(d, engine, operation)
    elif operation.act is not Act.SLEEP:
        engine = figures.forgiven(engine)
        d.put(replace(engine, enabled=True, keep_loaded=True, failures=0, unproved={}))
        if operation.act is Act.START and not isinstance(engine.phase, Down | Stopping):
            d.finish(operation, f"{operation.model} is up already")


def _lend(d: Draft, operation: Operation) -> None:
    if operation.act is Act.RECLAIM:
        d.finish(operation, freeing.reclaim(d, operation.gpus))
        d.chores = arranged(d, ())
    elif d.stopping:
        text = "homeGPT is shutting down"
        d.finish(operation, text, Refusal(Reason.SHUTTING_DOWN, text))
    else:
        freeing.free(d, operation)


def _forget(d: Draft, engine: Engine, operation: Operation) -> None:
    """A stop ends what else is asked of the model, or it would come right back."""
    name = engine.spec.model
    enabled = engine.spec.startup is not Startup.DISABLED
    d.put(replace(engine, enabled=enabled, keep_loaded=False))
    d.drop_chores(name)
    text = f'"{name}" is being stopped'
    refusal = Refusal(Reason.CANCELLED, text, f"homegptctl start {name}")
    for other in [o for o in d.operations if o.model == name and o.id != operation.id]:
        d.finish(other, text, refusal)
    d.refuse_waiting(lambda ticket: ticket.model == name, refusal)


def _cancel(d: Draft, operation_id: int) -> None:
    for operation in [o for o in d.operations if o.id == operation_id]:
        if operation.act is Act.FREE:
            freeing.reclaim(d, operation.gpus)
        text = "cancelled; what had begun ends by itself"
        d.finish(operation, text, Refusal(Reason.CANCELLED, text))


# ---------------------------------------------------------------- the box itself


def _observe(d: Draft, event: Observed) -> None:
    """Life begins: what runs is adopted, and what is missing becomes the bootstrap."""
    if d.since is None:
        d.since = d.wanted_at = d.now
        results.observed(d, event)
        d.chores = [] if d.stopping else bootstrap(d)


def _expire(d: Draft) -> None:
    """What time alone brings about."""
    if d.waiting:
        late = [ticket for ticket in d.waiting if ticket.until <= d.now]
        d.waiting = [ticket for ticket in d.waiting if ticket.until > d.now]
        left_s = {model: retry_s(d.state(), model, d.now) for model in {t.model for t in late}}
        for ticket in late:
            text = f'waited {d.now - ticket.since:.0f} s for "{ticket.model}"'
            after_s = left_s[ticket.model]
            d.refuse(ticket.id, Refusal(Reason.WAITED_TOO_LONG, text, retry_after_s=after_s))
        d.call_at(min((ticket.until for ticket in d.waiting), default=None))
    for name, engine in list(d.engines.items()):
        match engine.phase:
            case Asleep(frozen=frozen, frozen_until=until) if frozen and until is not None:
                if until <= d.now:
                    text = f'"{name}" could not go on within {d.policy.freeze_max_s:.0f} s'
                    d.cut(frozen, text, retry_after_s=ASK_AGAIN_S)
                    d.phase(name, replace(engine.phase, frozen=frozenset(), frozen_until=None))
                d.call_at(until)
            case Stopping(order=None, again_at=again) if again is not None:
                if again <= d.now:
                    d.stop_again(name, engine.phase)
                d.call_at(again)
            case _:
                pass


def _leave(d: Draft) -> None:
    """Engines that left the configuration go once they are down. That is for the first look to say:
    until then they may be running."""
    if d.since is None:
        return
    for name, engine in list(d.engines.items()):
        if engine.retiring and isinstance(engine.phase, Down):
            del d.engines[name]


def _shut_down(d: Draft, event: ShutdownAsked) -> None:
    """Nobody else is let in; what runs or is frozen may end, as long as the owner waits."""
    d.stopping, d.stop_by = True, d.now + event.patience_s
    d.chores = []
    refusal = results.shutdown_refusal(d)
    d.refuse_waiting(lambda ticket: True, refusal)
    for operation in list(d.operations):
        d.finish(operation, refusal.message, refusal)


def _reconfigure(d: Draft, event: ConfigChanged) -> None:
    """Apply the difference; engines whose own settings stay the same notice nothing."""
    d.policy, d.gpus, d.host_mib = event.policy, event.gpus, event.host_mib
    d.freed = {gpu: lent for gpu, lent in d.freed.items() if gpu in event.gpus}
    given = {spec.model: spec for spec in event.specs}
    before = dict(d.engines)
    d.engines = {name: replace(engine, no_room=None) for name, engine in before.items()}
    due = {chore.model for chore in d.chores if chore.act is Act.WAKE}
    for name, engine in list(d.engines.items()):
        if name not in given:
            _retire(d, engine)
        elif given[name].fingerprint != engine.spec.fingerprint:
            _restart_with(d, engine, given[name])
        else:
            _keep(d, engine, given[name])
    for name, spec in given.items():
        if name not in d.engines:
            d.put(_new_engine(spec))
            _load(d, spec)
    leaving = [name for name in d.engines if name not in given]
    d.engines = {name: d.engines[name] for name in [*given, *leaving]}
    if not d.stopping:
        wanted = [spec for spec in event.specs if spec.startup is not Startup.DISABLED]
        up = [s.model for s in wanted if s.model in due or _comes_up(before.get(s.model), s)]
        d.chores = arranged(d, wakes(d, up))


def _comes_up(old: Engine | None, spec: EngineSpec) -> bool:
    """Whether a reload ends with this model awake, as a bootstrap would, if there is room."""
    active = spec.startup is Startup.ACTIVE
    if old is None or old.retiring:
        return active
    if old.spec.fingerprint != spec.fingerprint:
        return active or isinstance(old.phase, Awake | Draining | Waking)
    return active and (old.renew or old.spec.startup is not Startup.ACTIVE)


def _retire(d: Draft, engine: Engine) -> None:
    name = engine.spec.model
    d.put(replace(engine, retiring=True, enabled=False, keep_loaded=False))
    _send_away(d, name, Refusal(Reason.UNKNOWN_MODEL, f'model "{name}" left the configuration'))


def _send_away(d: Draft, name: ModelId, refusal: Refusal) -> None:
    """Nothing is done for this model any more, and nobody waits for it."""
    d.drop_chores(name)
    d.refuse_waiting(lambda ticket: ticket.model == name, refusal)
    for operation in [o for o in d.operations if o.model == name]:
        d.finish(operation, refusal.message, refusal)


def _keep(d: Draft, engine: Engine, spec: EngineSpec) -> None:
    """The process may stay; whether the model is to be had at all can still have changed."""
    was, name = engine.spec.startup, spec.model
    disabled = spec.startup is Startup.DISABLED
    back = engine.retiring or engine.renew
    kept = replace(engine, spec=spec, retiring=False, renew=False, next_spec=None)
    if disabled and (was is not Startup.DISABLED or back):
        up = not isinstance(engine.phase, Down)
        d.put(replace(kept, enabled=False, keep_loaded=False, renew=up))
        _send_away(d, name, results.disabled_refusal(name))
    elif not disabled and (was is Startup.DISABLED or back):
        d.put(replace(kept, enabled=True, keep_loaded=True))
        if isinstance(engine.phase, Down | Stopping):
            _load(d, spec)
    else:
        d.put(kept)


def _restart_with(d: Draft, engine: Engine, spec: EngineSpec) -> None:
    """Its running answers end, then it comes up again with its new settings."""
    name, enabled = spec.model, spec.startup is not Startup.DISABLED
    changed = replace(
        engine, failures=0, enabled=enabled, keep_loaded=enabled, retiring=False, unproved={}
    )
    match engine.phase:
        case Down():
            fresh = figures.configured(changed, spec)
            d.put(replace(fresh, phase=Down(d.now), renew=False, next_spec=None))
        case Stopping() as phase:
            phase = replace(phase, failure=None, retry_at=None)
            d.put(replace(changed, phase=phase, renew=True, next_spec=spec))
        case _:
            d.put(replace(changed, renew=True, next_spec=spec))
    if not enabled:
        _send_away(d, name, results.disabled_refusal(name))
        return
    _load(d, spec)


def _load(d: Draft, spec: EngineSpec) -> None:
    if spec.startup is not Startup.DISABLED and not d.stopping:
        d.drop_chores(spec.model)
        d.chores.append(Chore(Act.START, spec.model, d.now))


def _new_engine(spec: EngineSpec) -> Engine:
    enabled = spec.startup is not Startup.DISABLED
    return Engine(spec, Down(0.0), enabled=enabled, keep_loaded=enabled)
