"""Operations as callers see them: steps foreseen at the beginning, ticked off as they happen."""

from dataclasses import dataclass, field

from homegptd.core import durations, freeing, ledger, plans
from homegptd.core.levels import resting_level
from homegptd.core.model import (
    Act,
    Asleep,
    Awake,
    Down,
    Draining,
    Ended,
    Engine,
    FallingAsleep,
    ModelId,
    Operation,
    Proving,
    SleepLevel,
    Starting,
    State,
    Stopping,
    Waking,
)
from homegptd.core.refusals import Reason
from homegptd.wire import control as wire

_RUNNING: dict[str, tuple[type, ...]] = {
    "drain": (Draining,),
    "sleep": (FallingAsleep,),
    "stop": (Stopping,),
    "start": (Starting,),
    "wake": (Waking,),
    "prove": (Proving,),
}
_DONE: dict[str, tuple[type, ...]] = {
    "drain": (FallingAsleep, Asleep, Stopping, Down),
    "sleep": (Asleep, Waking),
    "stop": (Down, Starting),
    "start": (Awake, Draining, FallingAsleep, Asleep, Waking, Proving),
    "wake": (Awake, Draining, FallingAsleep, Asleep, Proving),
    "prove": (Awake, Draining, FallingAsleep),
}
"""Where an engine is after the step, or after one more that began in the same turn."""


@dataclass(slots=True)
class _Step:
    do: str
    model: ModelId
    expected_s: float | None
    began: float | None = None
    ended: float | None = None
    failed: bool = False

    def look(self, engine: Engine | None, now: float) -> None:
        """Notice that it began or ended, from the phase its engine is in."""
        if engine is None or self.ended is not None:
            return
        if isinstance(engine.phase, _RUNNING[self.do]):
            self.began = engine.phase.since if self.began is None else self.began
        elif isinstance(engine.phase, _DONE[self.do]):
            if self.began is not None or self.do == "drain":
                self.began = now if self.began is None else self.began
                self.ended = now
        elif self.began is not None and self.do == "drain" and isinstance(engine.phase, Awake):
            self.began = None  # the wish has lapsed, perhaps for a while
        elif self.began is not None:
            self.ended, self.failed = now, True

    def view(self, now: float) -> wire.StepView:
        began, ended = self.began, self.ended
        seconds = None if began is None else (now if ended is None else ended) - began
        state: wire.StepState = "waiting"
        if began is not None:
            state = "running" if ended is None else "failed" if self.failed else "done"
        return {
            "do": self.do,
            "model": self.model,
            "state": state,
            "seconds": _rounded(seconds),
            "expected_s": _rounded(self.expected_s),
        }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


@dataclass(slots=True)
class Progress:
    """One operation from its beginning to its end and for some time after."""

    operation: Operation
    steps: list[_Step] = field(default_factory=list)
    ended: Ended | None = None
    ended_at: float | None = None

    def look(self, state: State, now: float) -> None:
        if self.ended is None:
            for step in self.steps:
                step.look(state.engines.get(step.model), now)

    def end(self, ended: Ended, now: float) -> None:
        """What was foreseen and not needed is left out of the final account.

        A step that is still under way has failed with the operation, or is no part of it any more.
        """
        self.ended, self.ended_at = ended, now
        self.steps = [step for step in self.steps if step.began is not None]
        for step in self.steps:
            if step.ended is None:
                step.ended, step.failed = now, ended.refusal is not None

    def view(self, now: float, wall: float) -> wire.OperationView:
        """`wall` is what to add to loop time for Unix seconds."""
        end = now if self.ended_at is None else self.ended_at
        expected = [step.expected_s for step in self.steps if step.expected_s is not None]
        unknown = any(step.expected_s is None and step.ended is None for step in self.steps)
        return {
            "id": self.operation.id,
            "kind": self.operation.act.value,
            "model": self.operation.model or None,
            "by": self.operation.by,
            "since": self.operation.since + wall,
            "state": self._state(),
            "outcome": None if self.ended is None else self.ended.text,
            "error": self._error(),
            "steps": [step.view(now) for step in self.steps],
            "elapsed_s": round(end - self.operation.since, 3),
            "expected_s": None if unknown or not expected else round(sum(expected), 3),
        }

    def _state(self) -> wire.OperationState:
        if self.ended is None:
            return "running"
        if self.ended.refusal is None:
            return "done"
        return "cancelled" if self.ended.refusal.reason is Reason.CANCELLED else "failed"

    def _error(self) -> wire.FailureView | None:
        refusal = self.ended.refusal if self.ended else None
        if refusal is None:
            return None
        return {
            "message": refusal.message,
            "hint": refusal.hint,
            "reason": refusal.reason.value,
        }


def foresee(state: State, operation: Operation) -> list[_Step]:
    """The steps the operation will probably take, from where the box stands now."""
    if operation.act is Act.FREE:
        return [
            step for engine in state.engines.values() for step in _going(state, engine, operation)
        ]
    engine = state.engines.get(operation.model)
    if engine is None:
        return []
    match operation.act:
        case Act.RECLAIM | Act.FREE:
            return []
        case Act.SWITCH | Act.WAKE | Act.START:
            plan = plans.plan_switch(state, operation.model)
            steps = [_Step(step.do, step.model, step.expected_s) for step in plan.steps]
            return steps + ([_sleep(engine)] if operation.act is Act.START and steps else [])
        case Act.SLEEP:
            return [*_drain(engine), _sleep(engine)]
        case Act.STOP:
            return [
                *_drain(engine),
                _Step("stop", operation.model, durations.takes(engine, "stop")),
            ]
        case Act.PROVE:
            return [_Step("prove", operation.model, None)]


def _going(state: State, engine: Engine, operation: Operation) -> list[_Step]:
    """The steps of an engine on a GPU that is freed."""
    gpus = operation.gpus or tuple(state.gpus)
    if not freeing.on(engine, gpus) or isinstance(engine.phase, Down | Asleep):
        return []
    level = resting_level(state.engines, engine.spec.model, state.policy, ledger.budget(state))
    stop_s = durations.takes(engine, "stop")
    last = _Step("stop", engine.spec.model, stop_s) if level is None else _sleep(engine)
    return [*_drain(engine), last]


def _drain(engine: Engine) -> list[_Step]:
    return [_Step("drain", engine.spec.model, None)] if plans.running(engine) else []


def _sleep(engine: Engine) -> _Step:
    act = durations.to_sleep(engine, engine.spec.level or SleepLevel.ONE)
    return _Step("sleep", engine.spec.model, durations.takes(engine, act))
