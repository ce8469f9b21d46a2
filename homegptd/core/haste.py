"""What `--now` does to whatever is in its way: drains end, orders that hang are given up.

An order that goes well ends first: it takes a moment more, and breaking it off would cost a model
that is loaded.
"""

from msgspec.structs import replace

from . import durations, results
from .draft import Draft
from .drains import Resting
from .goal import Goal, Reach, may_displace, room
from .goals import goals
from .model import (
    Asleep,
    Down,
    Engine,
    Failure,
    FallingAsleep,
    ModelId,
    Proving,
    Roused,
    Rousing,
    Starting,
    Waking,
)

_SLACK_S = 5.0
"""An order hangs if it takes twice what it takes typically and this many seconds."""

_PROOF_S = 30.0
"""What a proof takes, generously: two answers, a sleep and a wake."""
_GOES = (Reach.ASLEEP, Reach.DOWN, Reach.CLEARED)


def hurry(d: Draft, resting: dict[ModelId, Resting]) -> None:
    """Whoever says `--now` and wants an engine gone ends its drain, whosever turn it is."""
    for goal in goals(d):
        if goal.operation is None:
            return  # operations come first
        if goal.operation.cut:
            _give_up_what_hangs(d, goal)
            for name in _unwanted(d, goal) & resting.keys():
                level = None if goal.reach is Reach.DOWN else resting[name].level
                resting[name] = replace(resting[name], level=level, cut=True)


def _unwanted(d: Draft, goal: Goal) -> set[ModelId]:
    """The engines that have to go before `goal` is reached."""
    if goal.reach in _GOES:
        return {goal.model}
    if isinstance(d.engines[goal.model].phase, Down | Asleep | Rousing | Roused):
        return set(room(d, goal) or ())
    return set()


def _give_up_what_hangs(d: Draft, goal: Goal) -> None:
    """Whoever says `--now` does not wait for an order in his way that outlived its time."""
    engine = d.engines[goal.model]
    if goal.reach in _GOES or not isinstance(engine.phase, Down | Asleep | Roused):
        return
    for other in list(d.engines.values()):
        near = other is not engine and not set(other.spec.gpus).isdisjoint(engine.spec.gpus)
        at = _hangs_at(other) if near and may_displace(d, goal, other) else None
        if at is not None and at <= d.now:
            took = d.now - other.phase.since
            text = f"it had not answered for {took:.0f} s when an operator asked for its place now"
            results.give_up(d, other, Failure(text))
        d.call_at(at)


def _hangs_at(engine: Engine) -> float | None:
    """The instant from which its order in flight counts as hanging; None without such an order."""
    match engine.phase:
        case Starting() | Rousing() | Waking() | FallingAsleep():
            act = durations.act_of(engine.phase)
            typical = durations.takes(engine, act) if act else 0.0
        case Proving():
            typical = _PROOF_S
        case _:
            return None
    return engine.phase.since + 2 * typical + _SLACK_S
