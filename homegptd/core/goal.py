"""One goal: what is to be reached, for whom, and whom it may displace for that."""

from enum import Enum

from msgspec import Struct

from . import levels, plans
from .draft import Draft
from .model import (
    Act,
    Asleep,
    Awake,
    Chore,
    Down,
    Draining,
    Engine,
    FallingAsleep,
    ModelId,
    Operation,
    Proof,
    Roused,
    Rousing,
    Startup,
)


class Reach(Enum):
    AWAKE = "awake"
    LOADED = "loaded"
    """Up, and asleep unless somebody uses it."""
    ASLEEP = "asleep"
    DOWN = "down"
    CLEARED = "cleared"
    """Asleep as well as it can, or down: its GPU is wanted for something else than models."""
    PROVEN = "proven"


class Goal(Struct, frozen=True):
    reach: Reach
    model: ModelId
    since: float
    operation: Operation | None = None
    chore: Chore | None = None
    gentle: bool = False
    """Displaces idle engines only."""
    proof: Proof = Proof.FREEZE

    @property
    def urgent(self) -> bool:
        """An operator asked: patience and residency do not count."""
        return self.operation is not None

    @property
    def cut(self) -> bool:
        """An operator said `--now`: no answer is waited for."""
        return self.operation is not None and self.operation.cut


def room(d: Draft, goal: Goal) -> levels.Displacements | None:
    """What has to go before `goal` can bring its engine up; None: that can never be.

    Loading for later stops nobody who sleeps already, or two models would stop each other by turns.
    """
    for_now = goal.urgent or goal.reach is not Reach.LOADED
    return plans.make_room(
        d.state(),
        goal.model,
        may_displace=lambda engine: may_displace(d, goal, engine),
        may_stop=for_now or not goal.gentle,
        may_stop_sleepers=for_now,
    )


def may_displace(d: Draft, goal: Goal, engine: Engine) -> bool:
    """Whether `goal` may ever make `engine` go; when is another question."""
    operation = goal.operation
    if operation is not None and operation.act is Act.WAKE:
        return False
    if isinstance(engine.phase, Asleep | FallingAsleep) and engine.phase.frozen:
        return False
    if engine.spec.pinned and not (operation is not None and operation.force):
        return False
    return not goal.gentle or _gives_way(d, goal, engine)


def _gives_way(d: Draft, goal: Goal, engine: Engine) -> bool:
    """To gentle goals only sleepers and idle engines do, and actives not to one another.

    What cannot sleep would have to be stopped: never for one that is only loaded for later.
    """
    if goal.reach is Reach.LOADED and not any(levels.levels(engine, d.policy)):
        return False
    match engine.phase:
        case Awake(leases=leases, held_until=held):
            rival = goal.chore is not None and goal.reach is Reach.AWAKE
            rival = rival and engine.spec.startup is Startup.ACTIVE
            return not leases and not rival and (held is None or held <= d.now)
        case Draining(leases=leases):
            return not leases
        case Asleep() | Rousing() | Roused() | FallingAsleep() | Down():
            return True
        case _:
            return False
