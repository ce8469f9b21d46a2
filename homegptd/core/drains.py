"""The end of answers before a sleep: waited for, frozen, or honestly cut."""

from msgspec import Struct
from msgspec.structs import replace

from . import ledger
from .draft import Draft
from .model import (
    Draining,
    Engine,
    ModelId,
    OnDeadline,
    Policy,
    Proof,
    SleepLevel,
    SleepMode,
    State,
    TicketId,
)
from .words import span

LEAST_DRAIN_S = 0.5
"""A request that was granted a moment ago must have reached its engine before that is put to sleep,
in seconds."""
ASK_AGAIN_S = 5.0
"""When it is worth asking again after an answer was cut, in seconds: then it waits for its turn."""
CUT_GRACE_S = 5.0
"""How long leases that were told to end may take, in seconds, before vLLM aborts them for us."""


class Resting(Struct, frozen=True):
    """Somebody wants this engine gone: `level` is how it sleeps, None stops it."""

    level: SleepLevel | None
    wanted_by: ModelId
    cut: bool = False


def progress(d: Draft, engine: Engine, phase: Draining, resting: Resting | None) -> None:
    """Take a drain one step on; back to awake if nobody wants the engine gone any more."""
    if resting is not None and (phase.wanted_by, phase.level) != (resting.wanted_by, resting.level):
        phase = replace(phase, wanted_by=resting.wanted_by, level=resting.level)
        d.phase(engine.spec.model, phase)
    if resting is None:
        idle_since = None if phase.leases else d.now
        awake = replace(phase.awake, leases=phase.leases, idle_since=idle_since)
        d.phase(engine.spec.model, awake)
    elif not phase.leases:
        _rest(d, engine, resting, SleepMode.WAIT)
    elif phase.cut_at is not None:
        _after_the_cut(d, engine, phase, resting)
    elif _is_over(d, engine, phase, resting):
        _cut(d, engine, phase, resting)
    elif d.now >= phase.until and obstacle(d, engine, phase.leases, phase.level) is None:
        _freeze(d, engine, phase, resting)
    else:
        if d.now >= phase.until and not phase.late:
            d.phase(engine.spec.model, replace(phase, late=True))
        d.call_at(phase.until)
        d.call_at(phase.since + d.policy.max_answer_s)


# ---------------------------------------------------------------- what the policy says


def drain_s(engine: Engine, policy: Policy) -> float:
    """How long answers may run on before they are frozen or cut, in seconds."""
    given = policy.drain_s if engine.spec.drain_s is None else engine.spec.drain_s
    return max(given, LEAST_DRAIN_S)


def on_deadline(engine: Engine, policy: Policy) -> OnDeadline:
    return engine.spec.on_deadline or policy.on_deadline


def obstacle(
    box: Draft | State, engine: Engine, leases: frozenset[TicketId], level: SleepLevel | None
) -> str | None:
    """Why these answers cannot be frozen while `engine` sleeps at `level`; None: they can.

    Only streams, only at level 1, and only where this box has proved it. `on_deadline: freeze` is
    the operator's word in place of the proof.
    """
    traits, wish = engine.traits, on_deadline(engine, box.policy)
    if wish is OnDeadline.WAIT:
        return "on_deadline is wait"
    if traits is None or not traits.can_keep:
        return "this vLLM cannot freeze"
    if level is not SleepLevel.ONE:
        return "a stop freezes nothing" if level is None else "level 2 keeps no answer"
    if not box.freed.keys().isdisjoint(engine.spec.gpus):
        return "its GPU is being freed"
    if not all(box.granted[ticket].freezable for ticket in leases):
        return "not all are streams"
    if wish is OnDeadline.AUTO and not traits.proofs.get(Proof.FREEZE, False):
        tried = Proof.FREEZE in traits.proofs
        return "freezing did not work here" if tried else "freezing is unproved here"
    return None


def fate(
    box: Draft | State, engine: Engine, leases: frozenset[TicketId], level: SleepLevel | None
) -> tuple[str, float]:
    """What the policy does to answers that go on, and how long after the drain began, in seconds.

    For example `waiting up to 10 s, then frozen`, or `waiting up to 30 min (freezing is unproved
    here)`.
    """
    policy = box.policy
    longest, patient = policy.max_answer_s, drain_s(engine, policy)
    first = min(patient, longest)
    if on_deadline(engine, policy) is OnDeadline.CUT or longest <= patient:
        return f"waiting up to {span(first)}, then cut", first
    why = obstacle(box, engine, leases, level)
    if why is None:
        return f"waiting up to {span(first)}, then frozen", first
    return f"waiting up to {span(longest)} ({why})", longest


def deadline(box: Draft | State, engine: Engine, phase: Draining) -> float:
    """The instant at which something happens to answers that still run."""
    if phase.cut_at is not None:
        return phase.cut_at + CUT_GRACE_S
    _, after_s = fate(box, engine, phase.leases, phase.level)
    return min(max(phase.since + after_s, phase.until), phase.since + box.policy.max_answer_s)


def _is_over(d: Draft, engine: Engine, phase: Draining, resting: Resting) -> bool:
    """Whether waiting has come to its end, so that only cutting is left."""
    late = d.now >= phase.until and on_deadline(engine, d.policy) is OnDeadline.CUT
    return resting.cut or late or d.now >= phase.since + d.policy.max_answer_s


def _freeze(d: Draft, engine: Engine, phase: Draining, resting: Resting) -> None:
    if d.quiet(engine.spec.gpus) and _ram_allows(d, engine, SleepLevel.ONE):
        d.sleep(
            engine.spec.model,
            SleepLevel.ONE,
            mode=SleepMode.KEEP,
            frozen=phase.leases,
            wanted_by=resting.wanted_by,
        )


def _cut(d: Draft, engine: Engine, phase: Draining, resting: Resting) -> None:
    name = engine.spec.model
    for_itself = resting.wanted_by == name
    room = "" if for_itself else f' to make room for "{resting.wanted_by}"'
    text = f'the answer of "{name}" was cut{room}: {_why_cut(d, phase, resting)}'
    d.cut(phase.leases, text, retry_after_s=None if for_itself else ASK_AGAIN_S)
    d.phase(name, replace(phase, cut_at=d.now))
    d.call_at(d.now + CUT_GRACE_S)


def _why_cut(d: Draft, phase: Draining, resting: Resting) -> str:
    if resting.cut:
        return "an operator asked for it now"
    if d.now >= phase.since + d.policy.max_answer_s:
        return "it outlived the longest answer allowed"
    return f"it went on for more than {span(phase.until - phase.since)}, and on_deadline is cut"


def _after_the_cut(d: Draft, engine: Engine, phase: Draining, resting: Resting) -> None:
    end = (phase.cut_at or 0.0) + CUT_GRACE_S
    if d.now >= end:
        _rest(d, engine, resting, SleepMode.ABORT)
    else:
        d.call_at(end)


def _rest(d: Draft, engine: Engine, resting: Resting, mode: SleepMode) -> None:
    name = engine.spec.model
    if not d.quiet(engine.spec.gpus):
        return
    if resting.level is None:
        d.stop(name, wanted_by=resting.wanted_by)
    elif _ram_allows(d, engine, resting.level):
        d.sleep(name, resting.level, mode=mode, wanted_by=resting.wanted_by)


def _ram_allows(d: Draft, engine: Engine, level: SleepLevel) -> bool:
    """Plans of one step do not see each other's sleeps; the later one is made anew."""
    return ledger.ram_allows(d.engines, engine.spec.model, level, ledger.budget(d.state()))
