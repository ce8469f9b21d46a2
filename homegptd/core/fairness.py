"""How long who wants an engine gone waits for it: two numbers, and when an engine is idle."""

from . import durations
from .draft import Draft
from .model import Awake, Engine, ModelId, State

LEAST_QUIET_S = 1.5
"""Programs that call a model again and again pause for less between two calls, in seconds."""

MOST_QUIET_S = 4.0
"""Somebody who reads an answer and then asks another model takes longer, in seconds."""


def patience_s(box: Draft | State, model: ModelId) -> float:
    """How long the head of the queue lets others overtake it, in seconds."""
    return _share(box, box.policy.patience_s, model)


def residency_s(box: Draft | State, model: ModelId) -> float:
    """How long a busy engine stays after it was woken, in seconds."""
    return _share(box, box.policy.residency_s, model)


def quiet_s(box: Draft | State, model: ModelId) -> float:
    """How long after an answer an engine still counts as busy, in seconds.

    As long as a switch takes, but longer than the pauses of programs and shorter than those of
    people; else two programs that ask in turn would make each other switch at every pause.
    """
    cost = durations.switch_cost_s(box.engines[model])
    return min(max(cost, LEAST_QUIET_S), MOST_QUIET_S, residency_s(box, model))


def leaves_at(
    box: Draft | State,
    engine: Engine,
    phase: Awake,
    *,
    wanted_by: ModelId,
    since: float,
    now: float,
) -> float:
    """The instant from which it makes room for `wanted_by`, who has waited since `since`."""
    name, idle_since = engine.spec.model, phase.idle_since
    if phase.held_until is not None and phase.held_until > now:
        return phase.held_until
    unused = idle_since == phase.since
    if idle_since is not None and (unused or wanted_by == name):
        return now
    overdue = since + patience_s(box, wanted_by)
    at = max(overdue, phase.since + residency_s(box, name))
    return at if idle_since is None else min(at, idle_since + quiet_s(box, name))


def _share(box: Draft | State, given: float | None, model: ModelId) -> float:
    """So long that under full contention switching takes at most `switch_share` of the time."""
    if given is not None:
        return given
    cost = durations.switch_cost_s(box.engines[model])
    return cost * (1 - box.policy.switch_share) / box.policy.switch_share
