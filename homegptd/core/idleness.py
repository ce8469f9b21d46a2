"""What the box does by itself while nobody wants anything: proofs, rest, and the default model."""

from collections.abc import Iterator

from . import freeing, ledger, levels
from .draft import Draft
from .goal import Goal, Reach, room
from .model import Asleep, Awake, Down, Draining, Engine, ModelId, Policy, Proof, SleepLevel


def by_itself(d: Draft) -> Iterator[Goal]:
    """At most one goal for each engine, or two could pull it both ways."""
    for engine in d.engines.values():
        match engine.phase:
            case Awake(idle_since=float() as since):
                yield from _idle(d, engine, since)
            case Draining(leases=leases, awake=awake, since=since) if not leases:
                yield from _idle(d, engine, awake.idle_since or since)
            case Asleep(frozen=frozen) if not frozen and engine.spec.stop_after_s is not None:
                yield from _stop(d, engine, max(engine.last_used, engine.up_since))
            case _:
                pass
    if d.policy.return_to_default_s is not None:
        yield from _home(d, d.policy.return_to_default_s)


def _idle(d: Draft, engine: Engine, idle_since: float) -> Iterator[Goal]:
    """The stop, if it is due; else the proof before the sleep."""
    if engine.spec.stop_after_s is not None and (due := list(_stop(d, engine, idle_since))):
        yield from due
        return
    name, rest_s = engine.spec.model, engine.spec.sleep_after_s
    if d.booted and wants_freeze_proof(engine, d.policy) and may_pin_now(d, name):
        at = idle_since + min(d.policy.prove_after_s, rest_s or d.policy.prove_after_s)
        reach = Reach.PROVEN
    elif rest_s is not None and not engine.spec.pinned:
        at, reach = idle_since + rest_s, Reach.ASLEEP
    else:
        return
    if at <= d.now:
        yield Goal(reach, name, d.now)
    d.call_at(at)


def _stop(d: Draft, engine: Engine, quiet_since: float) -> Iterator[Goal]:
    """After `stop_after_s` without a request its RAM and its residue are given back."""
    rest_s = engine.spec.stop_after_s
    if rest_s is None or engine.spec.pinned:
        return
    at = quiet_since + rest_s
    if at <= d.now:
        yield Goal(Reach.DOWN, engine.spec.model, d.now)
    d.call_at(at)


def _home(d: Draft, rest_s: float) -> Iterator[Goal]:
    """The default model is awake again once nobody wanted anything for `return_to_default_s`."""
    name = d.policy.default
    engine = d.engines.get(name) if name is not None else None
    if engine is None or not d.booted or d.chores or d.granted:
        return
    spec, phase = engine.spec, engine.phase
    rests = spec.sleep_after_s is not None or spec.stop_after_s is not None
    out = not engine.enabled or engine.retiring or engine.renew or freeing.is_freed(d, engine)
    away = isinstance(phase, Asleep) or (isinstance(phase, Down) and phase.failure is None)
    if rests or out or not away:
        return
    at = d.wanted_at + rest_s
    goal = Goal(Reach.AWAKE, spec.model, d.now, gentle=True)
    if at <= d.now and room(d, goal) is not None:
        yield goal
    d.call_at(at)


def may_pin_now(d: Draft, model: ModelId) -> bool:
    """Whether host RAM has room at this moment for `model` to sleep at level 1."""
    limit = ledger.budget(d.state())
    return ledger.ram_allows(d.engines, model, SleepLevel.ONE, limit)


def wants_freeze_proof(engine: Engine, policy: Policy) -> bool:
    """Whether freezing this engine's answers is possible, of use, and still unproved."""
    traits = engine.traits
    return (
        traits is not None
        and traits.can_keep
        and SleepLevel.ONE in levels.levels(engine, policy)
        and Proof.FREEZE not in traits.proofs
        and Proof.FREEZE not in engine.unproved
    )
