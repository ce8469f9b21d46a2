"""From a snapshot to the values of the wire, once for HTTP, the control socket and events alike.

Instants in a snapshot are loop time; `wall` turns them into Unix seconds.
"""

from collections.abc import Callable, Iterable, Mapping

from homegptd.core import drains, figures, freeing, ledger
from homegptd.core.draft import in_flight
from homegptd.core.invariants import held
from homegptd.core.memory import Kind, Source
from homegptd.core.model import (
    Act,
    Asleep,
    Awake,
    Down,
    Draining,
    Engine,
    Failure,
    FallingAsleep,
    ModelId,
    Phase,
    Proving,
    Roused,
    Rousing,
    Starting,
    State,
    Stopping,
    Waking,
)
from homegptd.core.story import ends_first
from homegptd.core.words import count
from homegptd.wire import control as wire

from .accounts import Account, Spread

Wall = Callable[[float], float]
Names = Mapping[ModelId, tuple[str, tuple[str, ...]]]
"""For each model its name for people and its aliases."""

_GIB = 1024
FIGURES: Mapping[Kind, wire.FigureWord] = {
    Kind.AWAKE: "awake",
    Kind.RESIDUE: "residue",
    Kind.ROUSED: "roused",
    Kind.PINNED: "pinned",
    Kind.HOST: "host",
}
_SOURCES: Mapping[Source, wire.SourceWord] = {
    Source.CONFIGURED: "configured",
    Source.ESTIMATED: "estimated",
    Source.MEASURED: "measured",
}


def phase_word(phase: Phase) -> wire.PhaseWord:
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
            return "falling-asleep"
        case Proving():
            return "proving"
        case Stopping():
            return "stopping"


def model_status(engine: Engine) -> wire.ModelStatus:
    """The original manager's words, and `disabled` and `stopped` beside them."""
    match engine.phase:
        case Awake() | Draining():
            return "active"
        case Asleep():
            return "sleeping"
        case Down():
            if _failure(engine) is not None:
                return "error"
            return "stopped" if engine.enabled else "disabled"
        case Starting() | Rousing() | Roused() | Waking():
            return "switching"
        case FallingAsleep() | Proving() | Stopping():
            return "switching"


def model_view(state: State, model: ModelId, names: Names, wall: Wall) -> wire.ModelView:
    engine = state.engines[model]
    name, aliases = names.get(model, (model, ()))
    books = ledger.charge(engine)
    failure = _failure(engine)
    until = _until(state, engine)
    return {
        "id": model,
        "name": name,
        "aliases": list(aliases),
        "status": model_status(engine),
        "phase": phase_word(engine.phase),
        "since": wall(engine.phase.since) if engine.phase.since else None,
        "level": _level(engine.phase),
        "gpus": list(engine.spec.gpus),
        "memory_mib": {
            "gpu": sum(books[gpu] for gpu in engine.spec.gpus),
            "host": books[ledger.HOST],
        },
        "figures": figure_views(engine),
        "requests": _requests(state, engine),
        "until": None if until is None else wall(until),
        "why": why(state, engine),
        "default": state.policy.default == model,
        "pinned": engine.spec.pinned,
        "error": None if failure is None else {"message": failure.message, "hint": failure.hint},
    }


def models_view(state: State, names: Names, wall: Wall) -> list[wire.ModelView]:
    return [model_view(state, model, names, wall) for model in state.engines]


def figure_views(engine: Engine) -> list[wire.FigureView]:
    return [
        {
            "kind": FIGURES[kind],
            "gpu": None if place == ledger.HOST else place,
            "mib": figure.mib,
            "margin_mib": figure.margin_mib,
            "source": _SOURCES[figure.source],
            "at": figure.at,
        }
        for (kind, place), figure in figures.table(engine).items()
    ]


def queue_view(state: State, wall: Wall) -> list[wire.QueueView]:
    oldest: dict[ModelId, float] = {}
    count: dict[ModelId, int] = {}
    for ticket in state.waiting:
        oldest.setdefault(ticket.model, ticket.since)
        count[ticket.model] = count.get(ticket.model, 0) + 1
    return [
        {"model": model, "waiting": count[model], "since": wall(since)}
        for model, since in oldest.items()
    ]


def daemon_phase(state: State) -> wire.DaemonPhase:
    if state.stopping:
        return "stopping"
    if not state.booted:
        return "bootstrap"
    return "ready" if can_serve(state) and not _failed(state) else "degraded"


def can_serve(state: State) -> bool:
    """Whether some model is up, or could be brought up by a request."""
    return any(
        engine.enabled
        and not freeing.is_freed(state, engine)
        and not (isinstance(engine.phase, Down | Asleep) and _failure(engine))
        for engine in state.engines.values()
    )


def why(state: State, engine: Engine) -> str:
    """One short phrase: why it is in this state, or what comes next."""
    phrase, name = _why(state, engine), engine.spec.model
    stops = any(o.act is Act.STOP and o.model == name for o in state.operations)
    if stops and ends_first(engine.phase):
        return f"{phrase}; is stopped after that, or at once with --now"
    return phrase


def _why(state: State, engine: Engine) -> str:
    running = len(held(engine))
    freed = next((gpu for gpu in engine.spec.gpus if gpu in state.freed), None)
    if freed is not None and not in_flight(engine.phase) and not running:
        return f"gpu{freed} is freed by {state.freed[freed].by}"
    match engine.phase:
        case Down(failure=None) | Asleep() if engine.no_room is not None:
            return engine.no_room.message
        case Down(failure=failure) if failure is not None:
            return failure.message
        case Down():
            return "starts when a request names it" if engine.enabled else "disabled"
        case Starting():
            return "loading"
        case Asleep(frozen=frozen) if frozen:
            return f"holds {count(len(frozen), 'frozen answer')}"
        case Asleep(level=level):
            return (
                f"weights in RAM (level {level})" if level == 1 else "weights discarded (level 2)"
            )
        case Rousing():
            return "its weights come back while others still answer"
        case Roused():
            return "its weights are back; wakes when others have ended"
        case Waking():
            return "waking"
        case Awake():
            return _why_awake(state, engine, running)
        case Draining() as phase:
            return _why_draining(state, engine, phase)
        case FallingAsleep(level=level):
            return f"going to sleep (level {level})"
        case Proving():
            return "being proved (a few seconds)"
        case Stopping():
            return "stopping"


def _why_draining(state: State, engine: Engine, phase: Draining) -> str:
    """For whom, and what becomes of its answers."""
    by = phase.wanted_by
    whom = "lets its answers end" if by in (None, engine.spec.model) else f"makes room for {by}"
    if not phase.leases:
        return f"{whom}; idle"
    still = f"{whom}; {count(len(phase.leases), 'answer')} still running"
    if phase.cut_at is not None:
        return f"{still}, told to end"
    what, _ = drains.fate(state, engine, phase.leases, phase.level)
    return f"{still}, {what}"


def _why_awake(state: State, engine: Engine, running: int) -> str:
    if engine.spec.pinned:
        return "pinned"
    if running:
        return f"serving {count(running, 'request')}"
    if engine.spec.model == state.policy.default:
        return "default model, idle"
    return "idle"


def _until(state: State, engine: Engine) -> float | None:
    match engine.phase:
        case Down(failure=failure, retry_at=at) if failure is not None:
            return at
        case Draining(leases=leases) as phase:
            return drains.deadline(state, engine, phase) if leases else None
        case Asleep(frozen_until=float() as until):
            return until
        case Asleep() if engine.spec.stop_after_s is not None and not engine.spec.pinned:
            return max(engine.last_used, engine.up_since) + engine.spec.stop_after_s
        case Awake(held_until=until, idle_since=idle):
            spec = engine.spec
            rests = [s for s in (spec.sleep_after_s, spec.stop_after_s) if s is not None]
            if rests and idle is not None and not spec.pinned:
                return idle + min(rests)
            return until
        case _:
            return None


def accounts_view(accounts: Iterable[Account]) -> list[wire.AccountView]:
    return [
        {
            "model": each.model,
            "key": each.key,
            "requests": each.requests,
            "answered": each.answered,
            "refused": each.refused,
            "failed": each.failed,
            "aborted": each.aborted,
            "retried": each.retried,
            "frozen": each.frozen,
            "tokens_read": each.tokens_read,
            "tokens_written": each.tokens_written,
            "uncounted": each.uncounted,
            "wait_s": _average(each.waited),
            "first_token_s": _average(each.first_token),
        }
        for each in accounts
    ]


def _average(spread: Spread) -> float | None:
    return round(spread.sum_s / spread.count, 4) if spread.count else None


def _level(phase: Phase) -> wire.Level | None:
    match phase:
        case Asleep(level=level) | FallingAsleep(level=level) | Waking(level=level):
            return 1 if level == 1 else 2
        case Rousing(level=level) | Roused(level=level):
            return 1 if level == 1 else 2
        case _:
            return None


def _requests(state: State, engine: Engine) -> wire.RequestsView:
    count = len(held(engine))
    frozen = count if isinstance(engine.phase, Asleep | FallingAsleep | Waking) else 0
    waiting = sum(ticket.model == engine.spec.model for ticket in state.waiting)
    return {"running": count - frozen, "waiting": waiting, "frozen": frozen}


def _failed(state: State) -> bool:
    return any(_failure(engine) is not None for engine in state.engines.values())


def _failure(engine: Engine) -> Failure | None:
    """Why it is not to be had: what went wrong, or that it never fits."""
    went_wrong = engine.phase.failure if isinstance(engine.phase, Down | Stopping) else None
    return went_wrong or engine.no_room
