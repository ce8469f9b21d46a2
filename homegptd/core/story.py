"""What a step came to, in words: the log lines of a change, and one line for the whole state.

`tell` compares the state before and after, so no path of the machine can forget a line or say it
twice. Levels: info is the ordinary course, warning means that somebody should look while the
service goes on, error that an engine is out.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, assert_never

from msgspec import Struct, field

from . import drains, story_memory
from .commands import Cut, Finish, Refuse
from .draft import Outcome
from .events import (
    ConfigChanged,
    EngineSilent,
    Event,
    Observed,
    OperationAsked,
    ProveEnded,
    RequestArrived,
    ShutdownAsked,
    StopEnded,
)
from .model import (
    Act,
    Asleep,
    Awake,
    Down,
    Draining,
    Ended,
    Engine,
    Failure,
    FallingAsleep,
    ModelId,
    Operation,
    Phase,
    Proof,
    Proving,
    Roused,
    Rousing,
    Starting,
    Startup,
    State,
    Stopping,
    TicketId,
    Waking,
)
from .refusals import Reason
from .words import count, span

Level = Literal["info", "warning", "error"]

DOING = {Proof.FREEZE: "freezing", Proof.RELOAD: "reloading"}
"""What a proof is about, in a sentence."""


class Line(Struct, frozen=True):
    """One line of the log. `kind` is a kebab-case word to filter by."""

    level: Level
    kind: str
    model: ModelId | None
    text: str
    fields: Mapping[str, str | int | float] = field(default_factory=dict)


def tell(before: State, event: Event, outcome: Outcome, now: float) -> tuple[Line, ...]:
    """What is worth a line in this step; nothing for a request that is simply granted or closed."""
    after = outcome.state
    known = before.engines
    changed = [e for name, e in after.engines.items() if known.get(name) is not e]
    barred = story_memory.barred(event)
    moved = [e for e in changed if _moved(known.get(e.spec.model), e)]
    moved = [e for e in moved if e.spec.model != barred]
    moved.sort(key=lambda e: _acts(e.phase))  # what has ended comes before what begins
    quiet = not moved and before.booted is after.booted
    if quiet and isinstance(event, RequestArrived) and len(outcome.commands) <= 1:
        return tuple(_refusals(before, event, outcome))
    lines = [*_asked(event, after), *_box(before, event, after)]
    lines += [_phase(known.get(engine.spec.model), event, engine, after, now) for engine in moved]
    for engine in changed:
        lines += _outlived(known.get(engine.spec.model), engine, after, now)
    lines += [
        Line("warning" if warns else "info", kind, model, text)
        for warns, kind, model, text in story_memory.lines(before, event, after)
    ]
    lines += [*_trouble(before, event, after, now), *_no_room(before, changed)]
    lines += [*_cuts(before, outcome), *_refusals(before, event, outcome)]
    lines += [_ended(c.ended, now) for c in outcome.commands if isinstance(c, Finish)]
    if after.booted and not before.booted:
        lines.append(_ready(after, now))
    return tuple(lines)


def summary(state: State) -> str:
    """The whole state in one short ASCII line, for systemd's STATUS= and `homegptctl status`."""
    if state.stopping:
        text = f"stopping: {count(len(state.granted), 'answer')} running"
    elif not state.booted:
        text = f"bootstrap {_progress(state)}"
    else:
        word = "degraded" if _failed(state) else "ready"
        crowd = f"{len(state.granted)} running, {len(state.waiting)} waiting"
        lent = "".join(f"gpu{gpu} freed by {each.by}; " for gpu, each in state.freed.items())
        text = f"{word}: {_population(state)}; {lent}{crowd}"
    return text.encode("ascii", "replace").decode("ascii")


def phase_word(phase: Phase) -> str:
    """The glossary's word for a phase."""
    match phase:
        case Down():
            return "down"
        case Starting():
            return "starting"
        case Asleep():
            return "asleep"
        case Rousing():
            return "rousing"
        case Roused():
            return "roused"
        case Waking():
            return "waking"
        case Awake():
            return "awake"
        case Draining():
            return "draining"
        case FallingAsleep():
            return "falling asleep"
        case Proving():
            return "proving"
        case Stopping():
            return "stopping"
        case _:
            assert_never(phase)


def ends_first(phase: Phase) -> bool:
    """Whether a stop waits for an order in flight, unless somebody says `--now`."""
    return isinstance(phase, Rousing | Waking | FallingAsleep | Proving)


# ---------------------------------------------------------------- phases


def _moved(old: Engine | None, new: Engine) -> bool:
    return old is not None and type(old.phase) is not type(new.phase)


def _phase(old: Engine | None, event: Event, new: Engine, after: State, now: float) -> Line:
    was = old.phase if old is not None else Down(now)
    took = round(now - was.since, 3)
    fields: dict[str, str | int | float] = {
        "phase": f"{phase_word(was)} → {phase_word(new.phase)}",
        "took": took,
    }
    level, text = _sentence(was, event, new, after, now, took)
    failure = _failure(new.phase)
    if failure is not None and failure.hint and level == "error":
        text = f"{text}; hint: {failure.hint}"
        fields["hint"] = failure.hint
    return Line(level, "phase", new.spec.model, text, fields)


def _sentence(
    was: Phase, event: Event, engine: Engine, after: State, now: float, took: float
) -> tuple[Level, str]:
    name = engine.spec.model
    adopted = isinstance(event, Observed) and name in event.found
    match engine.phase:
        case Down(failure=None):
            return "info", f"{name} is down{_how(was, took)}"
        case Down(retry_at=at):
            return "warning", f"{name} is down; {_again(at, now)}"
        case Starting():
            if adopted:
                return "info", f"{name} was found running, but does not answer yet"
            tried = f" (try {engine.failures + 1})" if engine.failures else ""
            return "info", f"{name} is starting{tried}"
        case Asleep(crowded=True):
            return "info", f"{name} is asleep still: its weights find no room yet"
        case Asleep(level=level, frozen=frozen):
            verb = "was found asleep" if adopted else "is asleep"
            held_back = f" with {count(len(frozen), 'frozen answer')}" if frozen else ""
            return "info", f"{name} {verb} at level {level}{held_back}{_how(was, took)}"
        case Rousing():
            return "info", f"{name} is rousing: its weights come back meanwhile"
        case Roused():
            return "info", f"{name} is roused: its weights are back{_how(was, took)}"
        case Waking(level=level, roused=roused):
            there = "; its weights are back already" if roused else ""
            return "info", f"{name} is waking from level {level}{there}"
        case Awake():
            return "info", _awake_again(was, event, name, took)
        case Draining() as phase:
            return "info", f"{_whom(after, phase.wanted_by, name)} {_drains(phase, engine, after)}"
        case FallingAsleep(level=level, frozen=frozen) as phase:
            frozen_first = f"{count(len(frozen), 'answer')} frozen, " if frozen else ""
            again = " again: nobody wants it any more" if phase.roused else ""
            text = f"{frozen_first}falling asleep at level {level}{again}"
            return "info", _leaving(was, after, phase.wanted_by, name, text, took)
        case Proving(proof=proof):
            text = f"proving whether {DOING[proof]} works here"
            return "info", _leaving(was, after, None, name, text, took)
        case Stopping(failure=None, wanted_by=wanted_by):
            return "info", _leaving(was, after, wanted_by, name, "stopping", took)
        case Stopping(failure=failure, retry_at=at):
            why = failure.message if failure else ""
            text = f"{name} failed while {phase_word(was)}: {why}"
            return "error", f"{text}; stopping what is left, {_again(at, now)}"
        case _:
            assert_never(engine.phase)


def _awake_again(was: Phase, event: Event, name: ModelId, took: float) -> str:
    if isinstance(event, Observed):
        return f"{name} was found awake"
    if isinstance(was, Draining):
        return f"{name} stays awake: nobody wants its place any more"
    return f"{name} is awake{_how(was, took)}"


def _drains(phase: Draining, engine: Engine, after: State) -> str:
    if not phase.leases:
        return "idle, waiting for its turn"
    running = f"{count(len(phase.leases), 'answer')} still running"
    if phase.cut_at is not None:
        return running
    what, _ = drains.fate(after, engine, phase.leases, phase.level)
    return f"{running}, {what}"


def _outlived(old: Engine | None, new: Engine, after: State, now: float) -> Iterator[Line]:
    """The patience of a drain is over, and still it has to wait."""
    name, phase, was = new.spec.model, new.phase, old.phase if old else None
    if (
        not isinstance(phase, Draining)
        or not phase.late
        or (isinstance(was, Draining) and was.late)
    ):
        return
    why = drains.obstacle(after, new, phase.leases, phase.level)
    left = span(max(0.0, drains.deadline(after, new, phase) - now))
    outlived = f"{count(len(phase.leases), 'answer')} outlived {span(now - phase.since)}"
    text = f"{name}: {outlived}; waiting on, at most {left} more"
    fields = {"answers": len(phase.leases)}
    yield Line("info", "drain", name, f"{text}: {why}" if why else text, fields)


def _leaving(
    was: Phase, after: State, wanted_by: ModelId | None, name: ModelId, text: str, took: float
) -> str:
    """An engine that was just brought up and goes on at once tells both in one sentence."""
    if isinstance(was, Starting | Waking):
        return f"{name} is up{_how(was, took)}; {text}"
    if wanted_by is None or wanted_by == name:
        return f"{name} is {text}"
    return f"{_whom(after, wanted_by, name)} {text}"


def _whom(after: State, wanted_by: ModelId | None, name: ModelId) -> str:
    """For whom, with a colon: more follows."""
    if wanted_by is None or wanted_by == name:
        return f"{name} lets its answers end:"
    other = after.engines.get(wanted_by)
    held = other.phase.frozen if other and isinstance(other.phase, Asleep) else ()
    if not held:
        return f"{name} makes room for {wanted_by}:"
    goes = "goes" if len(held) == 1 else "go"
    return f"{name} makes room for {wanted_by}: {count(len(held), 'frozen answer')} {goes} on;"


def _how(was: Phase, took: float) -> str:
    """What it did until now, in brackets; empty where the time says nothing."""
    match was:
        case Starting():
            return f" (started in {took:.1f} s)"
        case Rousing():
            return f" (took {took:.1f} s)"
        case Waking(roused=True):
            return f" (woken in {took:.1f} s, after its weights)"
        case Waking(level=level):
            return f" (woken from level {level} in {took:.1f} s)"
        case FallingAsleep():
            return f" (took {took:.1f} s)"
        case Proving(proof=proof):
            return f" (tried {DOING[proof]} in {took:.1f} s)"
        case Stopping():
            return f" (stopped in {took:.1f} s)"
        case Down() | Asleep() | Roused() | Awake() | Draining():
            return ""
        case _:
            assert_never(was)


def _again(retry_at: float | None, now: float) -> str:
    if retry_at is None:
        return "only an operator starts it again"
    wait = max(0.0, retry_at - now)
    return f"next try in {span(wait)}" if wait else "it starts again when it is wanted"


def _failure(phase: Phase) -> Failure | None:
    return phase.failure if isinstance(phase, Down | Stopping) else None


# ---------------------------------------------------------------- what goes wrong beside


def _trouble(before: State, event: Event, after: State, now: float) -> Iterator[Line]:
    match event:
        case EngineSilent(model=name, silent_s=silent_s):
            text = f"{name} said nothing for {span(silent_s)}; asking it for a word"
            yield Line("warning", "silent", name, text)
        case StopEnded(model=name, failure=failure) if failure is not None:
            engine = after.engines.get(name)
            if engine is not None and before.engines.get(name) is not engine:
                text = f"cannot stop {name}: {failure.message}; it is tried again"
                yield Line("error", "stop-failed", name, _hinted(text, failure.hint))
        case ProveEnded(model=name, proof=proof) if (
            before.engines.get(name) != (engine := after.engines.get(name)) and engine is not None
        ):
            detail = engine.unproved.get(proof)
            fields = {"proof": proof.value}
            if detail is None:
                text = f"{name}: {DOING[proof]} is proved on this box"
                yield Line("info", "proof", name, text, fields)
            else:
                text = f"{name}: {DOING[proof]} did not work here and is not used: {detail}"
                yield Line("warning", "proof", name, text, fields)
        case _:
            pass


def _no_room(before: State, changed: Iterable[Engine]) -> Iterator[Line]:
    for engine in changed:
        name, why = engine.spec.model, engine.no_room
        old = before.engines.get(name)
        if why is not None and (old is None or old.no_room != why):
            yield Line("warning", "no-room", name, _hinted(why.message, why.hint))


def _cuts(before: State, outcome: Outcome) -> Iterator[Line]:
    cuts = [c for c in outcome.commands if isinstance(c, Cut)]
    for message, number in Counter(c.refusal.message for c in cuts).items():
        first = next(c.ticket for c in cuts if c.refusal.message == message)
        model = _model_of(before, first)
        text = f"{count(number, 'answer')} cut: {message}"
        yield Line("warning", "cut", model, text, {"answers": number})


def _refusals(before: State, event: Event, outcome: Outcome) -> Iterator[Line]:
    refused = [c for c in outcome.commands if isinstance(c, Refuse)]
    arrived = event.ticket if isinstance(event, RequestArrived) else None
    told: Counter[tuple[ModelId | None, str, str]] = Counter()
    for each in refused:
        if arrived is not None and arrived.id == each.ticket:
            model: ModelId | None = arrived.model
        else:
            model = _model_of(before, each.ticket)
        told[model, each.refusal.reason.value, each.refusal.message] += 1
    for (model, reason, message), number in told.items():
        text = f"{count(number, 'request')} refused: {message}"
        yield Line("info", "refusal", model, text, {"reason": reason, "requests": number})


def _model_of(state: State, ticket_id: TicketId) -> ModelId | None:
    if ticket_id in state.granted:
        return state.granted[ticket_id].model
    return next((t.model for t in state.waiting if t.id == ticket_id), None)


# ---------------------------------------------------------------- operations and the box


def _asked(event: Event, after: State) -> Iterator[Line]:
    if isinstance(event, OperationAsked):
        operation = event.operation
        text = f"{operation.by} asks to {_act(operation)} (operation {operation.id})"
        engine = after.engines.get(operation.model)
        if operation.act is Act.STOP and engine and ends_first(engine.phase):
            text = f"{text}: it is {phase_word(engine.phase)}, which ends first without --now"
        yield Line("info", "operation", operation.model or None, text, _about(operation))


def _ended(ended: Ended, now: float) -> Line:
    operation, refusal = ended.operation, ended.refusal
    took = round(now - operation.since, 3)
    fields = {**_about(operation), "took": took}
    which = f"operation {operation.id} ({operation.act.value} {_about_what(operation)})"
    if refusal is None:
        text = f"{which} is done after {took:.1f} s: {ended.text}"
        return Line("info", "operation", operation.model or None, text, fields)
    level: Level = "info" if refusal.reason is Reason.CANCELLED else "warning"
    text = _hinted(f"{which} ended: {ended.text}", refusal.hint)
    return Line(
        level,
        "operation",
        operation.model or None,
        text,
        {**fields, "reason": refusal.reason.value},
    )


def _about_what(operation: Operation) -> str:
    """Its model, or its GPUs."""
    if not operation.act.of_gpus:
        return operation.model
    return ", ".join(f"gpu{gpu}" for gpu in operation.gpus) or "all GPUs"


def _act(operation: Operation) -> str:
    verb = "switch to" if operation.act is Act.SWITCH else operation.act.value
    extras = [word for word, given in (("now", operation.cut), ("force", operation.force)) if given]
    return " ".join([verb, _about_what(operation), *(f"--{word}" for word in extras)])


def _about(operation: Operation) -> dict[str, str | int | float]:
    return {"operation": operation.id, "act": operation.act.value, "by": operation.by}


def _box(before: State, event: Event, after: State) -> Iterator[Line]:
    match event:
        case Observed():
            loads = sum(chore.act is Act.START for chore in after.chores)
            text = f"bootstrap: {len(event.found)} running already, {loads} to start"
            yield Line("info", "bootstrap", None, text)
        case ConfigChanged():
            yield Line("info", "config", None, f"configuration applied: {_diff(before, after)}")
        case ShutdownAsked():
            text = f"shutting down: {count(len(after.granted), 'answer')} running"
            yield Line("info", "shutdown", None, text)
        case _:
            pass


def _settings(engine: Engine) -> str:
    return (engine.next_spec or engine.spec).fingerprint


def _diff(before: State, after: State) -> str:
    given = {name for name, engine in after.engines.items() if not engine.retiring}
    parts = [_list("added", given - before.engines.keys())]
    parts.append(_list("removed", before.engines.keys() - given))
    renewed = {
        name
        for name in given & before.engines.keys()
        if _settings(after.engines[name]) != _settings(before.engines[name])
    }
    parts.append(_list("restarted", renewed))
    return "; ".join(part for part in parts if part) or "no engine is touched"


def _list(verb: str, names: Iterable[ModelId]) -> str:
    joined = ", ".join(sorted(names))
    return f"{verb} {joined}" if joined else ""


def _ready(state: State, now: float) -> Line:
    took = round(now - (now if state.since is None else state.since), 3)
    text = f"ready: {count(len(state.engines), 'model')}, {_population(state)}, took {took:.1f} s"
    failed = _failed(state)
    if failed:
        text = f"{text}; degraded: {', '.join(failed)} failed"
    return Line("warning" if failed else "info", "ready", None, text, {"took": took})


def _failed(state: State) -> list[ModelId]:
    """Models that should be up, and are out after a failure."""
    return [
        name
        for name, engine in state.engines.items()
        if engine.enabled and (_failure(engine.phase) or engine.no_room) is not None
    ]


def _progress(state: State) -> str:
    wanted = sum(e.spec.startup is not Startup.DISABLED for e in state.engines.values())
    left = sum(chore.act is Act.START for chore in state.chores)
    moves = [f"{phase_word(e.phase)} {name}" for name, e in state.engines.items() if _acts(e.phase)]
    number = 0 if state.since is None else min(wanted, wanted - left + 1)
    return f"{number}/{wanted}: {', '.join(moves) or 'looking around'}"


def _acts(phase: Phase) -> bool:
    return not isinstance(phase, Down | Asleep | Awake)


def _population(state: State) -> str:
    """`a awake, b waking, 2 asleep, 1 disabled`: names where few, numbers where many."""
    named, counts = [], Counter[str]()
    for name, engine in state.engines.items():
        if isinstance(engine.phase, Awake) or _acts(engine.phase):
            named.append(f"{name} {phase_word(engine.phase)}")
        elif (_failure(engine.phase) or engine.no_room) is not None:
            counts["failed"] += 1
        elif not engine.enabled:
            counts["disabled"] += 1
        else:
            counts[phase_word(engine.phase)] += 1
    numbers = [
        f"{counts[word]} {word}"
        for word in ("asleep", "down", "disabled", "failed")
        if counts[word]
    ]
    return ", ".join([*named, *numbers]) or "no models"


# ---------------------------------------------------------------- words


def _hinted(text: str, hint: str | None) -> str:
    return f"{text}; hint: {hint}" if hint else text
